"""Objectives over pairs in the pretrain stage: what is minimized, what it starts from, how it goes on."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any, get_args

import pytest
import torch
from tests.tiny_run import CPU
from tests.unit.stages.test_pretrain_scratch import VIT, Killed, pretrain, tensors
from tests.unit.training.pairwise_model import dual, pairs

from plait.cli.main import main
from plait.core.files import read_done, read_json, read_jsonl
from plait.core.spec import defaults
from plait.objectives import build, specs
from plait.objectives.contrastive import sigmoid_pairs
from plait.stages.pretrain import Pretrain
from plait.training.checkpoint import changed_settings
from plait.training.settings import Settings

PAIRS: dict[str, dict[str, Any]] = {
    "sigmoid": {"kind": "sigmoid"},
    "hard": {"kind": "hard-contrastive", "hardness": 0.5, "prior": 0.05},
}


@pytest.fixture
def settings(tiny_folders: dict[str, Path]) -> dict[str, Any]:
    return {
        "text_tower": str(tiny_folders["text"]),
        "image_tower": VIT,
        "max_tokens": 16,
        "steps": 6,
        "batch_size": 8,
        "d_hidden": 8,
        "d_shared": 4,
        "dropout": 0.0,
        "save_every": 2,
        "seed": 3,
    }


@pytest.mark.row("S3-23")
@pytest.mark.parametrize("kind", PAIRS)
def test_a_killed_run_goes_on_to_the_same_bits(
    kind: str, data_stage: Path, tmp_path: Path, settings: dict[str, Any]
) -> None:
    whole, stopped = tmp_path / "whole", tmp_path / "stopped"
    pretrain(data_stage, whole, settings, objective=PAIRS[kind])
    with pytest.raises(Killed):
        pretrain(data_stage, stopped, settings, stop="checkpoint 000004 saved", objective=PAIRS[kind])
    assert read_done(stopped) is None
    pretrain(data_stage, stopped, settings, objective=PAIRS[kind])
    assert tensors(stopped) == tensors(whole)
    assert ("objective.bias" in json.dumps([*tensors(whole)])) == (kind == "sigmoid")


@pytest.mark.row("S3-23")
@pytest.mark.row("S2-18")
@pytest.mark.parametrize("kind", PAIRS)
def test_micro_batches_lead_to_the_losses_of_the_whole_batch(
    kind: str, data_stage: Path, tmp_path: Path, settings: dict[str, Any]
) -> None:
    for name, trainer in (("whole", {}), ("parts", {"micro_batch": 3})):
        pretrain(data_stage, tmp_path / name, settings, objective=PAIRS[kind], trainer=trainer)
    records = [read_jsonl(tmp_path / name / "metrics.jsonl") for name in ("whole", "parts")]
    assert len(records[0]) == 6
    for one, other in zip(*records, strict=True):
        assert one["loss"] == pytest.approx(other["loss"], rel=1e-4)
        assert one["grad_norm"] == pytest.approx(other["grad_norm"], rel=1e-3)


@pytest.mark.row("S3-23")
@pytest.mark.parametrize("size", [2, 13])
def test_the_bias_begins_where_one_of_b_texts_belongs_to_a_picture(size: int) -> None:
    """With no picture nearer to one text than to another, each is judged to match with probability 1 / b."""
    objective = build.over_pairs(specs.Sigmoid(), batch=size)
    assert isinstance(objective, torch.nn.Module)
    bias = next(objective.parameters()).detach()
    assert torch.sigmoid(bias).item() == pytest.approx(1 / size)
    one = torch.zeros(size, 4)
    at_start = sigmoid_pairs(one, one, torch.tensor(10.0), bias=bias).item() / size
    entropy = -math.log(1 / size) - (size - 1) * math.log(1 - 1 / size)
    assert at_start == pytest.approx(entropy, rel=1e-5)
    # and no other bias is better there
    for other in (bias - 0.1, bias + 0.1):
        assert sigmoid_pairs(one, one, torch.tensor(10.0), bias=other).item() / size > at_start
    assert specs.Sigmoid(bias=-10.0).bias_for(size) == -10.0


@pytest.mark.row("S3-23")
def test_the_batch_that_there_is_decides_about_the_bias(
    data_stage: Path, tmp_path: Path, settings: dict[str, Any]
) -> None:
    """36 pairs where 512 were asked for."""
    from safetensors.torch import load_file

    how = {"batch_size": 512, "objective": PAIRS["sigmoid"], "steps": 1, "lr": 1e-9}
    pretrain(data_stage, tmp_path / "run", settings, **how)
    train = read_json(tmp_path / "run" / "done.json")["summary"]["pairs"]["train"]
    found = {}
    for path in (tmp_path / "run" / "checkpoints" / "000001").rglob("*.safetensors"):
        found |= {name: value for name, value in load_file(path).items() if name.endswith("objective.bias")}
    (bias,) = {round(value.item(), 5) for value in found.values() if value.ndim == 0 and abs(value.item()) > 0.1}
    assert bias == pytest.approx(-math.log(train - 1), abs=1e-4)


def test_training_is_judged_by_what_is_minimized(data_stage: Path, tmp_path: Path, settings: dict[str, Any]) -> None:
    from plait.core.events import Events
    from plait.stages.data import Data, PairsSource

    own = data_stage.parent / "own" / "pairs.csv"
    stage = tmp_path / "judged-data"
    stage.mkdir()
    Data(source=PairsSource(path=own, test_fraction=0.0, validation=0.2)).run(None, stage, events=Events())
    trainer = {"validation": {"every": 3, "samples": 8}}
    values = {}
    for name, objective in PAIRS.items():
        pretrain(stage, tmp_path / name, settings, objective=objective, trainer=trainer)
        values[name] = [r["evaluation"] for r in read_jsonl(tmp_path / name / "metrics.jsonl") if "evaluation" in r]
        assert len(values[name]) == 2
    assert values["sigmoid"] != values["hard"]


def test_the_settings_build_what_they_say() -> None:
    model, (batch,) = dual(), pairs().step_batches(0)
    plain = build.over_pairs(specs.Contrastive(), batch=14)(model, batch)["contrastive"].item()
    hard = build.over_pairs(specs.HardContrastive(hardness=3.0), batch=14)(model, batch)["contrastive"].item()
    assert hard != pytest.approx(plain, rel=1e-3)
    for kind in get_args(specs.Views):
        with pytest.raises(TypeError, match="compares views"):
            build.over_pairs(kind(), batch=14)


def test_a_run_of_before_goes_on_with_the_objective_it_had() -> None:
    stage = Pretrain()
    now = stage.settings(CPU, 10, towers=["a"], data="b").plain()
    context = {name: value for name, value in now["context"].items() if name != "objective"}
    before = Settings(steps=10, compute=CPU, context=context).plain()
    same = {name: now[name] for name in before if name not in ("context", "defaults")}
    assert [*changed_settings(before | same, now)] == []
    other = Pretrain.model_validate({"objective": {"kind": "sigmoid"}}).settings(CPU, 10, towers=["a"], data="b")
    assert all(key.startswith("context.objective") for key in changed_settings(before | same, other.plain()))
    assert changed_settings(before | same, other.plain())


@pytest.mark.parametrize(
    ("objective", "says"),
    [
        ({"kind": "naive"}, "naive"),
        ({"kind": "sigmoid", "bias": math.inf}, "bias"),
        ({"kind": "hard-contrastive", "prior": 1.0}, "prior"),
        ({"kind": "hard-contrastive", "hardness": -1.0}, "hardness"),
        ({"kind": "moco", "momentum": 1.0}, "momentum"),
        ({"kind": "nt-xent", "temperature": 0.0}, "temperature"),
        ({"kind": "triplet", "mining": "soft"}, "mining"),
    ],
)
def test_what_is_none_is_refused(objective: dict[str, Any], says: str) -> None:
    with pytest.raises(ValueError, match=says):
        Pretrain.model_validate({"objective": objective})


def test_a_q_former_has_its_own_objective() -> None:
    with pytest.raises(ValueError, match="objective: settings of a dual encoder"):
        Pretrain.model_validate({"qformer": {}, "objective": {"kind": "sigmoid"}})


def test_defaults_of_the_settings_are_plain_data() -> None:
    assert defaults(Pretrain())["objective"] == {"kind": "contrastive"}


def test_every_objective_has_a_line_with_its_source_and_where_it_is_set(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["list", "objectives", "--json"]) == 0
    found = {part["name"]: part for part in json.loads(capsys.readouterr().out)["objectives"]}
    kinds = {kind.model_fields["kind"].default for kind in get_args(get_args(specs.Objective)[0])}
    assert kinds < set(found)
    assert set(found) - kinds == set(specs.ELSEWHERE)
    for part in found.values():
        assert part["about"]
        assert part["source"].startswith("https://")
        assert part["where"]
        module, _, name = part["made_by"].rpartition(".")
        assert hasattr(__import__(module, fromlist=[name]), name)
    settings = {setting["name"]: setting for setting in found["sigmoid"]["settings"]}
    assert settings["bias"]["default"] is None
    assert "log(1 / (b - 1))" in settings["bias"]["about"]


def test_no_objective_is_left_out_of_the_list() -> None:
    """Every class that says whether it needs the whole batch is one of a recipe's kinds, or listed with its place."""
    import importlib
    import pkgutil

    import plait.objectives as package

    there = set()
    for found in pkgutil.iter_modules(package.__path__):
        module = importlib.import_module(f"{package.__name__}.{found.name}")
        there |= {
            f"{module.__name__}.{name}"
            for name, one in vars(module).items()
            if isinstance(one, type) and one.__module__ == module.__name__ and hasattr(one, "needs_global_batch")
        }
    of_recipes = {f"{one.__module__}.{one.__name__}" for one in (*get_args(build.OfPairs), *get_args(build.OfViews))}
    of_recipes.add("plait.objectives.hardness.HardContrastive")
    assert there == of_recipes | {one.made_by for one in specs.ELSEWHERE.values()}
