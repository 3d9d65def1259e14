"""Megatron-LM's arguments as a recipe: from scripts, files of arguments and YAML; every one has one row."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from plait.core.errors import ConfigError
from plait.core.yamltext import write_text
from plait.recipes.foreign.fragment import Imported, import_config
from plait.recipes.foreign.megatron_arguments import GROUPS, LISTS, MAPPED, SAME
from plait.recipes.recipe import load_recipe

pytestmark = pytest.mark.light

SCRIPT = """#!/bin/bash
# --lr 7 in a comment is none
export CUDA_DEVICE_MAX_CONNECTIONS=1
GPUS_PER_NODE=8
WORLD_SIZE=$(($GPUS_PER_NODE * 2))
TP=2
DISTRIBUTED_ARGS=(
    --nproc_per_node $GPUS_PER_NODE
    --nnodes "2"
)
TRAINING_ARGS=(
    --micro-batch-size 1   # of one replica
    --global-batch-size 64
    --train-iters 500
    --lr 6.0e-4
    --min-lr 6.0e-5
    --lr-decay-style cosine
    --lr-warmup-fraction .01
    --weight-decay 0.1 --adam-beta1 0.9 --adam-beta2 0.95
    --clip-grad 0.5
    --bf16
    --use-distributed-optimizer
)
MORE="--tensor-model-parallel-size $TP \\
    --recompute-granularity full"
torchrun "${DISTRIBUTED_ARGS[@]}" pretrain_gpt.py \\
    "${TRAINING_ARGS[@]}" $MORE --data-path 0.5 $1 0.5 b --save=$OUT 'a script' && echo done
