"""Names of Megatron-LM's arguments: ``megatron/training/arguments.py`` of https://github.com/NVIDIA/Megatron-LM.

The older ``examples/*.sh`` and the newer releases name some things twice; both are here.
"""

from __future__ import annotations

from collections.abc import Mapping

_SPEED = "how it is computed or sent; results are the same, nothing to do"

_MAPPED_NAMES = """tensor_model_parallel_size pipeline_model_parallel_size context_parallel_size
expert_model_parallel_size expert_tensor_parallel_size sequence_parallel use_distributed_optimizer use_torch_fsdp2
data_parallel_sharding_strategy optimizer_cpu_offload micro_batch_size global_batch_size train_iters train_samples
lr min_lr lr_decay_style lr_decay_iters lr_decay_samples lr_warmup_fraction lr_warmup_iters lr_warmup_samples
lr_warmup_init lr_wsd_decay_style lr_wsd_decay_iters lr_wsd_decay_samples optimizer adam_beta1 adam_beta2 adam_eps
sgd_momentum weight_decay start_weight_decay end_weight_decay weight_decay_incr_style clip_grad bf16 fp16
recompute_granularity recompute_activations save_interval seed num_workers async_save"""

_LIST_NAMES = """data_path train_data_path valid_data_path test_data_path rampup_batch_size profile_ranks
retriever_report_topk_accuracies recompute_modules moe_layer_freq blend cp_comm_type
hierarchical_context_parallel_sizes cuda_graph_scope"""

MAPPED = frozenset(_MAPPED_NAMES.split())
"""Those that rules read; :mod:`plait.recipes.foreign.megatron` has the rules."""

LISTS = frozenset(_LIST_NAMES.split())
"""Those that take several words."""

SAME: Mapping[str, str] = {
    "accumulate_allreduce_grads_in_fp32": "gradients and their sums are float32",
    "attention_softmax_in_fp32": "softmax runs in float32 under autocast",
    "calculate_per_token_loss": "a loss is a sum over tokens, divided by their count over all processes",
    "check_for_nan_in_loss_and_grad": "a step that is not finite is left out and counted",
    "no_initialization": "weights that are read are not drawn before",
    "use_mcore_models": "of Megatron's own code",
    "use_legacy_models": "of Megatron's own code",
    "exit_signal_handler": "SIGTERM ends a run after its step, with a checkpoint",
    "use_dist_ckpt": "each process writes its own pieces into one checkpoint",
    "ckpt_fully_parallel_save": "each process writes its own pieces into one checkpoint",
    "ckpt_fully_parallel_load": "a checkpoint is read by any number of processes",
    "auto_detect_ckpt_format": "there is one format",
    "log_interval": "metrics.jsonl has every step",
    "log_throughput": "metrics.jsonl has tokens a second",
    "log_params_norm": "metrics.jsonl has norms",
    "log_progress": "events.jsonl has it",
    "reset_position_ids": "packed samples each begin at position 0",
    "reset_attention_mask": "packed samples do not see each other",
    "deterministic_mode": "a run on a CPU goes on to the same bits",
    "use_flash_attn": "torch takes the fastest attention that there is",
    "use_cpu_initialization": "weights follow from the seed alone, however they are cut",
    "distributed_backend": "gloo for the CPU, NCCL for GPUs",
    "dataloader_type": "batches follow from the seed and the step",
    "skip_train": "which stages run is what the recipe lists",
    "no_save_optim": "checkpoints hold all that goes on",
    "no_save_rng": "checkpoints hold all that goes on",
    "local_rank": "torchrun says it",
    "loss_scale": "the scale of the loss of float16 adapts",
}
"""Argument -> why nothing needs to say it."""

