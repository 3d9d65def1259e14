"""The study of training: its samples, what a step is measured to hold, equal operations, and what was published."""

import json
import math
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from pydantic import ValidationError

from plait.cli.main import main
from plait.core.errors import PlaitError
from plait.core.events import Events
from plait.core.files import read_done, read_json
from plait.studies.connecting.scenes import IDS
from plait.studies.teaching import few, findings, memory, mixing, samples, trials
from plait.studies.teaching.lessons import Lesson
from plait.studies.teaching.meter import reader
from plait.studies.teaching.students import tower
from plait.studies.teaching.tables import markdown
from plait.studies.training import Few, Layers, Memory, Mixing, Order, Precision, TrainingStudy

ROOT = Path(__file__).parents[3]
ROWS = {"S2-C10", "S2-C11", "S4-C09", "S0-C31", "S3-27", "S4-C08"}
SMALL = Memory(d=128, depth=4, patch=4, sizes=(32,), batch=8, micro=(8, 2), steps=4)


def tiny(**changes: Any) -> TrainingStudy:
    settings: dict[str, Any] = {
        "workers": 1,
        "seeds": 3,
        "d": 8,
        "depth": 2,
        "heads": 2,
        "batch": 2,
        "before": 2,
        "steps": 2,
        "rows": 20,
        "memory": Memory(d=8, depth=1, heads=1, sizes=(8,), batch=2, micro=(2, 1), steps=4),
        "precision": Precision(steps=2),
        "few": Few(pictures=(4,), lrs=(1e-3,), rank=2),
        "layers": Layers(pictures=(4,), uniform=(1e-3,), lrs=(1e-3,), decays=(0.5,)),
        "mixing": Mixing(orders=("freeze", "joint"), steps=4, pictures=8, lrs=(1e-3,)),
    }
    return TrainingStudy(**settings | changes)


# --- samples ---------------------------------------------------------------------------------------------------------


def test_the_most_frequent_color_can_be_seen() -> None:
    found = samples.colors(40, "a")
    cells = found.pixels.unflatten(2, (4, 6)).unflatten(1, (4, 6)).permute(0, 1, 3, 2, 4, 5).flatten(1, 2)
    means = torch.tensor(list(samples.COLORS.values()))
    for picture, target in zip(cells, found.targets[:, 0], strict=True):
        lit = [cell[cell.amax(-1) > 0.5].mean(0) for cell in picture if bool((cell.amax(-1) > 0.5).any())]
        counts = torch.stack([(means - one).norm(dim=1).argmin() for one in lit]).bincount(minlength=4)
        assert int(counts.argmax()) == int(target)
        assert int((counts == counts.max()).sum()) == 1
    again = samples.colors(40, "a")
    assert torch.equal(found.pixels, again.pixels)
    assert not torch.equal(found.targets, samples.colors(40, "b").targets)


@pytest.mark.row("S4-C08")
def test_words_name_the_glyph_as_often_as_they_are_told_to() -> None:
    found = samples.named(2000, "a", told=0.7, noise=0.2)
    glyphs = torch.tensor([IDS[name] for name in samples.NAMES])
    said = (found.words[:, :, None] == glyphs).any(1)
    assert said.sum(1).eq(1).all()
    right = float((said.long().argmax(1) == found.targets[:, 0]).double().mean())
    assert abs(right - 0.7) < 4 * math.sqrt(0.7 * 0.3 / 2000)
    plain = samples.named(50, "a", told=0.7, noise=0.0)
    assert found.pixels.std() > plain.pixels.std()


def test_micro_batches_are_the_batch_in_its_order() -> None:
    given = samples.colors(10, "a")
    whole, parts = (samples.Rounds(samples=given, batch=4, seed=3, micro=micro) for micro in (0, 1))
    for step in (0, 2, 1):
        (one,), several = whole.step_batches(step), parts.step_batches(step)
        assert len(several) == 4
        assert torch.equal(one.labels, torch.cat([batch.labels for batch in several]))
        pixels = torch.cat([batch.media["image"].values for batch in several])
        assert torch.equal(one.media["image"].values, pixels)


# --- memory ----------------------------------------------------------------------------------------------------------


@pytest.mark.row("S2-C10")
def test_micro_batches_give_the_gradient_of_the_batch() -> None:
    found = memory.gradient_gaps(SMALL)
    assert {(one["size"], one["micro"], one["dtype"]) for one in found} == {(32, 2, "float64"), (32, 2, "float32")}
    for one in found:
        assert 0 < one["gap"] < (1e-12 if one["dtype"] == "float64" else 1e-5)


