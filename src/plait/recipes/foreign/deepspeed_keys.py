"""DeepSpeed's keys for which a recipe has no setting: https://www.deepspeed.ai/docs/config-json/."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

_SPEED = "size of DeepSpeed's own messages; FSDP2 gathers a block at a time. Results are the same, nothing to do"
_OVERLAP = "when DeepSpeed sends; results are the same, nothing to do"
_FLOAT32 = "what trains is float32, and so are its gradients and their sums"
_SCALE = "the scale of the loss begins at 2**16 and doubles after 2000 good steps; nothing to do"
_RECOMPUTE = "the section says how, the model's code says whether: set trainer.recompute to full or selective"
_STEPS = "metrics.jsonl has loss, rate, norm and times of every step"
_PLUS = "ZeRO++ is not there: what is sent is not rounded, and pieces lie over all processes"

_SECTION_NAMES = """optimizer scheduler fp16 bf16 amp zero_optimization activation_checkpointing sparse_attention
aio flops_profiler tensorboard wandb comet csv_monitor elasticity comms_logger autotuning data_efficiency
curriculum_learning progressive_layer_drop eigenvalue quantize_training compression_training checkpoint data_types
hybrid_engine pipeline tensor_parallel compile torch_autocast monitor_config nebula zenflow optimizer.params
scheduler.params zero_optimization.zenflow"""

_DISK_NAMES = """nvme_path buffer_count buffer_size max_in_cpu fast_init pipeline_read pipeline_write ratio pin_memory
super_offload cpuadam_cores_perc"""

_SIZE_NAMES = """allgather_bucket_size reduce_bucket_size stage3_max_live_parameters stage3_max_reuse_distance
stage3_prefetch_bucket_size stage3_param_persistence_threshold stage3_model_persistence_threshold
stage3_module_granularity_threshold stage3_allgather_sequential sub_group_size use_multi_rank_bucket_allreduce
memory_efficient_linear use_all_reduce_for_fetch_params enable_sanity_checks log_trace_cache_warnings
param_persistence_threshold model_persistence_threshold max_live_parameters max_reuse_distance
prefetch_bucket_size"""

SECTIONS = frozenset(_SECTION_NAMES.split())
"""Keys that hold a mapping; null or false is off."""


def _neutral(*values: Any, why: str, otherwise: str) -> tuple[tuple[Any, ...], str, str]:
    return values, why, otherwise


def _always(why: str) -> tuple[tuple[Any, ...], str, str]:
    """Whatever it says."""
    return (), why, ""


def _off(otherwise: str) -> tuple[tuple[Any, ...], str, str]:
    return (False, None, 0, [], ""), "off", otherwise


_ZERO = "zero_optimization."
_AC = "activation_checkpointing."

NEUTRAL: Mapping[str, tuple[tuple[Any, ...], str, str]] = {
    "communication_data_type": _neutral(None, "fp32", why=_FLOAT32, otherwise=f"{_FLOAT32}; nothing to do"),
    "seq_parallel_communication_data_type": _neutral(
        None, "fp32", why="sums are float32", otherwise="sums are float32; nothing to do"
    ),
    "data_types.grad_accum_dtype": _neutral(None, "fp32", why=_FLOAT32, otherwise=f"{_FLOAT32}; nothing to do"),
    "prescale_gradients": _off("sums are divided once, by the count over all processes; nothing to do"),
    "gradient_predivide_factor": _neutral(
        1,
        1.0,
        why="sums are divided once, by the count over all processes",
        otherwise="sums are divided once, by the count over all processes; nothing to do",
    ),
    "sparse_gradients": _off("gradients of embeddings are dense; results are the same, nothing to do"),
    "steps_per_print": _always(_STEPS),
    "wall_clock_breakdown": _always(_STEPS),
    "memory_breakdown": _off("metrics.jsonl has the memory in use; nothing to do"),
    "dump_state": _off("`plait config show RECIPE` prints all settings"),
    "disable_allgather": _off(_OVERLAP),
    "zero_allow_untested_optimizer": _always("what does not work in pieces is refused by name"),
    "zero_force_ds_cpu_optimizer": _neutral(
        False,
        why="pieces in the host's memory are updated by torch",
        otherwise="they are updated by torch; nothing to do",
    ),
    "fp16.auto_cast": _neutral(
        True, why="forward runs under autocast", otherwise="forward runs under autocast; nothing to do"
    ),
    "fp16.initial_scale_power": _neutral(16, why="2**16", otherwise=_SCALE),
    "fp16.loss_scale_window": _neutral(2000, why="2000", otherwise=_SCALE),
    "fp16.hysteresis": _neutral(
        1, why="every overflow halves the scale", otherwise="every overflow halves the scale; nothing to do"
    ),
    "fp16.consecutive_hysteresis": _off("every overflow halves the scale; nothing to do"),
    "fp16.min_loss_scale": _off("the scale has no lower bound; ten bad steps in a row end the run; nothing to do"),
    "fp16.fp16_master_weights_and_grads": _off(_FLOAT32),
    "bf16.immediate_grad_update": _off(_OVERLAP),
    "bf16.check_grad_overflow": _always("a step that is not finite is left out and counted"),
    "bf16.bf16_master_weights_and_grads": _off(_FLOAT32),
    "bf16.bf16_optimizer_states": _off("`trainer.optimizer: {kind: adamw-8bit}` keeps moments in 8 bits, with zero 0"),
    "torch_autocast.lower_precision_safe_modules": _off("torch's autocast says which operations run in 16 bits"),
    f"{_ZERO}reduce_scatter": _neutral(True, why="FSDP2 scatters its sums", otherwise=_SPEED),
    f"{_ZERO}contiguous_gradients": _neutral(True, why="FSDP2 copies gradients into one buffer", otherwise=_SPEED),
    f"{_ZERO}allgather_partitions": _neutral(True, why="FSDP2 gathers all at once", otherwise=_SPEED),
    f"{_ZERO}ignore_unused_parameters": _neutral(
        True,
        why="a weight that no process used has no gradient",
        otherwise="a weight that no process used has no gradient, and that is no error",
    ),
    f"{_ZERO}elastic_checkpoint": _always("a checkpoint is read by any number of processes"),
    f"{_ZERO}load_from_fp32_weights": _neutral(True, why="what trains is float32", otherwise="what trains is float32"),
    f"{_ZERO}stage3_gather_16bit_weights_on_model_save": _neutral(
        True,
        why="the model's files are whole, in the format of its weights",
        otherwise="the model's files are always whole; nothing to do",
    ),
    f"{_ZERO}stage3_gather_fp16_weights_on_model_save": _neutral(
        True, why="the model's files are whole", otherwise="the model's files are always whole; nothing to do"
    ),
    f"{_ZERO}gather_16bit_weights_on_model_save": _neutral(
        True, why="the model's files are whole", otherwise="the model's files are always whole; nothing to do"
    ),
    f"{_ZERO}zero_hpz_partition_size": _neutral(1, why="pieces lie over all processes", otherwise=_PLUS),
    f"{_ZERO}zero_quantized_weights": _off(_PLUS),
    f"{_ZERO}zero_quantized_nontrainable_weights": _off(_PLUS),
    f"{_ZERO}zero_quantized_gradients": _off(_PLUS),
    f"{_ZERO}mics_shard_size": _neutral(-1, why="pieces lie over all processes", otherwise=_PLUS),
    f"{_ZERO}mics_hierarchical_params_gather": _off(_PLUS),
    f"{_ZERO}round_robin_gradients": _off(_OVERLAP),
    f"{_ZERO}legacy_stage1": _off(_OVERLAP),
    f"{_ZERO}grad_hooks": _always(_OVERLAP),
    f"{_ZERO}cpu_offload_use_pin_memory": _neutral(
        True, why="what is moved to a GPU is pinned", otherwise="what is moved to a GPU is pinned; nothing to do"
    ),
    f"{_AC}partition_activations": _off("trainer.parallel.tensor and .context hold each process's own part"),
    f"{_AC}cpu_checkpointing": _off("kept inputs stay on the device; trainer.recompute: full keeps the fewest"),
    f"{_AC}contiguous_memory_optimization": _off(_RECOMPUTE),
    f"{_AC}number_checkpoints": _off(_RECOMPUTE),
    f"{_AC}synchronize_checkpoint_boundary": _off(_RECOMPUTE),
    f"{_AC}profile": _off(_STEPS),
    "checkpoint.tag_validation": _always("one manifest seals what all processes wrote"),
    "checkpoint.load_universal": _always("a checkpoint is read by any number of processes"),
    "checkpoint.use_node_local_storage": _off("processes share one file system; keep the run folder there"),
    "checkpoint.parallel_write.pipeline_stage": _always("every process writes its own pieces"),
    "compile.deepcompile": _off("trainer.compile is torch.compile, block by block"),
    "pipeline.seed_layers": _off("one seed says all: `seed`"),
    "amp.enabled": _off("apex is not there: set stages.tune.dtype to float16 or bfloat16"),
}
"""Key -> values that say what Plait does anyway, why that is so, and what to say of any other."""

NVME = frozenset(
    f"{_ZERO}{section}.{name}" for section in ("offload_param", "offload_optimizer") for name in _DISK_NAMES.split()
)
"""Keys of offloading to a disk."""

GROUPS: Mapping[str, str] = {
    **{f"{_ZERO}{name}": _SPEED for name in _SIZE_NAMES.split()},
    f"{_ZERO}overlap_comm": _OVERLAP,
    f"{_ZERO}override_module_apply": "FSDP2 makes weights in pieces itself; nothing to do",
    f"{_ZERO}leaf_module": "which parts are gathered together is known: what only media reach is one",
    f"{_ZERO}zeropp_loco_param": _PLUS,
    f"{_ZERO}zenflow": "updates lag behind there; Plait's are exact",
    "sparse_attention": "attention is torch's, over whole packed documents; give the decoder's own window instead",
    "aio": "of offloading to a disk, which Plait does not do",
    "flops_profiler": "metrics.jsonl has FLOPs and their share of the machine's peak (mfu); `plait plan` counts them",
    "tensorboard": "trackers: [{kind: tensorboard}] in the recipe sends every step there; metrics.jsonl holds all",
    "wandb": "trackers: [{kind: wandb}] in the recipe sends every step there; metrics.jsonl holds all",
    "comet": "metrics.jsonl and results.csv of the run folder hold every step; any viewer may read them",
    "csv_monitor": "metrics.jsonl and results.csv of the run folder hold every step",
    "monitor_config": "metrics.jsonl and results.csv of the run folder hold every step",
    "elasticity": "torchrun --nnodes 1:4 lets machines come and go; the batch stays the recipe's",
    "comms_logger": "metrics.jsonl has the share of a step that waits; benchmarks/scaling.py counts bytes",
    "autotuning": "`plait plan` counts memory and time of a recipe; nothing is tried out by itself",
    "data_efficiency": "order and shares of samples are stages.tune.tasks and group_by_length",
    "curriculum_learning": "order and shares of samples are stages.tune.tasks and group_by_length",
    "progressive_layer_drop": "layers are not dropped",
    "eigenvalue": "of quantization while training; see the stage compress",
    "quantize_training": "quantization is a stage of its own: compress",
    "compression_training": "quantization and pruning are a stage of their own: compress",
    "checkpoint": "checkpoints are Plait's: docs/reliability.md",
    "hybrid_engine": "answers are sampled by Plait's own engine; nothing to do",
    "nebula": "checkpoints are Plait's: docs/reliability.md",
    "zenflow": "updates lag behind there; Plait's are exact",
    "amp": "apex is not there: set stages.tune.dtype to float16 or bfloat16",
    "pipeline": "set trainer.parallel.pipeline to the number of parts",
    "tensor_parallel": "which weights are cut where is known of each decoder; nothing to do",
    "compile": "trainer.compile is torch.compile, block by block, with its own defaults",
    "torch_autocast": "torch's autocast says which operations run in 16 bits",
    "use_data_before_expert_parallelism": "ranks are laid out pipeline, data, context, tensor; nothing to do",
    "timers": "metrics.jsonl has times of every step",
    "graph_harvesting": "trainer.compile compiles blocks",
    "mesh_param": "ranks are laid out pipeline, data, context, tensor; set trainer.parallel",
    "activation_checkpointing": _RECOMPUTE,
}
"""Key, or section, that no setting is for -> why, and what to do."""
