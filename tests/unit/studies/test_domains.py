"""The study of domain shifts: its pictures, how it chooses, what it pairs, its verdicts, and the command."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import ValidationError

from plait.cli.main import main
from plait.core.errors import NumericsError
from plait.core.events import Event, Events
from plait.core.files import read_done, read_json
from plait.core.tensors import IGNORE
from plait.studies.domains import Arm, Case, DomainShift, Shift
from plait.studies.shifting.digits import CLASSES, LOOKS, SIDE, Digits, class_shares, draw_digits
from plait.studies.shifting.findings import claims, differences
from plait.studies.shifting.tables import markdown
from plait.studies.shifting.training import Domains, Training, right, train
from plait.studies.shifting.trials import Job, Outcome, _choose, drawn, trial

ROOT = Path(__file__).parents[3]
ARMS: tuple[Arm, ...] = DomainShift.model_fields["arms"].default
EQUAL = torch.ones(CLASSES)


def some(shift: Shift, rows: int, *, seed: int = 0, shares: torch.Tensor = EQUAL) -> Digits:
    return draw_digits(rows, torch.Generator().manual_seed(seed), look=LOOKS[shift], shares=shares)


def tiny(**given_: Any) -> DomainShift:
    cases = (Case(shift="background"), Case(shift="none", skewed=True))
    plain = {"cases": cases, "steps": 2, "batch": 8, "pool": 20, "held": 10, "rows": 10, "workers": 1}
    return DomainShift(**plain | {"d_hidden": 8, "d": 4} | given_)


# --- pictures --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("shift", LOOKS)
def test_pictures_are_of_their_class_whatever_their_look(shift: Shift) -> None:
    """The nearest mean of its own domain tells most of them: there is something to align."""
    one, other = some(shift, 1500), some(shift, 500, seed=1)
    assert one.pixels.shape == (1500, SIDE, SIDE)
    assert float(one.pixels.min()) >= 0
    assert float(one.pixels.max()) <= 1
    means = torch.stack([one.pixels[one.classes == c].mean(0) for c in range(CLASSES)]).flatten(1)
    found = torch.cdist(other.pixels.flatten(1), means).argmin(1)
    assert float((found == other.classes).double().mean()) > 0.5


@settings(deadline=None, max_examples=20)
@given(st.integers(0, 999))
def test_shares_of_classes_are_equal_or_halved_in_some_order(seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    assert torch.equal(class_shares(False, generator), torch.full((CLASSES,), 0.1))
    skewed = class_shares(True, generator).sort(descending=True).values
    torch.testing.assert_close(skewed[1:], skewed[:-1] / 2)
    assert float(skewed.sum()) == pytest.approx(1)


def test_pictures_follow_the_shares() -> None:
    shares = class_shares(True, torch.Generator().manual_seed(3))
    found = some("none", 4000, shares=shares).classes.bincount(minlength=CLASSES) / 4000
    torch.testing.assert_close(found, shares, atol=0.03, rtol=0)


def test_all_cases_of_a_seed_have_one_source_and_pictures_differ() -> None:
    study = tiny()
    one, other = (drawn(study, case, 1) for case in study.cases)
    assert torch.equal(one.source.pixels, other.source.pixels)
    assert torch.equal(one.source_test.classes, other.source_test.classes)
    assert not torch.equal(one.target.pixels, other.target.pixels)
    assert not torch.equal(one.source.pixels[:10], one.held.pixels)
    assert not torch.equal(drawn(study, study.cases[0], 2).source.pixels, one.source.pixels)


# --- training --------------------------------------------------------------------------------------------------------


@pytest.mark.row("S0-C29")
@pytest.mark.parametrize("arm", ARMS)
def test_no_arm_sees_a_label_of_the_target(arm: Arm) -> None:
    source, target = some("none", 30), some("background", 30, seed=1)
    lied = replace(target, classes=(target.classes + 1) % CLASSES)
    training = Training(arm=arm, lr=0.05, strength=0.3, steps=4, batch=8, seed=0)
    first, again = (train(source, of, training, d_hidden=8, d=4).student.state_dict() for of in (target, lied))
    assert all(torch.equal(first[name], again[name]) for name in first)
    for batch in Domains(source=source, target=target, batch=8, seed=0).step_batches(3):
        assert (batch.labels[8:] == IGNORE).all()
        assert (batch.labels[:8] >= 0).all()


@pytest.mark.row("S0-C29")
def test_choosing_looks_at_nothing_of_the_target() -> None:
    study = tiny()
    case = study.cases[0]
    jobs = [
        Job(case=case, arm="coral", lr=lr, strength=s, seed=0, judged=True)
        for lr in study.lrs
        for s in study.strengths.coral
    ]
    assert len(jobs) == 4

    def outcome(job: Job, reverse: float, target: float) -> Outcome:
        return Outcome(job=job, source=1.0, target=target, reverse=reverse, trained=2, diverged=0, cpu_s=0.0)

    found: list[Job] = []
    for by in ((0.0, 0.1, 0.9, 0.2), (0.9, 0.0, 0.0, 1.0)):
        tried = [outcome(*one) for one in zip(jobs, (0.1, 0.4, 0.4, 0.2), by, strict=True)]
        found.append(_choose(study, {one.job: one for one in tried}, case=case, arm="coral"))
    assert found == [jobs[1], jobs[1]]  # the first of equals


def test_a_training_depends_on_nothing_before_it() -> None:
    """So that it is the same in any order and in any process."""
    study = tiny()
    jobs = [Job(case=study.cases[0], arm="dann", lr=0.05, strength=1.0, seed=seed, judged=True) for seed in (0, 1)]
    first, again = [[trial(study, job) for job in order] for order in (jobs, jobs[::-1])]
    for one, other in zip(first, again[::-1], strict=True):
        assert replace(one, cpu_s=0.0) == replace(other, cpu_s=0.0)


@pytest.mark.row("S0-53")
def test_alignment_raises_the_target_where_noise_is_new() -> None:
    """One seed at the study's size: far more than chance would give of 1,000 pictures."""
    source, target, test = some("none", 1000), some("noise", 1000, seed=1), some("noise", 1000, seed=2)
    found: dict[str, float] = {}
    for arm, strength in (("none", 0.0), ("dann", 0.3)):
        training = Training(arm=arm, lr=0.1, strength=strength, steps=200, batch=64, seed=0)
        found[arm] = right(train(source, target, training, d_hidden=64, d=32).student, test)
    assert found["dann"] > found["none"] + 0.04, found


