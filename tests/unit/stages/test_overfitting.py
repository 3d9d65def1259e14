"""A stage that learns by heart, judged by other concepts: it ends near where it is best, and that model is kept."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from tests.rank_script import cases_of
from tests.unit.stages.overfitting import EVERY, PATIENCE, SAMPLES, STEPS

pytestmark = pytest.mark.real

Run = dict[str, Any]


def runs(root: Path, monkeypatch: pytest.MonkeyPatch, *, seeds: list[int], forms: list[str]) -> dict[str, Any]:
    """Of each seed and form, without the checks of types at every call; features are made anew in a home of its own."""
    from plait.core.packages import home

    own = root / "home"
    own.mkdir()
    for shared in ("packages", "converted"):
        if (home() / shared).exists():
            (own / shared).symlink_to(home() / shared)
    monkeypatch.setenv("PLAIT_HOME", str(own))
    return cases_of(Path(__file__).with_name("overfitting.py"), str(root), json.dumps(seeds), json.dumps(forms))


def optimum(curve: dict[str, float]) -> int:
    return int(min(curve, key=curve.__getitem__))


def check(found: dict[str, Run]) -> None:
    """Oracles: the curve of the run that did not stop, and the loss of the saved model by torch's cross-entropy."""
    whole, early = found["to the end"], found["early"]
    curve, told = whole["curve"], early["summary"]["validation"]
    assert whole["summary"]["steps"] == STEPS
    assert curve[str(STEPS)] > min(curve.values()), "it overfits: the last model is not the best"
    assert abs(told["step"] - optimum(curve)) <= PATIENCE * EVERY
    assert early["summary"]["steps"] == min(STEPS, told["step"] + PATIENCE * EVERY), "patience, and not a step more"
    assert early["curve"] == {step: value for step, value in curve.items() if int(step) <= told["steps"]}
    for run in (whole, early):  # the best is kept whether or not it stopped
        judged = run["summary"]["validation"]
        assert run["summary"]["checkpoint"] == f"checkpoints/{judged['step']:06d}"
        assert judged["evaluation"] == run["curve"][str(judged["step"])] == min(run["curve"].values())
        assert run["kept"] == pytest.approx(judged["evaluation"], rel=1e-4)
        assert judged["gap"] == judged["evaluation"] - run["training"][str(judged["step"])]
        assert judged["evaluation"] < math.log(SAMPLES), "better than chance"


def gap(run: Run, step: int) -> float:
    return run["curve"][str(step)] - run["training"][str(step)]


@pytest.mark.row("S4-63")
def test_it_stops_at_the_optimum_of_validation(
    packages: Callable[[str], Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    packages("twemoji")
    found = runs(tmp_path, monkeypatch, seeds=[0], forms=["plain"])["0"]["plain"]
    check(found)
    assert EVERY < optimum(found["to the end"]["curve"]) < STEPS / 2


@pytest.mark.slow
@pytest.mark.row("S4-63")
@pytest.mark.row("S3-29")
def test_over_three_seeds_with_an_average_and_with_dropout(
    packages: Callable[[str], Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    packages("twemoji")
    found = runs(tmp_path, monkeypatch, seeds=[0, 1, 2], forms=["plain", "average", "dropout"])
    for seed in ("0", "1", "2"):
        for form in ("plain", "average"):
            check(found[seed][form])
        plain, dropped = (found[seed][form]["to the end"] for form in ("plain", "dropout"))
        best = plain["summary"]["validation"]
        # What is learned by heart grows: stopping leaves less of it, and so does dropout after as many steps.
        assert best["gap"] < gap(plain, STEPS)
        assert gap(dropped, STEPS) < gap(plain, STEPS)
        # An average of weights is behind them: its optimum comes later, and it is smoother around it.
        assert optimum(found[seed]["average"]["to the end"]["curve"]) >= best["step"]
