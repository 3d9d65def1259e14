"""The study of encoders: its truths, its towers and what they cost, what is exact about moved pictures, the command."""

import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import ValidationError
from torch import Tensor, nn

from plait.cli.main import main
from plait.core.events import Event, Events
from plait.core.files import read_done, read_json
from plait.models.towers.vit import VisionTransformer
from plait.studies.encoders import ENCODERS, Alignment, DataSizes, EncoderName, Encoders, Probes, Shift
from plait.studies.seeing.advice import advised
from plait.studies.seeing.aligning import WORDS, Pair, align, aligned, texts_of
from plait.studies.seeing.findings import crossover, findings, front, seeds_of, slope
from plait.studies.seeing.layers import READ, attention_distances, layer_scores, linear_probe, pixel_distances
from plait.studies.seeing.moving import equivariances, moved_apart
from plait.studies.seeing.scenes import CELL, COLORS, FINE, MOST, SIDE, SKIP, Scenes, draw_scenes
from plait.studies.seeing.students import Student
from plait.studies.seeing.tables import markdown
from plait.studies.seeing.towers import GRID, block_macs, growing_costs, maps, published_costs, tower, tower_cost
from plait.studies.seeing.training import Training, average_precision, loss_of, train
from plait.studies.seeing.trials import TASKS, Job, Outcome, jobs_of, trial
from plait.studies.verdicts import verdict

ROOT = Path(__file__).parents[3]


def scenes(rows: int = 400, *, seed: int = 0, **where: Any) -> Scenes:
    return draw_scenes(rows, torch.Generator().manual_seed(seed), **where)


def tiny(**given_: Any) -> Encoders:
    few: dict[str, Any] = {
        "seeds": 3,
        "steps": 2,
        "batch": 6,
        "rows": 20,
        "workers": 1,
        "sizes": (28, 56),
        "lrs": (1e-3, 3e-3),
    }
    parts = {
        "data": DataSizes(pictures=(8,)),
        "shift": Shift(steps=1),
        "align": Alignment(steps=1, batch=4, rows=8),
        "probes": Probes(rows=60),
    }
    return Encoders(**{**few, **parts, **given_})


# --- truths ----------------------------------------------------------------------------------------------------------

PALETTE = torch.tensor([[0.9, 0.1, 0.1], [0.1, 0.8, 0.1], [0.15, 0.2, 1.0], [0.9, 0.9, 0.1], [0.9, 0.1, 0.9]])


