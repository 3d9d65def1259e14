"""Alerts: the rule against simulated losses and scipy's regression; a resumed run says the same."""

from __future__ import annotations

import math
import random
from pathlib import Path

import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

from plait.core.events import Events
from plait.core.files import read_jsonl
from plait.training.alerts import Alerts, most_fall
from plait.training.monitor import Cost, Monitor, Plan

pytestmark = pytest.mark.light


def said(losses: list[float], *, rate: float = 1.0, wait: float = 0.0) -> list[tuple[int, str]]:
    alerts = Alerts(len(losses))
    found = []
    for step, loss in enumerate(losses, 1):
        record = {"step": step, "loss": loss, "lr": rate, "data_wait": wait, "seconds": 1.0}
        found += [(step, alert.kind) for alert in alerts.record(record)]
    return found


def noisy(draw: random.Random, mean: float, share: float = 0.05) -> float:
    return draw.gauss(mean, share * mean)


@pytest.mark.row("S4-58")
@pytest.mark.row("S4-60")
def test_a_loss_that_stays_is_a_plateau_said_once_and_soon() -> None:
    for seed in range(20):
        draw = random.Random(seed)
        losses = [noisy(draw, 2.0 + 5.0 * math.exp(-step / 50), 0.02) for step in range(2000)]
        ((step, kind),) = said(losses)
        assert kind == "plateau"
        assert 500 < step <= 1500


@pytest.mark.parametrize(("exponent", "share"), [(0.1, 0.02), (0.1, 0.1), (0.3, 0.3)])
def test_a_loss_that_falls_as_a_power_of_the_step_is_none(exponent: float, share: float) -> None:
    alarms = 0
    for seed in range(50):
        draw = random.Random(seed)
        alarms += bool(said([noisy(draw, 5.0 * step**-exponent, share) for step in range(1, 1001)]))
    assert alarms <= 2


def test_short_runs_say_nothing() -> None:
    assert not said([1.0] * 399)
    assert not said([0.0] * 1000)  # nothing is left to fall
    assert not said([math.nan] * 1000)


def test_a_loss_settles_where_the_rate_has_fallen() -> None:
    alerts = Alerts(1000)
    found = []
    for step in range(1, 1001):
        rate = 1.0 if step < 200 else 0.05
        found += alerts.record({"step": step, "loss": 5.0 - step / 100 if step < 200 else 3.0, "lr": rate})
    assert not found


@given(st.lists(st.floats(-100, 100), min_size=10, max_size=10))
def test_the_bound_is_that_of_a_fitted_line(means: list[float]) -> None:
    stats = pytest.importorskip("scipy.stats")
    assume(max(means) > min(means))
    line = stats.linregress(range(10), means)
    expected = 10 * (-line.slope + stats.t.ppf(0.995, 8) * line.stderr)
    assert most_fall(means) == pytest.approx(expected, rel=1e-3, abs=1e-3)


@pytest.mark.row("S4-58")
def test_a_loader_that_starves_is_said_once_with_what_to_do() -> None:
    assert said([1.0 / step for step in range(1, 120)], wait=0.3) == [(50, "starving")]
    assert not said([1.0 / step for step in range(1, 120)], wait=0.1)
    alerts = Alerts(60)
    (alert,) = [one for _ in range(50) for one in alerts.record({"data_wait": 0.4, "seconds": 2.0})]
    assert "40% of the time" in alert.text
    assert "trainer.workers" in alert.text


def test_one_stall_is_no_starving() -> None:
    alerts = Alerts(200)
    found = []
    for step in range(1, 200):
        record = {"step": step, "data_wait": 0.99 if step == 60 else 0.0, "seconds": 100.0 if step == 60 else 1.0}
        found += alerts.record(record)
    assert not found


COST = Cost(samples=1, tokens=1, wait_s=0.5, work_s=0.5)


def work(folder: Path, first: int, last: int) -> list[tuple[int, str]]:
    """Steps of a run of 100 whose data are waited for half of the time; what its monitor warns of."""
    seen: list = []
    events = Events(listeners=(seen.append,))
    monitor = Monitor(folder, Plan(task="t", total=100), step=first - 1, events=events)
    for step in range(first, last + 1):
        monitor.step(step, {"loss": 1.0 / step}, COST)
    return [(e.fields["step"], e.fields["alert"]) for e in seen if e.kind == "warning"]


@pytest.mark.parametrize(
    ("killed", "saved", "then"), [(60, 55, []), (60, 30, [(50, "starving")]), (40, 40, [(50, "starving")])]
)
def test_a_resumed_run_says_what_one_that_ran_through_says(
    tmp_path: Path, killed: int, saved: int, then: list[tuple[int, str]]
) -> None:
    work(tmp_path, 1, killed)
    assert work(tmp_path, saved + 1, 100) == then
    assert [record["step"] for record in read_jsonl(tmp_path / "metrics.jsonl")] == list(range(1, 101))
