"""What every training stage lets a recipe set, from its dotted path down to the loop's settings."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest

from plait.core.device import Compute
from plait.core.errors import ConfigError
from plait.core.estimate import Machine
from plait.core.spec import Resolved, defaults
from plait.recipes.recipe import Recipe, load_recipe
from plait.stages.align import Align
from plait.stages.pretrain import Pretrain
from plait.stages.tune import Tune
from plait.training.checkpoint import changed_settings
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
        "nesterov": False, "layer_decay": 1.0,
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


@pytest.mark.row("S4-58")
def test_plan_counts_the_best_checkpoint_beside_the_last_ones(load):
    machine = Machine(cores=2, memory_bytes=2**33, disk_bytes=2**36, gemm_fp32=3e11, gemm_bf16=1e12, measured=True)
    for stage, kept in (("pretrain", 3 / 2), ("tune", 3 / 2), ("align", 2)):  # align saves its last step alone
        judged = (f"stages.{stage}.trainer.validation.every=1", "data.source.validation=40")
        plain, best = (load(*given).spec.stages[stage].estimate(machine, {}) for given in (judged[1:], judged))
        assert best.spare_bytes == plain.spare_bytes
        assert best.disk_bytes == pytest.approx(kept * plain.disk_bytes, rel=0.1)


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


# What a pretrain stage recorded before there was a trainer.
BEFORE: dict[str, Any] = {
    "steps": 10, "seed": 0, "clip_norm": 1.0, "log_every": 1, "save_every": 25, "keep_last": 2,
    "max_skipped_in_row": 10, "dtype": "float32", "weights": {},
    "optimizer": {
        "kind": "adamw", "lr": 1e-3, "parts": {}, "betas": [0.9, 0.999], "eps": 1e-8, "weight_decay": 0.1,
        "no_decay": [],
    },
    "schedule": {"kind": "cosine", "warmup": 0.05, "floor": 0.0},
    "context": {
        "kind": "pretrain", "seed": 0, "image_tower": "efficientnet-lite0", "resolution": 160, "text_tower": "minilm",
        "max_tokens": 128, "tower_dtype": "auto", "keywords": True, "d_hidden": 1024, "d_shared": 512, "dropout": 0.3,
        "scale": 14.3, "batch_size": 512, "lr": 1e-3, "weight_decay": 0.1, "warmup": 0.05, "towers": ["a"], "data": "b",
    },
}  # fmt: skip


def changes(stage: Pretrain, before: Mapping[str, Any] = BEFORE) -> list[str]:
    """Dotted keys that differ from what was recorded."""
    return [*changed_settings(before, stage.settings(CPU, 10, towers=["a"], data="b").plain())]


def test_a_run_of_before_finds_its_settings_unchanged():
    """What came later (layer_decay, qformer, spoken ...) stands at its default; else none could go on."""
    assert changes(Pretrain()) == []
    assert changes(Pretrain(), Pretrain().settings(CPU, 10, towers=["a"], data="b").plain()) == []


@pytest.mark.parametrize(
    ("given", "keys"),
    [
        ({"trainer": {"layer_decay": 0.5}}, ["optimizer.layer_decay"]),
        ({"trainer": {"average": {}}}, ["average.decay", "average.use"]),
        ({"trainer": {"schedule": {"warmup": 0.1}}}, ["schedule.warmup", "context.warmup"]),
        ({"spoken": {"takes": 2}}, None),
    ],
)
def test_a_setting_that_came_later_and_is_used_is_a_change(given: dict[str, Any], keys: list[str] | None):
    found = changes(Pretrain.model_validate(given))
    assert found == keys if keys else all(key.startswith("context.spoken.") for key in found)
    assert found


def test_a_phase_of_before_goes_on_with_what_tune_has_now():
    stage = Tune()
    context = stage.model_dump(mode="json", exclude={"trainer"})
    before = Settings(steps=3, compute=CPU, context=_without(context, "packing", "cache", "lr_gates")).plain()
    for changed, keys in (({}, []), ({"packing": False}, ["context.packing"])):
        now = Settings(steps=3, compute=CPU, context=context | changed, context_defaults=defaults(stage)).plain()
        assert [*changed_settings(before, now)] == keys


def test_an_inner_setting_that_came_later_stands_at_the_default_of_its_own_type():
    """The stage's own connector drops 0.3 where nobody says otherwise; the setting's default is what no one had."""
    context = Tune().model_dump(mode="json", include={"connector"})
    before = {"context": {"connector": _without(context["connector"], "dropout")}}
    now = {"context": context, "defaults": {f"context.{name}": value for name, value in defaults(Tune()).items()}}
    assert [*changed_settings(before, now)] == ["context.connector.dropout"]
    now["context"] = {"connector": context["connector"] | {"dropout": defaults(Tune())["connector.dropout"]}}
    assert changed_settings(before, now) == {}


def _without(plain: Mapping[str, Any], *names: str) -> dict[str, Any]:
    return {name: value for name, value in plain.items() if name not in names}


# --- what does not go together -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("given", "says"),
    [
        (("stages.pretrain.trainer.head=full",), "trainer.head is full: the pretrain stage leaves no choice"),
        (("stages.pretrain.trainer.recompute=full",), "trainer.recompute is full: a pair of heads on frozen towers"),
        (("stages.pretrain.trainer.compile=true",), "trainer.compile is true: a pair of heads on frozen towers"),
        (
            ("stages.pretrain.image_tower={kind: resnet, size: 64}", "stages.pretrain.trainer.recompute=full"),
            "trainer.recompute is full: a resnet learns, without Transformer blocks",
        ),
        (
            ("stages.tune.trainer.compile=true", "stages.tune.trainer.recompute=selective"),
            "recompute is selective and compile is true",
        ),
        (
            ("stages.tune.trainer.head=full", "stages.tune.trainer.parallel={tensor: 3}"),
            "head is full and parallel.tensor is set: every process would put the whole head together",
        ),
    ],
)
def test_what_a_stage_cannot_use_is_refused_with_the_recipe(load, given: tuple[str, ...], says: str):
    with pytest.raises(ConfigError, match=says):
        load(*given)


@pytest.mark.parametrize("learns", [{"qformer": {}}, {"image_tower": {"kind": "vit", "size": 64}}])
def test_blocks_that_learn_in_pretrain_may_be_recomputed_or_compiled(learns: dict[str, Any]):
    for how in ({"recompute": "selective"}, {"compile": True, "recompute": "full"}):
        assert Pretrain.model_validate({**learns, "trainer": how}).trainer == Pretrain().trainer.model_copy(update=how)
    with pytest.raises(ValueError, match=r"trainer\.head is full"):
        Pretrain.model_validate({**learns, "trainer": {"head": "full"}})


def test_defaults_are_those_of_the_stages():
    assert (Tune().trainer.schedule, Tune().words.weight_decay) == (Cosine(warmup=0.08), 0.1)
    assert Align().trainer == Trainer(schedule=Cosine(warmup=0.1))