@pytest.mark.row("S4-C09")
@pytest.mark.row("S2-C10")
@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="peaks cannot begin anew here")
def test_a_process_counts_what_a_step_holds_and_its_peak_is_their_sum() -> None:
    kinds = memory.kinds(SMALL)
    assert [(kind["micro"], kind["dtype"]) for kind in kinds] == [
        (8, "float32"),
        (2, "float32"),
        (8, "bfloat16"),
        (8, "float16"),
    ]
    (_, whole), (_, parts) = memory.measured(kinds[0]), memory.measured(kinds[1])
    weights = 4 * sum(weight.numel() for weight in reader(kinds[0]).parameters())
    # A block keeps its input, two norms of it, queries, keys, values, what attention gives, the sum, and the inside of
    # the network before and after its activation; the last norm its input; the first layer its patches.
    tokens, d, depth, patch = 8 * 8**2, 128, 4, 3 * 4**2
    kept = 4 * tokens * (depth * (1 + 1 + 3 + 1 + 1 + 1 + 4 + 4) * d + d + patch)
    for one in (whole, parts):
        assert one["gradients"] == one["parameters"] == weights
        assert one["state"] == 2 * one["parameters"]
        assert one["counted"] == SMALL.steps - 2
        assert 0.75 < memory.expected_peak(one) / one["peak"] < 1.15
    assert whole["activations"] == pytest.approx(kept, rel=0.01)
    assert whole["activations"] == pytest.approx(4 * parts["activations"], rel=0.01)
    assert (whole["held"], parts["held"]) == (0, parts["gradients"])
    assert parts["peak"] < whole["peak"]