"""


def imported(folder: Path, text: str, *, name: str = "run.sh", **options: Any) -> Imported:
    path = folder / name
    path.write_text(text)
    return import_config(path, folder=folder, **options)


def stage(folder: Path, found: Imported, name: str = "tune") -> Any:
    path = folder / "out.yaml"
    path.write_text(found.text)
    return load_recipe(str(path)).spec.stages[name]


def rows(found: Imported) -> dict[str, tuple[str, str]]:
    return {row.leaf.key: (row.outcome, row.why) for row in found.rows}


@pytest.mark.row("S4-69")
def test_a_script_is_the_stage_that_it_says(tmp_path: Path) -> None:
    found = imported(tmp_path, SCRIPT, processes=16)
    tune = stage(tmp_path, found)
    trainer = tune.trainer
    assert found.tool == "megatron"
    assert found.of("unknown") == []
    assert (tune.batch_size, trainer.pieces(tune.batch_size), tune.dtype) == (64, 64 // (16 // 2), "bfloat16")
    assert (tune.adapt.lr, tune.adapt.steps, trainer.clip_norm) == (6e-4, 500, 0.5)
    assert (trainer.parallel.zero, trainer.parallel.tensor, trainer.recompute) == (1, 2, "full")
    assert (trainer.optimizer.betas, trainer.optimizer.weight_decay) == ((0.9, 0.95), 0.1)
    rates = [trainer.schedule.factor(step, 500) for step in (0, 5, 500)]
    assert rates == [0, 1, pytest.approx(0.1)]


def test_each_argument_of_a_script_says_its_line(tmp_path: Path) -> None:
    found = imported(tmp_path, SCRIPT)
    lines = {row.leaf.key: int(row.leaf.where.rpartition(":")[2]) for row in found.rows if not row.implied}
    text = SCRIPT.splitlines()
    assert all(key in text[line - 1] for key, line in lines.items())
    assert len(lines) == 19


def test_what_only_a_shell_knows_is_named_and_may_be_given(tmp_path: Path) -> None:
    text = "python pretrain_gpt.py --tensor-model-parallel-size $TP --lr $(cat rate) --train-iters ${N:-30}\n"
    found = imported(tmp_path, text)
    outcome, why = rows(found)["--tensor-model-parallel-size"]
    assert outcome == "not mapped"
    assert "TP is given nowhere" in why
    assert "--set NAME=VALUE" in why
    assert rows(found)["--lr"][0] == "not mapped"
    assert stage(tmp_path, found).adapt.steps == 30
    assert stage(tmp_path, imported(tmp_path, text, variables={"TP": "4"})).trainer.parallel.tensor == 4


def test_a_variable_that_is_given_twice_is_not_guessed(tmp_path: Path) -> None:
    text = "if [ $1 = big ]; then\nSTEPS=10\nelse\nSTEPS=20\nfi\npython train.py --train-iters $STEPS\n"
    outcome, why = rows(imported(tmp_path, text))["--train-iters"]
    assert outcome == "not mapped"
    assert "STEPS is given on lines 2, 4" in why


def test_of_an_argument_given_twice_the_last_counts_and_both_are_named(tmp_path: Path) -> None:
    found = imported(tmp_path, "--train-iters 10\n--train-iters 20\n", name="args.txt")
    assert [(row.leaf.value, row.outcome) for row in found.rows] == [("10", "not mapped"), ("20", "mapped")]
    assert stage(tmp_path, found).adapt.steps == 20


def test_defaults_that_differ_are_written_out(tmp_path: Path) -> None:
    """Megatron decays by 0.01 and falls in a straight line where nothing is said."""
    found = imported(tmp_path, "--lr 1e-4", name="args.txt")
    implied = {row.leaf.key: row.settings for row in found.rows if row.implied}
    assert implied["--lr-decay-style"] == {"trainer.schedule.kind": "linear"}
    tune = stage(tmp_path, found)
    assert (tune.trainer.schedule.kind, tune.trainer.optimizer.weight_decay) == ("linear", 0.01)


def test_samples_become_steps(tmp_path: Path) -> None:
    text = "--global-batch-size 100 --train-samples 1000 --lr-warmup-samples 250 --lr 1 --lr-decay-samples 1000"
    found = imported(tmp_path, text, name="args.txt")
    tune = stage(tmp_path, found)
    assert (tune.adapt.steps, tune.trainer.schedule.warmup) == (10, 3)
    assert rows(found)["--lr-decay-samples"][0] == "as it is"
    without = imported(tmp_path, "--train-samples 1000", name="args.txt")
    assert "global_batch_size" in rows(without)["--train-samples"][1]


def test_the_inverse_root_is_megatrons(tmp_path: Path) -> None:
    """``lr * sqrt(warmup) / sqrt(step)`` after the rise."""
    text = "--lr 1 --lr-decay-style inverse-square-root --lr-warmup-iters 100 --train-iters 900"
    schedule = stage(tmp_path, imported(tmp_path, text, name="args.txt")).trainer.schedule
    assert [schedule.factor(step, 900) for step in (100, 400, 900)] == pytest.approx([1, 1 / 2, 1 / 3])


def test_pieces_of_rows_come_with_divided_matrices(tmp_path: Path) -> None:
    found = imported(tmp_path, "--sequence-parallel --tensor-model-parallel-size 2", name="args.txt")
    assert stage(tmp_path, found).trainer.parallel.sequence
    alone = imported(tmp_path, "--sequence-parallel --lr 1", name="args.txt")
    assert rows(alone)["--sequence-parallel"][0] == "as it is"
    both = "--sequence-parallel --tensor-model-parallel-size 2 --context-parallel-size 2"
    assert rows(imported(tmp_path, both, name="args.txt"))["--sequence-parallel"][0] == "not mapped"
    parent = tmp_path / "parent.yaml"
    parent.write_text("extends: quickstart\nstages: {tune: {trainer: {parallel: {tensor: 2}}}}\n")
    onto = imported(tmp_path, "--sequence-parallel --lr 1", name="args.txt", extends=str(parent))
    assert stage(tmp_path, onto).trainer.parallel.sequence


def test_yaml_with_groups_is_read(tmp_path: Path) -> None:
    config = {
        "ENV_VARS": {"NCCL_NVLS_ENABLE": "0"},
        "model_parallel": {"tensor_model_parallel_size": 1, "bf16": True, "sequence_parallel": False},
        "MODEL_ARGS": {"--train-iters": 40, "--lr": 1e-3, "--weight-decay": None},
        "load": "${LOAD_PATH}",
    }
    found = imported(tmp_path, write_text(config), name="gpt.yaml")
    outcomes = {key: outcome for key, (outcome, _) in rows(found).items() if not key.startswith("--")}
    assert outcomes == {
        "ENV_VARS.NCCL_NVLS_ENABLE": "not mapped",
        "model_parallel.tensor_model_parallel_size": "as it is",
        "model_parallel.bf16": "mapped",
        "model_parallel.sequence_parallel": "as it is",
        "MODEL_ARGS.--train-iters": "mapped",
        "MODEL_ARGS.--lr": "mapped",
        "MODEL_ARGS.--weight-decay": "as it is",
        "load": "not mapped",
    }
    assert stage(tmp_path, found).adapt.steps == 40


# --- every argument once -------------------------------------------------------------------------------------------

NUMBERS = st.sampled_from(["1", "2", "4"])
VALUES: dict[str, st.SearchStrategy[str | None]] = {
    "lr": st.sampled_from(["1e-4", "0.001"]),
    "global_batch_size": st.just("4096"),  # a multiple of all others
    "min_lr": st.sampled_from(["0", "1e-5"]),
    "lr_decay_style": st.sampled_from(["constant", "linear", "cosine", "inverse-square-root", "WSD"]),
    "lr_wsd_decay_style": st.sampled_from(["exponential", "linear", "cosine", "minus_sqrt"]),
    "lr_warmup_fraction": st.just(".01"),
    "weight_decay_incr_style": st.sampled_from(["constant", "linear"]),
    "optimizer": st.sampled_from(["adam", "sgd", "muon"]),
    "recompute_granularity": st.sampled_from(["full", "selective"]),
    "data_parallel_sharding_strategy": st.sampled_from(["no_shard", "optim", "optim_grads", "optim_grads_params"]),
    "adam_beta1": st.just("0.9"),
    "adam_beta2": st.just("0.95"),
    "sgd_momentum": st.just("0.8"),
    **dict.fromkeys(
        (
            *("bf16", "fp16", "use_distributed_optimizer", "use_torch_fsdp2"),
            *("optimizer_cpu_offload", "async_save", "sequence_parallel"),
        ),
        st.none(),
    ),
    "recompute_activations": st.none(),
}
NAMES = sorted(
    name
    for name in {*MAPPED, *SAME, *(name for names in GROUPS.values() for name in names)}
    if not name.startswith("_")  # of YAML alone
)


@pytest.mark.row("S4-69")
@settings(max_examples=25, deadline=None, suppress_health_check=list(HealthCheck))
@given(data=st.data(), name=st.sampled_from(["tune", "pretrain", "align"]))
def test_every_argument_has_one_row_and_the_recipe_loads(
    data: st.DataObject, name: str, tmp_path_factory: pytest.TempPathFactory
) -> None:
    chosen = data.draw(st.lists(st.sampled_from(sorted(MAPPED)), unique=True, max_size=20))
    chosen += data.draw(st.lists(st.sampled_from(NAMES), unique_by=(lambda one: one), max_size=20))
    chosen = list(dict.fromkeys(chosen)) or ["lr"]
    words: list[str] = []
    for one in chosen:
        value = data.draw(VALUES.get(one, NUMBERS))
        words.append(f"--{one.replace('_', '-')}" + (f" {value}" if value else "") + (" 7" if one in LISTS else ""))
    folder = tmp_path_factory.mktemp("megatron")
    found = imported(folder, "\n".join(words), name="args.txt", stage=name, processes=64)
    given_rows = [row for row in found.rows if not row.implied]
    assert sorted(row.leaf.name for row in given_rows) == sorted(one.replace("-", "_") for one in chosen)
    assert found.of("unknown") == []
    assert all(row.why for row in found.rows if row.outcome != "mapped")
    stage(folder, found, name if found.settings else "tune")


def test_no_name_is_in_two_groups() -> None:
    seen: dict[str, str] = {}
    for group, names in {"mapped": MAPPED, "same": frozenset(SAME), **GROUPS}.items():
        for name in names:
            assert name not in seen, (name, group, seen[name])
            seen[name] = group


# --- faults --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "cause", "line"),
    [
        ("a\n--lr fast", "expected a number", ":2"),
        ("--lr", "expected a number", ":1"),
        ("\n--micro-batch-size 0", "1 or more", ":2"),
        ("--lr-decay-style triangle", "constant, linear, cosine", ":1"),
        ("--lr 1e-5 \\\n --min-lr 1e-4", "at most --lr", ":2"),
        ("--optimizer lamb", "adam", ":1"),
        ("echo 'a\n--lr 1", "quote ' is not closed", ":1"),
        ("A=$(b\n--lr 1", "is not closed", ":1"),
        ("echo hello", "no argument", "args.txt"),
        ("--no-such 1 --nor-such", "none of its keys", "args.txt"),
        ("--lr-warmup-fraction 2", "below 1", ":1"),
        ("--data-parallel-sharding-strategy all", "no_shard", ":1"),
    ],
)
def test_faults_name_the_line(tmp_path: Path, text: str, cause: str, line: str) -> None:
    with pytest.raises(ConfigError, match=cause) as told:
        imported(tmp_path, text, name="args.txt")
    assert told.value.place.endswith(line)


def test_processes_that_do_not_divide_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="6 processes are no multiple of 4"):
        imported(tmp_path, "--tensor-model-parallel-size 4 --lr 1", processes=6)


def test_bytes_that_are_no_text_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "args.txt"
    path.write_bytes(b"--lr 1\n--save \xff\n")
    with pytest.raises(ConfigError, match="not UTF-8") as told:
        import_config(path)
    assert told.value.place.endswith(":2")
    with pytest.raises(ConfigError, match="cannot read it"):
        import_config(tmp_path / "lost")