_MODEL = """num_layers encoder_num_layers decoder_num_layers hidden_size ffn_hidden_size num_attention_heads kv_channels
group_query_attention num_query_groups max_position_embeddings position_embedding_type use_rotary_position_embeddings
rotary_base rotary_percent rotary_interleaved rotary_seq_len_interpolation_factor use_rope_scaling rope_scaling_factor
no_position_embedding add_position_embedding make_vocab_size_divisible_by padded_vocab_size layernorm_epsilon
norm_epsilon apply_layernorm_1p layernorm_zero_centered_gamma apply_residual_connection_post_layernorm openai_gelu
squared_relu swiglu gated_linear_unit activation_func quick_geglu onnx_safe bert_no_binary_head bert_binary_head
untie_embeddings_and_output_weights normalization disable_bias_linear add_bias_linear add_qkv_bias qk_layernorm
window_size spec model_type init_method init_method_std output_layer_init_method init_method_xavier_uniform
data_parallel_random_init perform_initialization attention_dropout hidden_dropout fp32_residual_connection
apply_query_key_layer_scaling multi_latent_attention q_lora_rank kv_lora_rank qk_head_dim qk_pos_emb_head_dim
v_head_dim rotary_scaling_factor mscale mscale_all_dim mtp_num_layers mtp_loss_scaling_factor hybrid_attention_ratio
hybrid_mlp_ratio hybrid_override_pattern is_hybrid_model mamba_state_dim mamba_head_dim mamba_num_groups
vocab_size vocab_extra_ids bert_load ict_load ict_head_size biencoder_projection_dim
biencoder_shared_query_context_model"""

_EXPERTS = """num_experts num_moe_experts moe_layer_freq moe_ffn_hidden_size moe_shared_expert_intermediate_size
moe_shared_expert_overlap moe_router_load_balancing_type moe_router_topk moe_router_num_groups moe_router_group_topk
moe_router_topk_scaling_factor moe_router_score_function moe_router_enable_expert_bias moe_router_bias_update_rate
moe_router_dtype moe_router_pre_softmax moe_router_fusion moe_router_force_load_balancing moe_aux_loss_coeff
moe_z_loss_coeff moe_input_jitter_eps moe_token_dropping moe_expert_capacity_factor moe_pad_expert_input_to_capacity
moe_token_drop_policy moe_token_dispatcher_type moe_flex_dispatcher_backend moe_enable_deepep moe_grouped_gemm
moe_permute_fusion moe_per_layer_logging moe_extended_tp moe_layer_recompute moe_use_upcycling
moe_use_legacy_grouped_gemm overlap_moe_expert_parallel_comm delay_wgrad_compute"""

_DATA = """data_path split train_data_path valid_data_path test_data_path data_cache_path no_mmap_bin_files mock_data
vocab_file merge_file seq_length encoder_seq_length decoder_seq_length retriever_seq_length sample_rate mask_prob
short_seq_prob tokenizer_type tokenizer_model tiktoken_pattern eod_mask_loss create_attention_mask_in_dataloader
no_create_attention_mask_in_dataloader num_dataset_builder_threads blend titles_data_path query_in_block_prob
use_one_sent_docs evidence_data_path num_classes img_h img_w num_channels patch_dim classes_fraction
data_per_class_fraction no_data_sharding vision_pretraining vision_pretraining_type vision_backbone_type
swin_backbone_type mask_type mask_factor iter_per_epoch"""

_LOGS = """tensorboard_dir tensorboard_log_interval tensorboard_queue_size log_timers_to_tensorboard
log_batch_size_to_tensorboard no_log_learnig_rate_to_tensorboard no_log_loss_scale_to_tensorboard
log_loss_scale_to_tensorboard log_validation_ppl_to_tensorboard log_memory_to_tensorboard
log_world_size_to_tensorboard log_learning_rate_to_tensorboard log_num_zeros_in_grad log_energy wandb_project
wandb_exp_name wandb_save_dir wandb_entity enable_one_logger one_logger_project one_logger_entity one_logger_run_name
one_logger_async app_tag_run_name app_tag_run_version timing_log_level timing_log_option barrier_with_L1_time
no_barrier_with_level_1_timing logging_level log_straggler disable_straggler_on_startup straggler_ctrlr_port
straggler_minmax_count timers"""