def seen(picture: Tensor) -> dict[int, tuple[int, int]]:
    """By brute force from pixels: color → column of the cell of 8 pixels and shape of the object."""
    found: dict[int, tuple[int, int]] = {}
    apart = (picture[:, None] - PALETTE.T[:, :, None, None]).norm(dim=0)
    for color in range(COLORS):
        for cell in range(1, 15):
            row, column = CELL * (cell // 4), CELL * (cell % 4)
            here = apart[color, row : row + CELL, column : column + CELL] < 0.02
            if here.sum() >= 20:  # a cross has 20 pixels, a ring 32, a square 36
                found[color] = (cell % 4, {36: 0, 20: 1, 32: 2}[int(here.sum())])
    return found


@pytest.mark.row("S0-C04")
def test_answers_are_those_of_a_solver_that_looks_at_pixels() -> None:
    """Objects have no noise; everything asked about them follows from the pixels."""
    drawn = scenes(120)
    for i in range(len(drawn)):
        things = seen(drawn.pixels[i])
        assert 2 <= len(things) <= MOST
        assert int(drawn.targets["count"][i]) == sum(shape == 0 for _, shape in things.values())
        for a in range(COLORS):
            assert int(drawn.targets["shape"][i, a]) == (things[a][1] if a in things else SKIP)
            assert int(drawn.columns[i, a]) == (things[a][0] if a in things else -1)
            for b in range(COLORS):
                left, same = (int(drawn.targets[name][i, a, b]) for name in ("left", "same"))
                if a == b or a not in things or b not in things:
                    assert left == same == SKIP
                    continue
                assert left == (SKIP if things[a][0] == things[b][0] else int(things[a][0] < things[b][0]))
                assert same in (SKIP, int(things[a][1] == things[b][1]))
                assert same != SKIP or things[a][1] != things[b][1]


@pytest.mark.row("S0-C06")
@pytest.mark.row("S0-C08")
def test_marks_and_the_far_color_can_be_found_by_looking() -> None:
    drawn = scenes(300)
    light = (drawn.pixels - 0.7).abs().amax(1) < 1e-4
    found = light[:, :-1, :-1] & light[:, 1:, 1:] & ~light[:, :-1, 1:] & ~light[:, 1:, :-1]
    for i in range(len(drawn)):
        cells = {int(r) // FINE * GRID + int(c) // FINE for r, c in found[i].nonzero()}
        assert cells == set(drawn.marks[i].nonzero()[:, 0].tolist())
        corner = drawn.pixels[i, :, :CELL, :CELL].flatten(1).T
        apart = torch.cdist(corner, 0.6 * PALETTE)
        assert int((apart < 0.01).sum(0).argmax()) == int(drawn.targets["far"][i])
    assert 1.8 < float(drawn.marks.sum(1).mean()) < 2.2


def test_yes_is_as_frequent_as_no() -> None:
    drawn = scenes(3000)
    for name in ("left", "same"):
        target = drawn.targets[name]
        assert float(target[target != SKIP].double().mean()) == pytest.approx(0.5, abs=0.02)
    assert all(float((drawn.targets["far"] == color).double().mean()) < 0.23 for color in range(COLORS))


@pytest.mark.row("S2-C03")
def test_objects_stand_where_they_may() -> None:
    assert scenes(200, region="left").columns.max() == 1
    right = scenes(200, region="right").columns
    assert int(right[right >= 0].min()) == 2
    anywhere = scenes(200).columns
    assert set(anywhere.unique().tolist()) == {-1, 0, 1, 2, 3}


@settings(deadline=None, max_examples=20)
@given(st.integers(2, 60), st.integers(0, 999))
def test_average_precision_is_its_definition(n: int, seed: int) -> None:
    random = np.random.default_rng(seed)
    scores, positive = random.permutation(n).astype(float), random.random(n) < 0.4
    positive[0] = True
    order = np.argsort(-scores)
    ranks = [rank for rank, at in enumerate(order, 1) if positive[at]]
    expected = np.mean([number / rank for number, rank in enumerate(ranks, 1)])
    assert average_precision(torch.tensor(scores), torch.tensor(positive)) == pytest.approx(expected)


# --- costs -----------------------------------------------------------------------------------------------------------


@pytest.mark.row("S0-C04")
@pytest.mark.row("S0-C05")
@pytest.mark.row("S0-C06")
@pytest.mark.row("S0-C08")
def test_the_four_towers_cost_alike() -> None:
    flops = [tower_cost(name).flops for name in ENCODERS]
    assert max(flops) / min(flops) < 1.15
    for name in ENCODERS:
        torch.manual_seed(0)
        found = maps(tower(name), torch.rand(2, 3, SIDE, SIDE))
        assert tuple(found[0].shape[2:]) == (GRID, GRID)


@pytest.mark.row("S2-C02")
def test_counted_operations_are_the_published_ones() -> None:
    found = {one["encoder"]: one for one in published_costs()}
    for one in found.values():
        assert one["gmacs"] == pytest.approx(one["published_gmacs"], rel=0.02), one["encoder"]
    assert found["vit-b/16"]["flops"] > 4 * found["resnet-50"]["flops"]
    cells = 14 * 14
    blocks = 12 * block_macs(cells + 1, 768, seen=cells + 1) + cells * 768 * 768
    assert found["vit-b/16"]["flops"] == 2 * blocks


@pytest.mark.row("S0-C05")
def test_attention_is_quadratic_in_vit_and_linear_in_swin() -> None:
    found = {(one["encoder"], one["size"]): one["flops"] for one in growing_costs((112, 224, 448))}
    d = 96
    for size in (112, 224, 448):
        cells = (size // 4) ** 2
        embedding = cells * 48 * d
        assert found["vit", size] == 2 * (2 * block_macs(cells, d, seen=cells) + embedding)
        assert found["swin", size] == 2 * (2 * block_macs(cells, d, seen=49) + embedding)
    assert found["swin", 448] == 4 * found["swin", 224] == 16 * found["swin", 112]
    ratios = [found["vit", size] / found["swin", size] for size in (112, 224, 448)]
    assert ratios[1] > 2 * ratios[0]
    assert ratios[2] > 3 * ratios[1]


# --- moved pictures, layers ------------------------------------------------------------------------------------------


@pytest.mark.row("S2-C03")
@settings(deadline=None, max_examples=10)
@given(st.integers(0, 31), st.integers(1, 3), st.integers(0, 99))
def test_a_circular_convolution_moves_with_the_picture_by_any_number_of_pixels(by: int, reach: int, seed: int) -> None:
    torch.manual_seed(seed)
    layer = nn.Conv2d(3, 4, 2 * reach + 1, padding=reach, padding_mode="circular").double()
    pixels = torch.rand(2, 3, SIDE, SIDE, dtype=torch.float64)
    assert moved_apart(layer, pixels, by=by, cell=1) < 1e-12


@pytest.mark.row("S2-C03")
def test_what_breaks_moving_are_positions_borders_and_half_patches() -> None:
    found = {one["what"]: one["change"] for one in equivariances()}
    assert found["convolution, circular padding"] < 1e-6
    assert found["convolution, zero padding"] > 0.05
    assert found["vit, no positions"] < 1e-5  # the contrary case: patches are a set
    assert min(found["vit, learned positions"], found["vit, sines and cosines"]) > 0.02
    assert found["cnn of the study, finest map"] > 0.05


@pytest.mark.row("S2-C03")
def test_distances_of_attention_at_their_ends() -> None:
    apart = pixel_distances()
    assert float(apart.diagonal().max()) == 0
    assert float(apart[0, -1]) == pytest.approx(2**0.5 * (SIDE - FINE))
    torch.manual_seed(0)
    model = tower("vit")
    assert isinstance(model, VisionTransformer)
    with torch.no_grad():
        for weight in model.parameters():
            weight.zero_()  # all scores are equal: every patch looks everywhere
    found = attention_distances(model, torch.rand(2, 3, SIDE, SIDE))
    assert found == pytest.approx([float(apart.mean())] * 4, rel=1e-5)


@pytest.mark.row("S3-C01")
def test_a_linear_probe_reads_what_is_linear_and_no_more() -> None:
    x = torch.randn(3000, 2, generator=torch.Generator().manual_seed(0))
    linear, crossed = (x[:, 0] > x[:, 1]).long(), (x[:, 0] * x[:, 1] > 0).long()

    def asked(target: Tensor) -> float:
        return linear_probe((x[:2000], target[:2000]), (x[2000:], target[2000:]), classes=2)

    assert asked(linear) > 0.97
    assert asked(crossed) < 0.6


@pytest.mark.row("S3-C01")
def test_colors_are_in_patches_before_any_training_and_far_ones_are_not() -> None:
    torch.manual_seed(0)
    model = tower("vit")
    assert isinstance(model, VisionTransformer)
    found = layer_scores(model, scenes(1500))
    assert len(found) == 5
    assert found[0]["color"] > 0.8
    assert found[0]["far"] < 0.35  # a patch knows nothing of the other corner; chance is 20 %


@pytest.mark.row("S0-C07")
def test_texts_say_what_is_in_the_picture_and_training_aligns_them() -> None:
    drawn = scenes(64)
    words = texts_of(drawn)
    assert torch.equal((words > 0).sum(1), 2 * (drawn.columns >= 0).sum(1))
    assert len(words.unique(dim=0)) > 60
    for i, word in enumerate(words[:, 0].tolist()):  # red
        assert word == (0 if int(drawn.columns[i, 0]) < 0 else 1 + int(drawn.targets["shape"][i, 0]))
    assert int(words.max()) < WORDS
    torch.manual_seed(0)
    pair = Pair("cnn")
    before = aligned(pair, drawn)
    align(pair, Training(steps=30, batch=32, lr=3e-3), generator=torch.Generator().manual_seed(1))
    assert aligned(pair, drawn)["r@1"] > before["r@1"] + 0.05


# --- students and verdicts -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ENCODERS)
def test_a_student_learns(name: EncoderName) -> None:
    torch.manual_seed(0)
    student, drawn = Student(name), scenes(64)
    with torch.no_grad():
        before = float(loss_of(student.eval()(drawn.pixels), drawn))
    train(student, Training(steps=12, batch=16, lr=3e-3), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        assert float(loss_of(student.eval()(drawn.pixels), drawn)) < 0.9 * before


def test_readers_are_the_same_for_all_towers() -> None:
    def readers(name: EncoderName) -> int:
        return sum(w.numel() for at, w in Student(name).named_parameters() if not at.startswith(("tower.", "neck.")))

    assert len({readers(name) for name in ENCODERS}) == 1


def test_verdicts_follow_from_intervals() -> None:
    assert [verdict(*ends) for ends in ((0.1, 0.2), (-0.2, -0.1), (-0.1, 0.1), (float("nan"), 1.0))] == [
        "supported",
        "contradicted",
        "not shown",
        "not shown",
    ]
    assert verdict(-0.01, 0.1, limit=-0.02) == "supported"
    assert front({"a": (1.0, 0.0), "b": (1.0, 0.0), "c": (0.9, 0.0), "d": (0.0, 0.1)}) == ["a", "b", "d"]
    assert slope([250, 1000, 4000], [0.5, 0.6, 0.7]) == pytest.approx(0.05)


@pytest.mark.row("S0-06")
def test_advice_follows_the_rules_of_the_command() -> None:
    assert advised("classify", 1000) == advised("dense", 1000) == "cnn"  # few pictures: convolutions first
    many = 10_000_000  # what the rule says nothing about
    assert advised("dense", many) == "cnn"  # maps of several sizes, as Swin has, in the order of the list
    assert advised("classify", many) == ENCODERS[0]


@pytest.mark.row("S2-C01")
def test_where_two_curves_cross() -> None:
    def results(vit: tuple[float, ...]) -> dict[str, Any]:
        rows = [("data", 10), ("data", 20), ("main", 0)]
        scores = [
            {"part": part, "pictures": n, "place": "as trained", "encoder": name, "task": task, "seeds": [value] * 3}
            for name, values in (("cnn", (0.5, 0.6, 0.7)), ("vit", vit))
            for (part, n), value in zip(rows, values, strict=True)
            for task in TASKS
        ]
        return {"spec": {"data": {"pictures": (10, 20)}, "steps": 10, "batch": 4}, "scores": scores}

    assert crossover(results((0.4, 0.5, 0.6))) is None
    assert crossover(results((0.4, 0.5, 0.8))) == 40
    assert crossover(results((0.6, 0.5, 0.8))) == 40
    assert crossover(results((0.4, 0.6, 0.8))) == 20


# --- the study -------------------------------------------------------------------------------------------------------

CLAIMS = ("S0-06", "S0-C04", "S0-C05", "S0-C06", "S0-C07", "S0-C08", "S2-C01", "S2-C02", "S2-C03", "S3-C01")


@pytest.mark.row("S2-C01")
@pytest.mark.row("S2-C02")
@pytest.mark.row("S2-C03")
@pytest.mark.row("S0-C04")
@pytest.mark.row("S0-C05")
@pytest.mark.row("S0-C06")
@pytest.mark.row("S0-C07")
@pytest.mark.row("S0-C08")
@pytest.mark.row("S3-C01")
@pytest.mark.row("S0-06")
def test_the_command_says_a_verdict_for_every_claim(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    quick = [
        "seeds=3",
        "steps=2",
        "batch=6",
        "rows=20",
        "workers=1",
        "sizes=[28,56]",
        "data.pictures=[8]",
        "shift.steps=1",
    ]
    quick += ["lrs=[0.001,0.003]", "align.steps=1", "align.batch=4", "align.rows=8"]
    assert main(["study", "encoders", *quick, "probes.rows=60", "--runs", str(tmp_path)]) == 0
    said = capsys.readouterr().out
    folder = tmp_path / "encoders-0001"
    found = read_json(folder / "results.json")
    assert Encoders(**found["spec"]) == tiny()
    assert len(jobs_of(tiny())) == 3 * (4 + 2 + 2 + 2)
    assert found["trained"] == len(jobs_of(tiny())) + 2 * (4 + 2)
    taken = [(row["part"], row["encoder"]) for row in found["rates"] if row["taken"]]
    assert sorted(taken) == [("align", "cnn"), ("align", "vit"), *(("main", name) for name in sorted(ENCODERS))]
    assert len(found["scores"]) == len(TASKS) * (4 + 2 + 2 * 2) + 2 * 2
    for score in found["scores"]:
        assert len(score["seeds"]) == 3
        assert score["low"] <= score["value"] <= score["high"]
    assert {one["claim"] for one in found["findings"]} == set(CLAIMS)
    assert findings(found) == found["findings"]
    assert (folder / "results.md").read_text() == markdown(found)
    assert "S0-C08" in said
    assert read_done(folder) is not None


def test_a_training_depends_on_nothing_before_it() -> None:
    jobs = [Job(part="main", encoder="vit", seed=1, lr=1e-3), Job(part="shift", encoder="cnn", seed=0, lr=1e-3)]
    first, again = [[trial(tiny(), job) for job in order] for order in (jobs, jobs[::-1])]
    for one, other in zip(first, again[::-1], strict=True):
        assert (one.loss, one.scores, one.moved, one.layers) == (other.loss, other.scores, other.moved, other.layers)


def test_a_training_that_diverges_is_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fake(study: Encoders, job: Job) -> Outcome:
        layer = {"distances": [1.0] * 4, "read": [dict.fromkeys(READ, 0.5)] * 5}
        scores, loss = dict.fromkeys((*TASKS, "r@1", "cka"), 0.5), math.nan if job.encoder == "cnn" else 1.0
        return Outcome(
            job=job, loss=loss, cpu_s=0.0, scores=scores, moved=scores, layers={"start": layer, "end": layer}
        )

    monkeypatch.setattr("plait.studies.seeing.trials.trial", fake)
    said: list[Event] = []
    found = tiny().run(tmp_path, events=Events(None, listeners=(said.append,)))
    warnings = [e.text for e in said if e.kind == "warning"]
    assert len(warnings) == found["diverged"] == 3 * 4
    assert warnings[0].startswith("cnn (main) diverged with seed 0")
    assert {one["verdict"] for one in found["findings"]} <= {"supported", "contradicted", "not shown"}


def test_settings_that_cannot_be() -> None:
    with pytest.raises(ValidationError, match="lacks cnn or vit"):
        Encoders(shift=Shift(encoders=("swin",)))
    with pytest.raises(ValidationError, match="seeds"):
        Encoders(seeds=2)
    with pytest.raises(ValidationError, match="sizes"):
        Encoders(sizes=(100,))
    with pytest.raises(ValidationError, match="have to grow, and to end below steps x batch = 4"):
        Encoders(steps=2, batch=2, data=DataSizes(pictures=(2, 4)))


# --- what was published ----------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def published() -> dict[str, Any]:
    return read_json(ROOT / "benchmarks" / "results" / "encoders.json")


@pytest.mark.row("S2-C01")
@pytest.mark.row("S2-C02")
@pytest.mark.row("S2-C03")
@pytest.mark.row("S0-C04")
@pytest.mark.row("S0-C05")
@pytest.mark.row("S0-C06")
@pytest.mark.row("S0-C07")
@pytest.mark.row("S0-C08")
@pytest.mark.row("S3-C01")
def test_the_page_shows_the_published_results_of_todays_defaults(published: dict[str, Any]) -> None:
    assert Encoders(**{**published["spec"], "workers": 0}) == Encoders()  # which changes no figure
    page = (ROOT / "docs" / "encoders.md").read_text(encoding="utf-8")
    for part in markdown(published).split("\n\n"):
        assert part.strip() in page
    assert {one["claim"] for one in published["findings"]} == set(CLAIMS)


def test_published_verdicts_follow_from_published_scores(published: dict[str, Any]) -> None:
    again = findings(published)
    assert [one["verdict"] for one in again] == [one["verdict"] for one in published["findings"]]
    flops = [one["flops"] for one in published["costs"]]
    assert flops == [tower_cost(name).flops for name in ENCODERS]
    assert all(len(seeds_of(published, name, ("marks",))) == published["spec"]["seeds"] for name in ENCODERS)
