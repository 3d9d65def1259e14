"""The study of fusions: its truths, its students, what they cannot do whatever their weights, and the command."""

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import scipy.stats
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import ValidationError
from torch import nn

from plait.cli.main import main
from plait.core.errors import ConfigError, DataError
from plait.core.events import Event, Events
from plait.core.files import read_done, read_json
from plait.models.fusion.streams import vector
from plait.studies.fusing.students import Student, cost, size_for, student
from plait.studies.fusing.tables import markdown
from plait.studies.fusing.tasks import Batch, Signals, TaskName, Truth, draw_truth
from plait.studies.fusing.training import Training, dropped_at, gradient_shares, right, train, with_noise
from plait.studies.fusing.trials import Job, Setting, trial
from plait.studies.fusing.variance import by_chance, fusion_share, shares, with_conditions
from plait.studies.fusion import FusionName, FusionStudy, Interaction, Missing, Norm, Rates

ROOT = Path(__file__).parents[3]
D = 8
FUSIONS: tuple[FusionName, ...] = FusionStudy.model_fields["fusions"].default
LINEAR: tuple[FusionName, ...] = ("concat-linear", "concat-flags")
APART: tuple[FusionName, ...] = ("average", "product")
JOINT = tuple(name for name in FUSIONS if name not in (*LINEAR, *APART))
ROWS = 10_000
SLACK = 0.02
"""Four standard errors of a share of 10,000 samples."""


def samples(task: TaskName, *, rows: int = ROWS, seed: int = 0, **signals: Any) -> tuple[Truth, Batch]:
    truth = draw_truth(task, D, Signals(**signals), seed=seed)
    return truth, truth.draw(rows, torch.Generator().manual_seed(seed + 1))


def made(name: FusionName, *, seed: int = 0, norm: Norm = "none") -> Student:
    size = size_for(name, D, 700)
    torch.manual_seed(seed)
    return student(name, D, size=size, norm=norm)


def tiny(**given_: object) -> FusionStudy:
    return FusionStudy(
        **{
            "fusions": ("concat-linear", "gated", "bilinear"),
            "seeds": 3,
            "steps": 2,
            "rows": 40,
            "workers": 1,
            "rates": Rates(fusions=("bilinear",), lrs=(1e-2, 1e-1)),
            "missing": Missing(tasks=("shifted",), drops=(0.0, 0.5, 1.0)),
            **given_,
        }
    )


# --- truths ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("task", ["additive", "xor", "small", "centered", "shifted"])
@pytest.mark.parametrize("lost", [False, True])
def test_the_best_rule_is_as_good_as_its_formula_says(task: TaskName, lost: bool) -> None:
    truth, batch = samples(task, factor=100.0)
    found = float((truth.best(batch, lost=lost) == batch.labels).double().mean())
    assert abs(found - truth.ceiling(lost=float(lost))) < SLACK
    assert abs(float(batch.labels.double().mean()) - 0.5) < SLACK


def test_noise_lowers_the_ceiling_as_its_formula_says() -> None:
    truth, batch = samples("centered")
    noisy = with_noise(batch, 3.0, generator=torch.Generator().manual_seed(9))
    a, b = noisy.inputs["a"].tokens[:, 0] @ truth.u, noisy.inputs["b"].tokens[:, 0] @ truth.v
    weighed = 1.0 * a + 1.5 / (1 + 3.0**2) * b  # each by its distance over its variance
    found = float(((weighed > 0) == batch.labels).double().mean())
    assert abs(found - truth.ceiling(noise=3.0)) < SLACK
    assert truth.ceiling() > truth.ceiling(noise=3.0) > truth.ceiling(lost=1.0)


def test_a_label_of_xor_is_in_no_modality_alone() -> None:
    truth, batch = samples("xor")
    for name, way in (("a", truth.u), ("b", truth.v)):
        positive = batch.inputs[name].tokens[:, 0] @ way > 0
        assert abs(float(batch.labels[positive].double().mean()) - 0.5) < 2 * SLACK