_FILES = """save load finetune pretrained_checkpoint ckpt_step no_load_optim no_load_rng use_checkpoint_args
exit_on_missing_checkpoint dist_ckpt_format ckpt_format dist_ckpt_strictness ckpt_assume_constant_structure
no_ckpt_fully_parallel_save ckpt_convert_format ckpt_convert_save non_persistent_save_interval
non_persistent_ckpt_type override_opt_param_scheduler override_opt_param_scheduler use_checkpoint_opt_param_scheduler
no_use_tokenizer_model_from_checkpoint_args adlr_autoresume adlr_autoresume_interval save_retain_interval
block_data_path embedding_path"""

_SPEEDS = """overlap_grad_reduce no_overlap_grad_reduce delay_grad_reduce no_delay_grad_reduce
ddp_bucket_size ddp_num_buckets ddp_average_in_collective align_grad_reduce overlap_param_gather delay_param_gather
no_align_param_gather overlap_param_gather_with_optimizer_step scatter_gather_tensors_in_pipeline
no_scatter_gather_tensors_in_pipeline use_ring_exchange_p2p no_overlap_p2p_communication overlap_p2p_comm
batch_p2p_comm batch_p2p_sync tp_comm_overlap tp_comm_overlap_cfg disable_tp_comm_overlap_ag
disable_tp_comm_overlap_rs tp_comm_overlap_rs_dgrad disable_tp_comm_bulk_dgrad disable_tp_comm_bulk_wgrad
tp_comm_bulk_wgrad tp_comm_bulk_dgrad tp_comm_split_ag tp_comm_split_rs tp_comm_atomic_ag tp_comm_atomic_rs
disable_tp_comm_split_ag disable_tp_comm_split_rs tp_comm_bootstrap_backend masked_softmax_fusion
no_masked_softmax_fusion no_bias_gelu_fusion no_bias_swiglu_fusion bias_swiglu_fusion bias_activation_fusion
no_bias_dropout_fusion bias_dropout_fusion no_rope_fusion apply_rope_fusion persist_layer_norm no_persist_layer_norm
memory_efficient_layer_norm gradient_accumulation_fusion no_gradient_accumulation_fusion
async_tensor_model_parallel_allreduce no_async_tensor_model_parallel_allreduce transformer_impl attention_backend
cross_entropy_loss_fusion cross_entropy_fusion_impl enable_cuda_graph external_cuda_graph cuda_graph_scope
cuda_graph_impl te_rng_tracker manual_gc manual_gc_interval manual_gc_eval no_manual_gc_eval
empty_unused_memory_level clone_scatter_output_in_embedding no_clone_scatter_output_in_embedding
distribute_saved_activations nccl_communicator_config_path nccl_ub use_sharp high_priority_stream_groups
deallocate_pipeline_outputs overlap_cpu_optimizer_d2h_h2d use_torch_optimizer_for_cpu_offload
optimizer_offload_fraction cp_comm_type hierarchical_context_parallel_sizes use_megatron_fsdp use_custom_fsdp
disable_bf16_reduced_precision_matmul enable_autocast autocast_dtype params_dtype pipeline_dtype grad_scale_func
finalize_model_grads_func no_sync_func grad_sync_func param_sync_func variable_seq_lengths lazy_mpu_init
num_microbatches_with_partial_activation_checkpoints enable_experimental"""

_SCALE = """initial_loss_scale min_loss_scale loss_scale_window hysteresis fp16_lm_cross_entropy
use_precision_aware_optimizer main_grads_dtype main_params_dtype exp_avg_dtype exp_avg_sq_dtype grad_reduce_in_bf16
fp8 fp8_format fp8_recipe fp8_margin fp8_interval fp8_amax_history_len fp8_amax_compute_algo fp8_wgrad fp8_param_gather
no_fp8_wgrad first_last_layers_bf16 num_layers_at_start_in_bf16 num_layers_at_end_in_bf16 fp4 fp4_format"""