def test_a_process_that_ends_says_why(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(memory.sys, "executable", "/bin/false")
    with pytest.raises(PlaitError, match="could not be measured: exit code 1"):
        memory.measured(memory.kinds(SMALL)[0])


# --- operations ------------------------------------------------------------------------------------------------------


@pytest.mark.row("S4-C08")
@pytest.mark.parametrize("order", ["freeze", "joint", "staged"])
def test_all_orders_take_as_many_operations(order: Order) -> None:
    study = TrainingStudy()
    costs = mixing.costs_of(study)
    assert costs["joint"] > costs["image"] > costs["freeze"] > costs["text"]
    steps = mixing.planned(study, order, costs)
    last = costs["freeze" if order == "freeze" else "joint"]
    spent = steps["both"] * last + sum(steps.get(name, 0) * costs[name] for name in ("image", "text"))
    budget = study.mixing.steps * costs["joint"]
    assert budget - last - costs["image"] - costs["text"] < spent <= budget
    assert (steps.keys() == {"both"}) == (order == "joint")


@pytest.mark.row("S4-C08")
@pytest.mark.parametrize("order", ["freeze", "staged"])
def test_frozen_towers_stay_as_they_are(order: Order) -> None:
    study = tiny()
    found = mixing.mixed(study, mixing.costs_of(study), mixing.Job(order=order, balanced=True, seed=0, lr=1e-2))
    assert found.still == (order == "freeze")
    assert set(found.right) == {"both", "image", "text"}


@pytest.mark.row("S0-C31")
def test_methods_train_what_they_say(tmp_path: Path) -> None:
    study = tiny()
    few.before(study, tmp_path, (0, "float32"))
    trainable = {}
    for method in study.few.methods:
        found = few.tuned(study, tmp_path, few.Job(method=method, pictures=4, seed=0, lr=1e-3))
        trainable[method] = found.trainable
    d, classes, depth, rank = 8, 4, 2, 2
    head = d * classes + classes
    adapters = depth * rank * ((d + 3 * d) + (d + d) + 2 * (d + 4 * d))
    assert trainable["head"] == head
    assert trainable["lora"] == head + adapters
    assert trainable["full"] == sum(w.numel() for w in tower(d=d, depth=depth, heads=2).parameters()) + head


@pytest.mark.row("S3-27")
def test_a_layer_moves_less_than_the_one_above_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    study, seen = tiny(depth=3, steps=3), list[torch.nn.Module]()
    few.before(study, tmp_path, (0, "float32"))
    teach = few.teach

    def spied(model: torch.nn.Module, *rest: Any) -> Any:
        seen.append(model)
        return teach(model, *rest)

    monkeypatch.setattr(few, "teach", spied)
    few.tuned(study, tmp_path, few.Job(method="full", pictures=4, seed=0, lr=1e-2, decay=0.1))
    before, after = few.load_file(tmp_path / "tower-0.safetensors"), seen[0].state_dict()
    moved = [
        float((after[f"tower.{name}"] - before[name]).abs().max())
        for name in (f"transformer.blocks.{i}.feed_forward.up.weight" for i in range(3))
    ]
    assert all(0 < below < 0.3 * above for below, above in pairwise(moved))
    assert Lesson(steps=1, lr=1.0, seed=0, layer_decay=0.1).settings().rates.layer_decay == 0.1


# --- the study -------------------------------------------------------------------------------------------------------


def fake(kind: dict[str, Any]) -> tuple[dict[str, Any], dict[str, float]]:
    """Figures that do not need a process: 4 bytes a weight, and peaks as they are expected to be."""
    one = {"parameters": 100.0, "gradients": 100.0, "state": 200.0, "activations": 80.0 * kind["micro"]}
    one |= {"held": 100.0 * (kind["micro"] < kind["batch"]), "between": 300.0, "cpu_s": 1.0}
    return kind, one | {"peak": memory.expected_peak(one)}


@pytest.mark.row("S2-C11")
def test_a_run_publishes_every_part_and_a_word_for_each_claim(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(trials.memory, "measured", fake)
    study = tiny()
    found = study.run(tmp_path, events=Events(None))
    assert read_json(tmp_path / "results.json") == json.loads(json.dumps(found))
    assert TrainingStudy(**found["spec"]) == study
    assert {one["row"] for one in found["findings"]} == ROWS
    assert found["trained"] == 4 * 3 + 3 * 3 + (4 + 3 * 4) + 2 * 4 + 4 * 4
    for part, arms in (("few", 3), ("layers", 2), ("mixing", 4)):
        assert len(found[part]["scores"]) == arms
        assert all(len(one["seeds"]) == 3 for one in found[part]["scores"])
        assert sum(one["chosen"] for one in found[part]["rates"]) == arms
    assert [one["dtype"] for one in found["precision"]["scores"]] == ["float32", "bfloat16", "float16"]
    tables = (tmp_path / "results.md").read_text(encoding="utf-8")
    assert tables == markdown(json.loads(json.dumps(found)))
    assert all(one["claim"] in tables for one in found["findings"])
    assert read_done(tmp_path) is not None


def test_the_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    quick = ["parts=[precision]", "seeds=3", "precision.steps=1", "precision.dtypes=[float32]", "rows=2", "d=8"]
    quick += ["heads=2", "depth=2", "batch=1", "workers=1", "--runs", str(tmp_path), "--json"]
    assert main(["study", "training", *quick]) == 0
    said = json.loads(capsys.readouterr().out)
    assert said["folder"].endswith("training-0001")
    assert said["study"] == "training"


def test_settings_that_cannot_be() -> None:
    for changes, about in (
        ({"seeds": 2}, "seeds"),
        ({"parts": ()}, "parts"),
        ({"memory": {"micro": (4, 1)}}, "whole batch"),
        ({"memory": {"patch": 5}}, "multiples"),
    ):
        with pytest.raises(ValidationError, match=about):
            TrainingStudy(**changes)


# --- what was published ----------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def published() -> dict[str, Any]:
    return read_json(ROOT / "benchmarks" / "results" / "training.json")


@pytest.mark.row("S2-C10")
@pytest.mark.row("S4-C09")
@pytest.mark.row("S2-C11")
@pytest.mark.row("S0-C31")
@pytest.mark.row("S3-27")
def test_the_page_shows_the_published_results_of_todays_defaults(published: dict[str, Any]) -> None:
    study = TrainingStudy()
    assert TrainingStudy(**published["spec"] | {"workers": 0}) == study  # no result depends on these
    assert {one["row"] for one in published["findings"]} == ROWS
    assert json.loads(json.dumps(findings.findings(study, published))) == published["findings"]
    page = (ROOT / "docs" / "training_claims.md").read_text(encoding="utf-8")
    for part in markdown(published).split("\n\n"):
        assert part.strip() in page


@pytest.mark.row("S2-C10")
def test_published_what_has_to_hold_by_construction(published: dict[str, Any]) -> None:
    budget = TrainingStudy().mixing.steps * published["mixing"]["costs"]["joint"]
    for one in published["mixing"]["scores"]:
        for seed in one["seeds"]:
            assert seed["still"] == (one["arm"][0] == "freeze")
            assert 0.99 * budget < seed["flops"] <= budget
    for one in published["memory"]["steps"]:
        for process in one["seeds"]:
            assert process["state"] == 2 * process["parameters"] == 2 * process["gradients"]
    assert all(gap["gap"] <= findings.EQUAL for gap in published["memory"]["gradients"] if gap["dtype"] == "float64")