# --- the study -------------------------------------------------------------------------------------------------------


@pytest.mark.row("S0-C29")
def test_a_run_publishes_every_score_and_candidate(tmp_path: Path) -> None:
    study, seen = tiny(arms=("none", "layer", "dann")), list[Event]()
    found = study.run(tmp_path, events=Events(None, listeners=(seen.append,)))
    assert read_json(tmp_path / "results.json") == json.loads(json.dumps(found))
    assert DomainShift(**found["spec"]) == study
    arms, cases, seeds = 3, 2, 5
    assert len(found["candidates"]) == arms * cases * 4
    assert sum(one["chosen"] for one in found["candidates"]) == arms * cases
    assert found["trained"] == arms * cases * 4 * 2 + (arms + 1) * cases * seeds
    assert len(found["scores"]) == (arms + 1) * cases
    for score in found["scores"]:
        for domain in ("source", "target"):
            one = score[domain]
            assert len(one["seeds"]) == seeds
            assert one["low"] <= one["value"] <= one["high"]
            assert one["value"] == pytest.approx(sum(one["seeds"]) / seeds)
    # By case and domain, and for the one case whose look alone differs as the mean of all.
    assert len(found["differences"]) == arms * cases * 2 + arms
    assert len(found["claims"]) == (arms - 1) * (2 + 1)
    assert {one["row"] for one in found["claims"]} == {"S0-C29"}
    tables = (tmp_path / "results.md").read_text()
    assert tables == markdown(found)
    for words in ("claims, each with its verdict", "target: % right", "hurts where the shares", "reverse validation"):
        assert words in tables
    assert read_done(tmp_path) is not None