_PIPELINE = """num_layers_per_virtual_pipeline_stage virtual_pipeline_model_parallel_size
num_virtual_stages_per_pipeline_rank microbatch_group_size_per_virtual_pipeline_stage
pipeline_model_parallel_split_rank pipeline_model_parallel_layout decoder_first_pipeline_num_layers
decoder_last_pipeline_num_layers account_for_embedding_in_pipeline_split account_for_loss_in_pipeline_split
standalone_embedding_stage encoder_tensor_model_parallel_size encoder_pipeline_model_parallel_size
defer_embedding_wgrad_compute wgrad_deferral_limit"""

_LAUNCH = """nproc_per_node nnodes node_rank master_addr master_port rdzv_backend rdzv_endpoint rdzv_id rdzv_conf
max_restarts monitor_interval standalone local_addr log_dir redirects tee role start_method module no_python run_path
distributed_timeout_minutes use_tp_pp_dp_mapping num_distributed_optimizer_instances"""

_RECOMPUTE = """recompute_method recompute_num_layers recompute_modules checkpoint_activations cpu_offloading
cpu_offloading_num_layers _cpu_offloading_context cpu_offloading_weights cpu_offloading_activations"""

_RATES = """decoupled_lr decoupled_min_lr head_lr_mult muon_momentum muon_scale_mode muon_num_ns_steps
muon_extra_scale_factor muon_tp_mode muon_split_qkv muon_use_nesterov no_muon_split_qkv warmup rampup_batch_size
batch_size model_parallel_size decrease_batch_size_if_needed"""

_RUN = """exit_interval exit_duration_in_mins profile profile_step_start profile_step_end profile_ranks
use_pytorch_profiler record_memory_history memory_snapshot_path check_weight_hash_across_dp_replicas_interval
no_check_for_nan_in_loss_and_grad rerun_mode error_injection_rate error_injection_type result_rejected_tracker_filename
test_mode yaml_cfg config_logger_dir"""

_EVAL = """eval_iters eval_interval full_validation multiple_validation_sets retriever_report_topk_accuracies
retriever_score_scaling indexer_batch_size indexer_log_interval"""

_NAMES: Mapping[str, tuple[str, str]] = {
    "model": (
        _MODEL,
        "the model is the recipe's: stages.tune.decoder names one, or is `{kind: new, d: ..., depth: ..., heads: ...}`",
    ),
    "experts": (_EXPERTS, "the model is the recipe's; `plait list decoders` shows which there are"),
    "data": (_DATA, "data, tokenizer and length of rows are the recipe's: data.source, stages.tune.decoder and .row"),
    "logs": (
        _LOGS,
        "metrics.jsonl of the run folder holds it; `trackers` in a recipe sends it elsewhere",
    ),
    "files": (_FILES, "the run folder holds checkpoints; `plait resume` goes on, in any number of processes"),
    "speed": (_SPEEDS, _SPEED),
    "formats": (
        _SCALE,
        "what trains is float32, and so are gradients and moments; trainer.optimizer: adamw-8bit saves",
    ),
    "pipeline": (_PIPELINE, "layers are dealt evenly, one part a process: trainer.parallel.pipeline and .schedule"),
    "launch": (_LAUNCH, "a recipe has no number of processes: torchrun has it (docs/cluster.md)"),
    "recompute": (_RECOMPUTE, "trainer.recompute is of all blocks: none, selective or full"),
    "rates": (_RATES, "no setting is for it; see `plait config explain` of trainer.optimizer and trainer.schedule"),
    "run": (_RUN, "a run ends with its last step, or when it is told to; the time limit is the cluster's"),
    "evaluation": (_EVAL, "the stage evaluate scores, after training"),
}

GROUPS: Mapping[str, frozenset[str]] = {group: frozenset(names.split()) for group, (names, _) in _NAMES.items()}
"""Group -> arguments for which a recipe has no setting."""

WHY: Mapping[str, str] = {group: why for group, (_, why) in _NAMES.items()}
"""Group -> why, and what to do."""
