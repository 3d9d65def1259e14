"""DeepSpeed's JSON as a recipe: every key has one row, and what comes out loads."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from plait.core.errors import ConfigError
from plait.core.yamltext import leaves
from plait.recipes.foreign.fragment import Imported, import_config
from plait.recipes.recipe import load_recipe

pytestmark = pytest.mark.light

WHOLE: dict[str, Any] = {
    "train_batch_size": 64,
    "train_micro_batch_size_per_gpu": 4,
    "gradient_accumulation_steps": 4,
    "gradient_clipping": 0.5,
    "optimizer": {"type": "AdamW", "params": {"lr": 2e-4, "betas": [0.9, 0.95], "eps": 1e-7, "weight_decay": 0.1}},
    "scheduler": {
        "type": "WarmupDecayLR",
        "params": {"warmup_min_lr": 0, "warmup_max_lr": 2e-4, "warmup_num_steps": 100, "total_num_steps": 2000},
    },
    "bf16": {"enabled": True},
    "zero_optimization": {"stage": 3, "offload_optimizer": {"device": "cpu"}, "overlap_comm": True},
}


def imported(folder: Path, config: Any, **options: Any) -> Imported:
    path = folder / "ds.json"
    path.write_text(config if isinstance(config, str) else json.dumps(config, indent=1))
    return import_config(path, folder=folder, **options)


def stage(folder: Path, found: Imported, name: str = "tune") -> Any:
    """The stage of the recipe that was written."""
    path = folder / "out.yaml"
    path.write_text(found.text)
    return load_recipe(str(path)).spec.stages[name]


def rows(found: Imported) -> dict[str, tuple[str, str]]:
    return {row.leaf.key: (row.outcome, row.why) for row in found.rows}


@pytest.mark.row("S4-69")
def test_a_whole_configuration_is_the_stage_that_it_says(tmp_path: Path) -> None:
    found = imported(tmp_path, WHOLE)
    tune = stage(tmp_path, found)
    trainer = tune.trainer
    assert found.tool == "deepspeed"
    assert (tune.batch_size, trainer.pieces(tune.batch_size), tune.dtype) == (64, 4, "bfloat16")
    assert (tune.adapt.lr, tune.adapt.steps, trainer.clip_norm) == (2e-4, 2000, 0.5)
    assert (trainer.parallel.zero, trainer.parallel.offload) == (3, True)
    assert (trainer.optimizer.kind, trainer.optimizer.betas, trainer.optimizer.eps) == ("adamw", (0.9, 0.95), 1e-7)
    assert trainer.optimizer.weight_decay == 0.1
    assert [trainer.schedule.factor(step, 2000) for step in (0, 50, 100, 1050, 2000)] == [0, 0.5, 1, 0.5, 0]


def test_what_is_not_mentioned_stays_as_the_parent_has_it(tmp_path: Path) -> None:
    parent = load_recipe("standard").spec.stages["tune"].model_dump()
    found = stage(tmp_path, imported(tmp_path, {"gradient_clipping": 0.25})).model_dump()
    parent["trainer"]["clip_norm"] = 0.25
    assert found == parent


def test_every_value_says_its_line(tmp_path: Path) -> None:
    found = imported(tmp_path, '{\n\t"train_batch_size": 64,\n\t"zero_optimization":\n\t\t{"stage": 2}\n}')
    assert {row.leaf.key: row.leaf.where.rpartition(":")[2] for row in found.rows} == {
        "train_batch_size": "2",
        "zero_optimization.stage": "4",
    }
    assert "# train_batch_size, ds.json:2" in found.text


# --- every key once ------------------------------------------------------------------------------------------------

AUTO = st.just("auto")
FLAG = st.booleans()
SIZE = st.integers(1, 512)
RATE = st.floats(1e-6, 1e-2)
BIG = st.sampled_from([5e8, 1e9, 2e8, 500_000_000])
SECTION = st.fixed_dictionaries({}, optional={"enabled": FLAG, "project": st.just("x"), "profile_step": SIZE})


def _offload() -> st.SearchStrategy[Any]:
    keys = {
        "device": st.sampled_from(["cpu", "nvme", "none"]),
        "nvme_path": st.just("/n"),
        "pin_memory": FLAG,
        "buffer_count": SIZE,
        "buffer_size": BIG,
        "max_in_cpu": BIG,
        "fast_init": FLAG,
    }
    return st.fixed_dictionaries({}, optional=keys) | st.none()


PARAMETERS = {
    "lr": RATE | AUTO,
    "betas": st.sampled_from([[0.9, 0.95], [0.8, 0.999], "auto"]),
    "eps": st.just(1e-7) | AUTO,
    "weight_decay": st.sampled_from([0, 0.1, "auto"]),
    "momentum": st.sampled_from([0.0, 0.9]),
    "nesterov": FLAG,
    "adam_w_mode": FLAG,
    "torch_adam": FLAG,
    "bias_correction": FLAG,
    "amsgrad": FLAG,
    "freeze_step": SIZE,
    "cuda_aware": FLAG,
    "comm_backend_name": st.just("nccl"),
    "max_coeff": st.just(0.3),
}
SCHEDULE = {
    "warmup_min_lr": st.sampled_from([0, 1e-6, "auto"]),
    "warmup_max_lr": RATE | AUTO,
    "warmup_num_steps": st.integers(0, 1000) | AUTO,
    "warmup_min_ratio": st.sampled_from([0, 0.1]),
    "warmup_type": st.sampled_from(["log", "linear"]),
    "total_num_steps": st.integers(1, 5000) | AUTO,
    "cos_min_ratio": st.sampled_from([0.0, 1e-4, 0.1]),
    "last_batch_iteration": st.just(-1),
    "cycle_min_lr": RATE,
}
ZERO = {
    "stage": st.integers(0, 3),
    "allgather_partitions": FLAG,
    "allgather_bucket_size": BIG,
    "overlap_comm": FLAG,
    "reduce_scatter": FLAG,
    "reduce_bucket_size": BIG | AUTO,
    "contiguous_gradients": FLAG,
    "grad_hooks": FLAG,
    "round_robin_gradients": FLAG,
    "offload_param": _offload(),
    "offload_optimizer": _offload(),
    "cpu_offload": FLAG,
    "stage3_max_live_parameters": BIG,
    "stage3_max_reuse_distance": BIG,
    "stage3_prefetch_bucket_size": BIG | AUTO,
    "stage3_param_persistence_threshold": BIG | AUTO,
    "stage3_gather_16bit_weights_on_model_save": FLAG,
    "sub_group_size": BIG,
    "elastic_checkpoint": FLAG,
    "ignore_unused_parameters": FLAG,
    "zero_hpz_partition_size": st.sampled_from([1, 8]),
    "zero_quantized_weights": FLAG,
    "zero_quantized_gradients": FLAG,
}
FP16 = {
    "enabled": FLAG | AUTO,
    "auto_cast": FLAG,
    "loss_scale": st.sampled_from([0, 0.0, 128]),
    "initial_scale_power": st.sampled_from([16, 32]),
    "loss_scale_window": SIZE,
    "hysteresis": SIZE,
    "consecutive_hysteresis": FLAG,
    "min_loss_scale": st.just(1),
}
KEYS: dict[str, st.SearchStrategy[Any]] = {
    "train_batch_size": SIZE | AUTO,
    "train_micro_batch_size_per_gpu": SIZE | AUTO,
    "gradient_accumulation_steps": SIZE | AUTO,
    "gradient_clipping": st.sampled_from([0, 0.0, 1.0, 0.3, "auto"]),
    "optimizer": st.fixed_dictionaries(
        {},
        optional={
            "type": st.sampled_from(
                ["Adam", "AdamW", "OneBitAdam", "Lamb", "OneBitLamb", "ZeroOneAdam", "SGD", "Lion", "Muon", "Adafactor"]
            ),
            "params": st.fixed_dictionaries({}, optional=PARAMETERS),
        },
    ),
    "scheduler": st.fixed_dictionaries(
        {},
        optional={
            "type": st.sampled_from(["WarmupLR", "WarmupDecayLR", "WarmupCosineLR", "OneCycle", "LRRangeTest"]),
            "params": st.fixed_dictionaries({}, optional=SCHEDULE),
        },
    ),
    "communication_data_type": st.sampled_from([None, "fp16", "fp32"]),
    "prescale_gradients": FLAG,
    "gradient_predivide_factor": st.sampled_from([1.0, 2.0]),
    "sparse_gradients": FLAG,
    "fp16": st.fixed_dictionaries({}, optional=FP16),
    "bf16": st.fixed_dictionaries({}, optional={"enabled": FLAG | AUTO}),
    "amp": st.fixed_dictionaries({}, optional={"enabled": FLAG, "opt_level": st.just("O1")}),
    "zero_optimization": st.fixed_dictionaries({}, optional=ZERO),
    "steps_per_print": SIZE,
    "wall_clock_breakdown": FLAG,
    "dump_state": FLAG,
    "autotuning": SECTION,
    "flops_profiler": SECTION,
    "activation_checkpointing": st.fixed_dictionaries(
        {},
        optional={
            "partition_activations": FLAG,
            "cpu_checkpointing": FLAG,
            "contiguous_memory_optimization": FLAG,
            "number_checkpoints": st.sampled_from([None, 4]),
            "synchronize_checkpoint_boundary": FLAG,
            "profile": FLAG,
        },
    ),
    "sparse_attention": st.just({"mode": "fixed", "block": 16, "attention": "bidirectional"}),
    "aio": st.just({"block_size": 1048576, "queue_depth": 8}),
    "data_efficiency": st.just({"enabled": True, "seed": 1, "data_routing": {"enabled": False}}),
    "curriculum_learning": st.just({"enabled": True, "curriculum_type": "seqlen"}),
    "tensorboard": SECTION,
    "wandb": SECTION,
    "csv_monitor": SECTION,
    "elasticity": st.just({"enabled": True, "micro_batch_sizes": [2, 4, 6], "min_gpus": 1}),
    "comms_logger": SECTION,
    "compression_training": st.just({"layer_reduction": {"enabled": True, "teacher_layer": [2, 4]}}),
    "checkpoint": st.just(
        {"tag_validation": "Warn", "load_universal": False, "parallel_write": {"pipeline_stage": True}}
    ),
    "data_types": st.fixed_dictionaries({}, optional={"grad_accum_dtype": st.sampled_from([None, "fp32", "bf16"])}),
    "tensor_parallel": st.fixed_dictionaries({}, optional={"autotp_size": st.sampled_from([0, 1, 2])}),
    "sequence_parallel_size": st.sampled_from([1, 2]),
    "no_such_key": st.just(1),
}


@pytest.mark.row("S4-69")
@settings(max_examples=25, deadline=None, suppress_health_check=list(HealthCheck))
@given(
    config=st.fixed_dictionaries({}, optional=KEYS).filter(lambda config: set(config) - {"no_such_key"}),
    name=st.sampled_from(["tune", "pretrain", "align"]),
)
def test_every_key_has_one_row_and_the_recipe_loads(
    config: dict[str, Any], name: str, tmp_path_factory: pytest.TempPathFactory
) -> None:
    folder = tmp_path_factory.mktemp("ds")
    found = imported(folder, config, stage=name)
    expected = sorted(".".join(keys) for keys, _ in leaves(config))
    assert sorted(row.leaf.key for row in found.rows) == expected
    assert all(row.why for row in found.rows if row.outcome != "mapped")
    unknown = {row.leaf.key for row in found.of("unknown")}
    assert unknown <= {"no_such_key"}, unknown
    made = stage(folder, found, name).model_dump()
    for row in found.of("mapped"):
        for path, value in row.settings.items():
            at: Any = made
            for key in path.split("."):
                at = at[key]
            assert (list(at) if isinstance(at, tuple) else at) == value, (row.leaf.key, path)


# --- single rules --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("config", "name", "expected"),
    [
        ({"gradient_accumulation_steps": 4}, "tune", (24, 4)),
        ({"train_batch_size": 32, "gradient_accumulation_steps": 1}, "tune", (32, 1)),
        ({"train_batch_size": 30, "gradient_accumulation_steps": 4}, "tune", (30, 4)),
        ({"train_batch_size": 64, "train_micro_batch_size_per_gpu": 8}, "pretrain", (64, 8)),
    ],
)
def test_sizes_of_batches(tmp_path: Path, config: dict[str, Any], name: str, expected: tuple[int, int]) -> None:
    found = stage(tmp_path, imported(tmp_path, config, stage=name), name)
    assert (found.batch_size, found.trainer.pieces(found.batch_size)) == expected


@pytest.mark.parametrize("given_keys", [("all", "one"), ("all", "passes"), ("one", "passes"), ("all", "one", "passes")])
@pytest.mark.parametrize("name", ["tune", "pretrain"])
def test_two_sizes_and_the_processes_give_the_third(tmp_path: Path, given_keys: tuple[str, ...], name: str) -> None:
    """8 processes, 4 samples at once, 3 passes: 96 samples an update."""
    names = {
        "all": "train_batch_size",
        "one": "train_micro_batch_size_per_gpu",
        "passes": "gradient_accumulation_steps",
    }
    sizes = {"all": 96, "one": 4, "passes": 3}
    found = imported(tmp_path, {names[key]: sizes[key] for key in given_keys}, stage=name, processes=8)
    made = stage(tmp_path, found, name)
    assert (made.batch_size, made.trainer.micro_batch) == (96, 4 if name == "pretrain" else 32)


def test_without_the_processes_what_follows_from_them_is_named(tmp_path: Path) -> None:
    found = imported(tmp_path, {"train_micro_batch_size_per_gpu": 4, "gradient_accumulation_steps": 3})
    assert {outcome for outcome, _ in rows(found).values()} == {"not mapped"}
    assert all("--processes" in why for _, why in rows(found).values())


def test_sizes_that_contradict_each_other_are_refused_with_the_line(tmp_path: Path) -> None:
    config = {"train_batch_size": 64, "train_micro_batch_size_per_gpu": 4, "gradient_accumulation_steps": 3}
    with pytest.raises(ConfigError, match=r"is 64, but .* make 96") as told:
        imported(tmp_path, config, processes=8)
    assert told.value.place.endswith("ds.json:2")


def test_auto_leaves_the_recipes_own(tmp_path: Path) -> None:
    found = imported(tmp_path, {"train_batch_size": "auto", "optimizer": {"params": {"lr": "auto"}}})
    assert {outcome for outcome, _ in rows(found).values()} == {"as it is"}
    assert found.settings == {}
    assert stage(tmp_path, found) == load_recipe("standard").spec.stages["tune"]


def test_what_does_not_go_together_is_not_mapped_in_the_recipes_words(tmp_path: Path) -> None:
    config = {"optimizer": {"type": "Muon", "params": {"lr": 0.01}}, "zero_optimization": {"stage": 2}}
    found = imported(tmp_path, config)
    assert rows(found)["zero_optimization.stage"][0] == "mapped"
    outcome, why = rows(found)["optimizer.type"]
    assert outcome == "not mapped"
    assert "cannot work on pieces of weights" in why
    assert stage(tmp_path, found).trainer.parallel.zero == 2


def test_two_keys_that_say_another_of_one_thing_are_both_named(tmp_path: Path) -> None:
    found = imported(tmp_path, {"fp16": {"enabled": True}, "bf16": {"enabled": True}})
    outcomes = {key: outcome for key, (outcome, _) in rows(found).items()}
    assert sorted(outcomes.values()) == ["mapped", "not mapped"]


def test_the_peak_is_the_schedules(tmp_path: Path) -> None:
    config = {
        "optimizer": {"type": "Adam", "params": {"lr": 1e-3}},
        "scheduler": {"type": "WarmupCosineLR", "params": {"warmup_max_lr": 2e-3, "total_num_steps": 400}},
    }
    found = imported(tmp_path, config)
    tune = stage(tmp_path, found)
    assert (tune.adapt.lr, tune.trainer.schedule.kind, tune.trainer.schedule.warmup) == (2e-3, "cosine", 1000)
    assert math.isclose(tune.trainer.schedule.floor, 1e-4)
    assert rows(found)["optimizer.params.lr"][0] == "not mapped"


def test_decay_within_the_gradient_is_another_optimizer(tmp_path: Path) -> None:
    params = {"lr": 1e-3, "adam_w_mode": False, "weight_decay": 0.1}
    found = imported(tmp_path, {"optimizer": {"type": "Adam", "params": params}})
    assert found.settings == {}
    found = imported(tmp_path, {"optimizer": {"type": "Adam", "params": params | {"weight_decay": 0}}})
    assert stage(tmp_path, found).trainer.optimizer.kind == "adamw"


def test_a_near_miss_is_unknown_and_the_right_name_is_said(tmp_path: Path) -> None:
    found = imported(tmp_path, {"gradient_clipping": 1, "zero_optimization": {"overlap_com": True}})
    outcome, why = rows(found)["zero_optimization.overlap_com"]
    assert outcome == "unknown"
    assert "zero_optimization.overlap_comm" in why


@pytest.mark.parametrize(
    ("text", "cause", "line"),
    [
        ('{\n"train_batch_size": 3,,\n}', "not valid JSON", ":2"),
        ('{"a": 1,\n"a": 2}', "given twice", ":2"),
        ('{\n"train_batch_size": "many"}', "expected a number", ":2"),
        ('{\n"train_batch_size": 2.5}', "expected a whole number", ":2"),
        ('{\n"train_batch_size": 0}', "1 or more", ":2"),
        ('{"zero_optimization": {\n"stage": 4}}', "0, 1, 2 or 3", ":2"),
        ('{"zero_optimization": {\n"stage": true}}', "expected a number", ":2"),
        ('{"zero_optimization": true}', "expected a mapping", ":1"),
        ('{"optimizer": {"params": {\n"betas": [0.9]}}}', "two numbers", ":2"),
        ('{"hidden_size": 3}', "none of its keys is one of DeepSpeed", "ds.json"),
        ('{"gradient_clipping": -1}', "0 or more", ":1"),
        ('{"fp16": {"enabled": "maybe"}}', "true or false", ":1"),
    ],
)
def test_faults_name_the_line(tmp_path: Path, text: str, cause: str, line: str) -> None:
    with pytest.raises(ConfigError, match=cause) as told:
        imported(tmp_path, text, tool="deepspeed")
    assert told.value.place.endswith(line)


def test_an_array_is_no_configuration(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="expected a JSON object"):
        imported(tmp_path, "[1]", tool="deepspeed")


def test_a_stage_that_trains_nothing_is_refused_with_those_that_do(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="trains nothing") as told:
        imported(tmp_path, WHOLE, stage="evaluate")
    assert "tune" in told.value.remedy
    with pytest.raises(ConfigError, match="no stage 'tuned'"):
        imported(tmp_path, WHOLE, stage="tuned")


def test_a_parent_of_ones_own_is_found_from_the_folder_of_the_recipe(tmp_path: Path) -> None:
    (tmp_path / "below").mkdir()
    (tmp_path / "mine.yaml").write_text("extends: standard\nname: mine\nstages: {tune: {batch_size: 7}}\n")
    path = tmp_path / "ds.json"
    path.write_text('{"gradient_clipping": 0.5}')
    found = import_config(path, extends=str(tmp_path / "mine.yaml"), folder=tmp_path / "below")
    (tmp_path / "below" / "out.yaml").write_text(found.text)
    tune: Any = load_recipe(str(tmp_path / "below" / "out.yaml")).spec.stages["tune"]
    assert (tune.batch_size, tune.trainer.clip_norm) == (7, 0.5)
