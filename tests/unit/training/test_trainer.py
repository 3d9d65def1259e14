"""What every training stage lets a recipe set, from its dotted path down to the loop's settings."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from plait.core.device import Compute
from plait.core.errors import ConfigError
from plait.core.estimate import Machine
from plait.core.spec import Resolved
from plait.recipes.recipe import Recipe, load_recipe
from plait.stages.align import Align
from plait.stages.pretrain import Pretrain
from plait.stages.tune import Tune
from plait.training.optim import SGD, AdamW, Rates
from plait.training.roles import Roles
from plait.training.schedule import Cosine, Linear
from plait.training.settings import Settings
from plait.training.trainer import Average, Trainer

CPU = Compute(device="cpu", dtype="float32", threads=1, why=())


@pytest.fixture
def load(tmp_path: Path):
    path = tmp_path / "mine.yaml"

    def loaded(*overrides: str, stages: str = "{pretrain: {}, tune: {}, align: {}}") -> Resolved[Recipe]:
        path.write_text(f"name: mine\nstages: {stages}\n")
        return load_recipe(str(path), overrides)

    return loaded


def trainer(resolved: Resolved[Recipe], stage: str) -> Trainer:
    found: Any = resolved.spec.stages[stage]
    return found.trainer


def test_the_loop_gets_what_the_recipe_says():
    given = Trainer(optimizer=SGD(momentum=0.5, weight_decay=0.2), schedule=Linear(warmup=3), clip_norm=None)
    settings = Settings(steps=5, compute=CPU, seed=7).with_trainer(given, lr=0.3, parts={"a": 0.1})
    assert (settings.optimizer, settings.schedule, settings.clip_norm) == (given.optimizer, given.schedule, None)
    assert (settings.rates.lr, settings.rates.parts) == (0.3, {"a": 0.1})
    assert (settings.steps, settings.seed) == (5, 7)
    assert settings.plain()["optimizer"] == {
        "kind": "sgd", "momentum": 0.5, "weight_decay": 0.2, "lr": 0.3, "parts": {"a": 0.1}, "no_decay": [],
        "nesterov": False,
    }  # fmt: skip


def test_one_setting_leaves_the_stages_other_ones(load):
    found = load("stages.pretrain.trainer.optimizer.eps=1e-6", "stages.tune.trainer.schedule.floor=0.1")
    assert trainer(found, "pretrain") == Trainer(
        optimizer=AdamW(weight_decay=0.1, eps=1e-6), schedule=Cosine(warmup=0.05)
    )
    assert trainer(found, "tune") == Trainer(schedule=Cosine(warmup=0.08, floor=0.1))


def test_another_kind_begins_with_its_own_defaults(load):
    found = load("stages.pretrain.trainer.optimizer.kind=sgd", "stages.align.trainer.schedule.kind=constant")
    assert trainer(found, "pretrain").optimizer == SGD()
    assert trainer(found, "align").schedule.warmup == 0


@pytest.mark.parametrize(
    ("override", "cause"),
    [
        ("stages.tune.trainer.optimizer.kind=adamv", "stages.tune.trainer.optimizer.kind: expected adamw or"),
        ("stages.tune.trainer.optimizer.betas=[0.9, 1]", "stages.tune.trainer.optimizer.betas.1: expected number"),
        ("stages.align.trainer.clip_norm=0", "stages.align.trainer.clip_norm: expected number > 0.0 or null"),
        ("stages.align.trainer.schedule.warmup=1.5", "stages.align.trainer.schedule.warmup: 1.5 steps"),
        ("stages.tune.trainer.optimizer.lr=1", "unknown setting 'stages.tune.trainer.optimizer.lr'"),
    ],
)
def test_a_fault_names_its_path(load, override, cause):
    with pytest.raises(ConfigError) as error:
        load(override)
    assert error.value.cause.startswith(cause)
    assert override in error.value.place


@pytest.mark.row("S4-62")
@pytest.mark.parametrize("kind", ["adamw", "sgd", "adafactor", "lion", "lars", "muon", "adamw-8bit"])
def test_the_estimate_counts_the_state_that_the_optimizer_keeps(kind):
    """Bytes by weight of a network of some size, as the optimizer holds them after a step. Seen: within 2 %."""
    import torch

    model = torch.nn.Sequential(torch.nn.Linear(256, 512), torch.nn.Linear(512, 256))
    given = Trainer.model_validate({"optimizer": {"kind": kind}})
    optimizer = given.optimizer.build(dict(model.named_parameters()), Roles.of(model), rates=Rates(lr=0.01))
    model(torch.randn(2, 256)).sum().backward()
    optimizer.step()
    states = [value for state in optimizer.state.values() for value in state.values()]
    held = sum(value.nbytes for value in states if isinstance(value, torch.Tensor) and value.numel() > 1)
    count = sum(weight.numel() for weight in model.parameters())
    assert given.state_bytes() == pytest.approx(held / count, rel=0.02, abs=0.02)
    assert given.model_copy(update={"average": Average()}).state_bytes() == given.state_bytes() + 4


@pytest.mark.row("S4-62")
def test_plan_counts_the_optimizers_bytes(load):
    machine = Machine(
        cores=2, memory_bytes=8 * 2**30, disk_bytes=50 * 2**30, gemm_fp32=2.8e11, gemm_bf16=1.3e12, measured=True
    )
    for stage in ("pretrain", "tune", "align"):
        plain, eight = (
            load(*given).spec.stages[stage].estimate(machine, {})
            for given in ((), (f"stages.{stage}.trainer.optimizer.kind=adamw-8bit",))
        )
        assert eight.memory["optimizer"] == pytest.approx(plain.memory["optimizer"] * 2.03125 / 8, rel=1e-3)
        assert eight.disk_bytes < plain.disk_bytes


def test_null_never_clips(load):
    assert trainer(load("stages.tune.trainer.clip_norm=null"), "tune").clip_norm is None


# --- what stood elsewhere before -----------------------------------------------------------------------------------


def test_a_recipe_of_before_means_the_same(load):
    found = load(stages="{pretrain: {warmup: 0.2, weight_decay: 0.3}, second: {kind: align, warmup: 0}}")
    assert trainer(found, "pretrain") == Trainer(optimizer=AdamW(weight_decay=0.3), schedule=Cosine(warmup=0.2))
    assert trainer(found, "second").schedule == Cosine()
    assert found.sources["stages.pretrain.trainer.schedule.warmup"].where.endswith("mine.yaml:2")


def test_the_settings_of_a_stage_finished_before_are_read():
    before = {"kind": "pretrain", "warmup": 0.2, "weight_decay": 0.3}
    assert Pretrain.model_validate(before).trainer == Trainer(
        optimizer=AdamW(weight_decay=0.3), schedule=Cosine(warmup=0.2)
    )


def test_old_and_new_place_at_once_is_a_fault(load):
    with pytest.raises(ConfigError, match=r"unknown setting 'stages.align.warmup'"):
        load(stages="{align: {warmup: 0.2, trainer: {schedule: {warmup: 0.1}}}}")


def test_a_run_of_before_finds_its_settings_unchanged():
    """What a checkpoint recorded before there was a trainer is what these defaults record; else none could go on."""
    settings = Pretrain().settings(CPU, 10, towers=["a"], data="b").plain()
    assert settings["optimizer"] == {
        "kind": "adamw", "lr": 1e-3, "parts": {}, "betas": [0.9, 0.999], "eps": 1e-8, "weight_decay": 0.1,
        "no_decay": [],
    }  # fmt: skip
    assert (settings["schedule"], settings["clip_norm"]) == ({"kind": "cosine", "warmup": 0.05, "floor": 0.0}, 1.0)
    assert (settings["context"]["warmup"], settings["context"]["weight_decay"]) == (0.05, 0.1)
    assert "trainer" not in settings["context"]


def test_defaults_are_those_of_the_stages():
    assert (Tune().trainer.schedule, Tune().words.weight_decay) == (Cosine(warmup=0.08), 0.1)
    assert Align().trainer == Trainer(schedule=Cosine(warmup=0.1))