def score(arm: str, case: str, shares: list[float], **kind: Any) -> dict[str, Any]:
    found = {"value": sum(shares) / len(shares), "seeds": shares}
    return {"arm": arm, "case": case, "shift": case, "skewed": False, "source": found, "target": found, **kind}


@pytest.mark.row("S0-C29")
def test_verdicts_follow_from_intervals_of_pairs() -> None:
    skew = {"shift": "none", "skewed": True}
    scores = [
        score("none", "noise", [0.5, 0.6, 0.7]),
        score("mmd", "noise", [0.6, 0.71, 0.8]),
        score("coral", "noise", [0.4, 0.6, 0.9]),
        score("none", "none + labels", [0.9, 0.8, 0.85], **skew),
        score("mmd", "none + labels", [0.8, 0.71, 0.75], **skew),
        score("coral", "none + labels", [0.95, 0.86, 0.9], **skew),
    ]
    found = {one["claim"]: one["verdict"] for one in claims(differences(scores))}
    assert found == {
        "mmd relieves noise": "supported",
        "coral relieves noise": "not shown",
        "mmd hurts where the shares of classes alone differ": "supported",
        "coral hurts where the shares of classes alone differ": "contradicted",
        "mmd relieves a shift of the look, mean of all": "supported",
        "coral relieves a shift of the look, mean of all": "not shown",
    }


def test_a_training_that_diverges_is_left_as_it_is() -> None:
    pictures = some("none", 20)
    training = Training(arm="none", lr=1e35, strength=0.1, steps=20, batch=8, seed=0)
    assert train(pictures, pictures, training, d_hidden=8, d=4).diverged


def test_trainings_that_diverge_are_said_and_count(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*_: object, **__: object) -> None:
        raise NumericsError("not finite", remedy="lower the rate")

    monkeypatch.setattr("plait.studies.shifting.training.fit", broken)
    seen: list[Event] = []
    study = tiny(arms=("none",), cases=(Case(shift="noise"),))
    found = study.collect(events=Events(None, listeners=(seen.append,)))
    said = [e.text for e in seen if e.kind == "warning"]
    assert found["diverged"] == found["trained"] == 4 * 2 + 2 * 5
    assert len(said) == 4 + 2 * 5
    assert said[0].startswith("none on noise at rate 0.03 and strength 0 diverged with seed 0")


def test_settings_that_cannot_be() -> None:
    with pytest.raises(ValidationError, match="seeds"):
        DomainShift(seeds=4)
    with pytest.raises(ValidationError, match="shift"):
        Case(shift="wind")  # pyright: ignore[reportArgumentType]


def test_the_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    quick = ["steps=1", "pool=8", "held=4", "rows=4", "batch=4", "workers=1", "arms=[mmd]"]
    quick += ["cases=[{shift: noise}]"]
    assert main(["study", "domain-shift", *quick, "--runs", str(tmp_path)]) == 0
    assert "| mmd " in capsys.readouterr().out
    assert "steps: 1" in (tmp_path / "domain-shift-0001" / "study.yaml").read_text()


# --- what was published ----------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def published() -> dict[str, Any]:
    return read_json(ROOT / "benchmarks" / "results" / "domain_shift.json")


@pytest.mark.row("S0-C29")
def test_the_page_shows_the_published_results_of_todays_defaults(published: dict[str, Any]) -> None:
    assert DomainShift(**published["spec"]) == DomainShift()
    page = (ROOT / "docs" / "domain_shift.md").read_text(encoding="utf-8")
    for part in markdown(published).split("\n\n"):
        assert part.strip() in page


@pytest.mark.row("S0-53")
@pytest.mark.row("S0-C29")
def test_published_verdicts_follow_from_published_scores(published: dict[str, Any]) -> None:
    assert published["differences"] == json.loads(json.dumps(differences(published["scores"])))
    assert published["claims"] == claims(published["differences"])
    assert {len(one[domain]["seeds"]) for one in published["scores"] for domain in ("source", "target")} == {5}
    skewed = [one for one in published["claims"] if "hurts" in one["claim"]]
    assert {one["claim"].split()[0] for one in skewed} == set(ARMS) - {"none"}