@settings(deadline=None, max_examples=30)
@given(st.floats(0, 1), st.integers(0, 99))
def test_what_is_lost_at_a_rate_is_lost_at_every_higher_one(rate: float, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    draws, whole = torch.rand(50, generator=generator), torch.ones(50, dtype=torch.bool)
    found = dropped_at(rate, draws, whole=whole, alone=~whole)
    assert found == pytest.approx(float((draws >= rate).double().mean()))
    assert dropped_at(1.0, draws, whole=whole, alone=~whole) == 0 <= found <= 1


# --- what fusions can do ---------------------------------------------------------------------------------------------


BEST_HALF_PLANE = 5 / 8
"""Accuracy of the best of all half-planes on XOR of the signs of two independent Gaussians.

With s and d the rotated Gaussians, the label is |s| > |d| and the half-plane s > t. For t = 0 it is right half the
time; a larger t wins P(|d| > s) - P(|d| < s) at each s in 0..t, which pays until P(|d| < t) = 1/2. With u = P(|d| < s),
of which ds has the density du / 2, that is the integral of (1 - 2 u) / 2 over u in 0..1/2, which is 1/8.
"""


@pytest.mark.row("S0-C12")
@pytest.mark.row("S0-14")
@settings(deadline=None, max_examples=12)
@given(st.integers(0, 10_000), st.floats(0, 2 * math.pi), st.floats(-2, 2))
def test_no_weights_of_concatenation_and_a_linear_head_do_xor(seed: int, angle: float, threshold: float) -> None:
    truth, batch = samples("xor")
    model = made("concat-linear", seed=seed)
    assert float(right(model, batch).double().mean()) < BEST_HALF_PLANE + SLACK
    # The same for weights that know the directions, at any angle between them.
    with torch.no_grad():
        whole = nn.Linear(2 * D, 1)
        whole.weight.copy_(torch.cat([math.cos(angle) * truth.u, math.sin(angle) * truth.v])[None])
        whole.bias.fill_(threshold)
        side = whole(torch.cat([stream.tokens[:, 0] for stream in batch.inputs.values()], dim=1))[:, 0] > 0
    assert float((side == batch.labels).double().mean()) < BEST_HALF_PLANE + SLACK


@pytest.mark.row("S0-17")
@pytest.mark.row("S3-17")
@pytest.mark.parametrize("name", FUSIONS)
def test_which_scores_add_up_over_modalities_whatever_the_weights(name: FusionName) -> None:
    """f(a, b) - f(a', b) - f(a, b') + f(a', b') is 0 for what is linear or a product of experts: no interaction."""
    model = made(name).double().eval()
    for weight in model.parameters():
        nn.init.normal_(weight)
    a, b, other, another = torch.randn(4, 64, D, dtype=torch.float64)

    def scores(first: torch.Tensor, second: torch.Tensor) -> torch.Tensor:
        found = model({"a": vector(first), "b": vector(second)})
        if name == "average":  # of probabilities, not of logits
            return found.softmax(-1)[:, 1]
        return found[:, 1] - found[:, 0]

    with torch.no_grad():
        left = scores(a, b) - scores(other, b) - scores(a, another) + scores(other, another)
    if name in JOINT:
        assert float(left.abs().median()) > 1e-3
    else:
        torch.testing.assert_close(left, torch.zeros_like(left), atol=1e-9, rtol=0)


@pytest.mark.row("S0-C12")
@pytest.mark.row("S0-17")
def test_products_learn_xor_and_concatenation_with_a_linear_head_does_not() -> None:
    found: dict[FusionName, float] = {}
    for name in ("concat-linear", "product", "low-rank", "bilinear"):
        truth, batch = samples("xor", rows=2000)
        model = made(name)
        train(model, truth, Training(steps=120, batch=64, lr=0.03), generator=torch.Generator().manual_seed(7))
        found[name] = float(right(model, batch).double().mean())
    assert abs(found["concat-linear"] - 0.5) < 0.1
    assert abs(found["product"] - 0.5) < 0.1
    assert min(found["low-rank"], found["bilinear"]) > 0.85


@pytest.mark.row("S3-17")
@pytest.mark.parametrize("name", APART)
def test_decisions_without_a_modality_are_those_of_the_other(name: FusionName) -> None:
    _, batch = samples("centered", rows=100)
    model = made(name).eval()
    alone = {"a": batch.inputs["a"], "b": vector(torch.full((100, D), torch.nan), torch.zeros(100, dtype=torch.bool))}
    classifiers = model.fusion.classifiers
    assert isinstance(classifiers, nn.ModuleDict)
    torch.testing.assert_close(model(alone), classifiers["a"](batch.inputs["a"]).log_softmax(-1))


@pytest.mark.row("S3-16")
def test_features_are_projections_of_each_modality_merged_before_a_joint_layer() -> None:
    model = made("features")
    assert isinstance(model.head, nn.Sequential)
    assert model.fusion.d_out == 2 * size_for("features", D, 700)
    _, batch = samples("xor", rows=4)
    hidden = model.fusion(batch.inputs).vector()
    moved = model.fusion({**batch.inputs, "b": vector(torch.zeros(4, D))}).vector()
    half = model.fusion.d_out // 2
    assert torch.equal(hidden[:, :half], moved[:, :half])
    assert not torch.allclose(hidden[:, half:], moved[:, half:])


# --- scale -----------------------------------------------------------------------------------------------------------


@pytest.mark.row("S0-C12")
@pytest.mark.parametrize("name", ["concat-linear", "concat-mlp"])
def test_gradients_of_concatenation_go_where_numbers_are_large_unless_they_are_normalized(name: FusionName) -> None:
    found = {}
    for factor in (1.0, 100.0):
        _, batch = samples("small", rows=500, factor=factor)
        found[factor] = [gradient_shares(made(name, norm=norm), batch)["a"] for norm in ("none", "rms")]
    assert found[100.0][0] < 0.05
    assert found[1.0][0] > 0.2
    assert found[1.0][1] == pytest.approx(found[100.0][1], abs=1e-4)


@pytest.mark.parametrize("name", FUSIONS)
def test_shares_of_gradients_are_those_of_a_layer_that_is_there(name: FusionName) -> None:
    _, batch = samples("xor", rows=32)
    model = made(name).eval()
    layers = {m: nn.Linear(D, D, bias=False) for m in batch.inputs}
    for layer in layers.values():
        nn.init.eye_(layer.weight)
    inputs = {m: vector(layers[m](stream.tokens[:, 0])) for m, stream in batch.inputs.items()}
    nn.functional.cross_entropy(model(inputs), batch.labels).backward()
    norms = {m: float(layer.weight.grad.norm()) for m, layer in layers.items() if layer.weight.grad is not None}
    found = gradient_shares(model, batch)
    assert sum(found.values()) == pytest.approx(1)
    assert found["a"] == pytest.approx(norms["a"] / sum(norms.values()), rel=1e-4)


@pytest.mark.row("S0-14")
@pytest.mark.parametrize("name", FUSIONS)
def test_normalized_students_do_not_hear_the_scale(name: FusionName) -> None:
    _, batch = samples("xor", rows=16)
    model = made(name, norm="rms").eval()
    louder = {**batch.inputs, "b": vector(1000 * batch.inputs["b"].tokens[:, 0])}
    torch.testing.assert_close(model(batch.inputs), model(louder), atol=1e-5, rtol=1e-4)


# --- costs -----------------------------------------------------------------------------------------------------------


@pytest.mark.row("S0-C15")
@pytest.mark.row("S0-17")
@settings(deadline=None, max_examples=20)
@given(st.integers(2, 600), st.integers(1, 300))
def test_weights_and_operations_are_those_of_formulas(d: int, size: int) -> None:
    head_weights, head_flops = 2 * size + 2, 2 * 2 * size
    concat, full, low = (cost(name, d, size=size) for name in ("concat-linear", "bilinear", "low-rank"))
    assert concat.weights == 2 * d * size + size + head_weights
    assert concat.flops == 2 * 2 * d * size + head_flops
    assert full.weights == (d + 1) ** 2 * size + size + head_weights
    assert full.flops == 2 * (d + 1) ** 2 * size + 2 * (d + 1) * size + head_flops
    assert low.weights == 2 * (d + 1) * size + size**2 + size + head_weights
    assert low.flops == 2 * (2 * d * size + size**2) + head_flops


@pytest.mark.row("S0-C15")
def test_at_the_width_of_towers_full_products_have_a_hundred_times_the_weights() -> None:
    found = {name: cost(name, 512, size=256).weights for name in FUSIONS}
    assert found["bilinear"] > 80 * max(weights for name, weights in found.items() if name != "bilinear")


@pytest.mark.parametrize("name", FUSIONS)
def test_every_fusion_is_as_wide_as_the_weights_allow(name: FusionName) -> None:
    size = size_for(name, D, 700)
    weights = sum(weight.numel() for weight in made(name).parameters())
    assert 600 < weights <= 700
    assert cost(name, D, size=size).weights == weights
    assert cost(name, D, size=size + (2 if name == "attention" else 1)).weights > 700


def test_a_budget_below_the_smallest() -> None:
    with pytest.raises(ConfigError, match="bilinear of width 8 has 86 weights at least, 50 are allowed"):
        size_for("bilinear", D, 50)


# --- variance --------------------------------------------------------------------------------------------------------


@pytest.mark.row("S3-C06")
@settings(deadline=None, max_examples=40)
@given(st.integers(2, 6), st.integers(3, 6), st.integers(0, 999))
def test_shares_of_variance_are_those_of_scipys_f(fusions: int, seeds: int, seed: int) -> None:
    scores = np.random.default_rng(seed).normal(size=(fusions, seeds))
    found = shares(scores)
    assert found is not None
    assert found.fusion + found.seed + found.rest == pytest.approx(1, abs=0.002)
    for table, share in ((scores, found.fusion), (scores.T, found.seed)):
        groups, each = table.shape
        f = scipy.stats.f_oneway(*table).statistic
        between, within = groups - 1, groups * (each - 1)
        assert share == pytest.approx(f * between / (f * between + within), abs=0.001)
    sure = fusion_share(scores)
    assert sure is not None
    assert 0 <= sure.low <= sure.value <= sure.high <= 1


def test_shares_of_variance_where_one_thing_decides() -> None:
    by_fusion = np.array([[0.5] * 3, [0.7] * 3, [0.9] * 3])
    sure, turned = fusion_share(by_fusion), shares(by_fusion.T)
    assert sure is not None
    assert turned is not None
    assert sure.value == sure.low == sure.high == 1
    assert (turned.fusion, turned.seed, turned.rest) == (0, 1, 0)
    assert shares(np.full((3, 3), 0.9)) is None
    assert fusion_share(np.array([[0.5, 0.5, 0.5], [0.5, 0.5, 0.6]])) is None  # without the last seed all are equal
    crossed = np.stack([by_fusion, by_fusion[::-1]])
    assert with_conditions(crossed) == {"condition": 0, "fusion": 0, "together": 1, "rest": 0}
    with pytest.raises(DataError, match="all accuracies are equal"):
        with_conditions(np.full((2, 3, 3), 0.5))
    with pytest.raises(DataError, match="2 groups"):
        fusion_share(np.array([[0.1, 0.2], [0.3, 0.5]]))


def test_the_share_by_chance_is_that_of_chance() -> None:
    random = np.random.default_rng(0)
    found = [shares(random.normal(size=(9, 5))) for _ in range(300)]
    assert np.mean([one.fusion for one in found if one]) == pytest.approx(by_chance(9, 5), abs=0.01)


# --- the study -------------------------------------------------------------------------------------------------------


@pytest.mark.row("S0-21")
@pytest.mark.row("S0-C12")
@pytest.mark.row("S0-C13")
@pytest.mark.row("S0-C15")
@pytest.mark.row("S3-C06")
def test_a_run_publishes_every_score_with_its_settings(tmp_path: Path) -> None:
    study, seen = tiny(), list[Event]()
    found = study.run(tmp_path, events=Events(None, listeners=(seen.append,)))
    assert read_json(tmp_path / "results.json") == json.loads(json.dumps(found))
    assert FusionStudy(**found["spec"]) == study
    # additive, xor; small three ways; shifted, trained two ways; one more rate. Three fusions, the last only one.
    assert found["trained"] == 3 * (3 * (2 + 3 + 2) + 1)
    assert len(found["scores"]) == 3 * (2 + 3 + 2 * (3 + 1)) + 2
    for score in found["scores"]:
        assert len(score["seeds"]) == 3
        assert score["low"] <= score["value"] <= score["high"]
        assert score["value"] == pytest.approx(sum(score["seeds"]) / 3)
        assert 0.5 < score["ceiling"] <= 1
    for one in found["scores"]:
        if one["part"] == "missing" and one["drop"] == 0.5:
            ends = [
                s["value"]
                for s in found["scores"]
                if s["part"] == "missing" and (s["fusion"], s["trained"]) == (one["fusion"], one["trained"])
                if s["drop"] in (0.0, 1.0) and not s["noise"]
            ]
            assert min(ends) - 0.3 <= one["value"] <= max(ends) + 0.3
    assert len(found["gradients"]) == 3 * 3 * 2
    assert len(found["differences"]) == 2 * 3 + (2 + 1)
    assert len(found["variance"]["conditions"]) == 2 + 3 + 2 * 2
    assert sum(found["variance"]["overall"].values()) == pytest.approx(1, abs=0.003)
    assert {(c["fusion"], c["d"]) for c in found["costs"]} == {(name, d) for name in study.fusions for d in (8, 512)}
    tables = (tmp_path / "results.md").read_text()
    assert tables == markdown(found)
    for words in (
        "interaction:",
        "missing, shifted, trained with all",
        "learning rates",
        "bilinear: noise x100",
        "noise of 3",
    ):
        assert words in tables
    assert read_done(tmp_path) is not None
    assert [e.fields["done"] for e in seen if e.kind == "progress"] == list(range(1, found["trained"] + 1))


@pytest.mark.parametrize("name", ["bilinear", "attention"])
def test_a_training_depends_on_nothing_before_it(name: FusionName) -> None:
    """So that it is the same in any order and in any process."""
    study = tiny()
    jobs = [Job(fusion=name, setting=Setting(task="xor", trained=0.3, lr=0.01), seed=seed) for seed in (0, 1)]
    first, again = [[trial(study, job) for job in order] for order in (jobs, jobs[::-1])]
    for one, other in zip(first, again[::-1], strict=True):
        assert (one.loss, one.accuracy, one.noisy, one.gradients) == (
            other.loss,
            other.accuracy,
            other.noisy,
            other.gradients,
        )
    assert first[0].loss != first[1].loss


def test_a_training_that_diverges_is_said_and_nothing_is_left_out(tmp_path: Path) -> None:
    seen: list[Event] = []
    study = tiny(
        steps=8,
        fusions=("bilinear",),
        interaction=Interaction(tasks=()),
        missing=Missing(tasks=()),
        rates=Rates(fusions=("bilinear",), lrs=(1e30,)),
    )
    found = study.run(tmp_path, events=Events(None, listeners=(seen.append,)))
    said = [e.text for e in seen if e.kind == "warning"]
    assert len(said) == found["diverged"] == 3
    assert said[0].startswith("bilinear on xor at rate 1e+30 diverged with seed 0")
    assert "missing" not in (tmp_path / "results.md").read_text().split("differences")[0]


def test_settings_that_cannot_be() -> None:
    with pytest.raises(ValidationError, match="rates of gated, which fusions does not name"):
        FusionStudy(fusions=("bilinear",), rates=Rates(fusions=("gated",)))
    with pytest.raises(ValidationError, match="seeds"):
        FusionStudy(seeds=2)
    with pytest.raises(ValidationError, match="drops"):
        Missing(drops=(1.5,))


def test_the_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    quick = ["seeds=3", "rows=8", "steps=1", "workers=1", "fusions=[gated,bilinear]", "rates.fusions=[]"]
    quick += ["interaction.tasks=[xor]", "scale.norms=[]", "missing.tasks=[]"]
    assert main(["study", "fusion", *quick, "--runs", str(tmp_path)]) == 0
    assert "| bilinear " in capsys.readouterr().out
    assert "seeds: 3" in (tmp_path / "fusion-0001" / "study.yaml").read_text()
    assert main(["study", "fusion", *quick, "--runs", str(tmp_path), "--json"]) == 0
    said = json.loads(capsys.readouterr().out)
    assert said["folder"].endswith("fusion-0002")
    assert said["study"] == "fusion"


# --- what was published ----------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def published() -> dict[str, Any]:
    return read_json(ROOT / "benchmarks" / "results" / "fusion.json")


@pytest.mark.row("S0-21")
@pytest.mark.row("S0-C13")
@pytest.mark.row("S3-C06")
def test_the_page_shows_the_published_results_of_todays_defaults(published: dict[str, Any]) -> None:
    assert FusionStudy(**published["spec"]) == FusionStudy()
    page = (ROOT / "docs" / "fusion.md").read_text(encoding="utf-8")
    for part in markdown(published).split("\n\n"):
        assert part.strip() in page


@pytest.mark.row("S0-C12")
@pytest.mark.row("S0-C15")
def test_published_what_has_to_hold_by_construction(published: dict[str, Any]) -> None:
    xor = {s["fusion"]: s for s in published["scores"] if (s["part"], s["task"]) == ("interaction", "xor")}
    for name in (*LINEAR, *APART):
        assert abs(xor[name]["value"] - 0.5) < 0.06
    assert xor["low-rank"]["low"] > 0.75
    at_start = {
        (g["fusion"], g["factor"], g["norm"]): g["value"] for g in published["gradients"] if g["when"] == "start"
    }
    assert at_start["concat-linear", 100.0, "none"] < 0.05
    assert at_start["concat-linear", 100.0, "rms"] > 0.3
    ceilings = [s for s in published["scores"] if s["part"] == "missing"]
    assert all(s["low"] <= s["ceiling"] + 0.01 for s in ceilings)
    assert {len(s["seeds"]) for s in published["scores"]} == {5}
