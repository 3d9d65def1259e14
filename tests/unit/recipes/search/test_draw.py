"""What is drawn, and which trials end early: against a table made by hand, brute force, and Optuna left alone."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import optuna
import pytest
from hypothesis import given
from hypothesis import settings as limits
from hypothesis import strategies as st

from plait.recipes.search.draw import Running, Trial, best_of, importance
from plait.recipes.search.sweep import Sweep

pytestmark = pytest.mark.light

LR, RANK = "stages.tune.adapt.lr", "stages.tune.adapt.rank"


def sweep(**changes: Any) -> Sweep:
    plain: dict[str, Any] = {
        "recipe": "quickstart",
        "metric": "tune.evaluation",
        "take": "last",
        "method": "random",
        "search": {LR: {"low": 1e-4, "high": 1e-2, "log": True}, RANK: [4, 8, 16]},
    }
    return Sweep.model_validate(plain | changes)


def run_all(search: Sweep, curves: Sequence[Sequence[float]], steps: Sequence[int]) -> list[Trial]:
    """Trials with given values at given steps, each rebuilt from the records of those before it."""
    trials: list[Trial] = []
    for number, curve in enumerate(curves):
        running = Running(search, trials)
        step, value, state = 0, math.nan, "complete"
        for step, value in zip(steps, curve, strict=True):
            if not running.goes_on(step, value):
                state = "pruned"
                break
        told = {"value": None if math.isnan(value) else value, "step": step, "rungs": running.rungs}
        trials.append(Trial(number=number, values=running.values, state=state, **told))  # pyright: ignore[reportArgumentType]
    return trials


@pytest.mark.row("S3-28")
def test_the_promotion_rule_is_that_of_a_table_made_by_hand() -> None:
    # reduction 3, rungs after 2, 6 and 18 steps; smaller is better. At a rung a trial goes on if it is among the best
    # max(1, n // 3) of the n that came there so far, itself included.
    steps = (2, 6, 18)
    table = [
        # rung 0 (2 steps)                 rung 1 (6 steps)                  rung 2 (18 steps)
        ((0.90, 0.80, 0.70), "complete", 18),  # alone everywhere
        ((0.50, 0.85, 0.10), "pruned", 6),  # best of 2; then 0.85 of {0.80, 0.85}: not the best one
        ((0.70, 0.10, 0.10), "pruned", 2),  # second of 3: only one goes on
        ((0.40, 0.30, 0.75), "pruned", 18),  # best of 4; best of 3; 0.75 after 0.70: not the best
        ((0.60, 0.10, 0.10), "pruned", 2),  # fourth of 5
        ((0.45, 0.20, 0.65), "complete", 18),  # second of 6, two go on; best of 4; best of 3
        ((0.43, 0.25, 0.10), "pruned", 6),  # second of 7, two go on; 0.25 is second of 5: one goes on
    ]
    search = sweep(halving={"least": 2, "reduction": 3})
    trials = run_all(search, [curve for curve, _, _ in table], steps)
    assert [(t.state, t.step) for t in trials] == [(state, step) for _, state, step in table]
    best = best_of(search, trials)
    assert best is not None
    assert best.number == 5


def rule(seen: dict[int, list[float]], curve: Sequence[float], *, least: int, reduction: int, sign: int) -> int:
    """Steps of a trial by the definition; ``seen`` has the values of each rung so far."""
    rung = 0
    for step, value in enumerate(curve, 1):
        while step >= least * reduction**rung:
            there = seen.setdefault(rung, [])
            there.append(value)
            chosen = sorted(there, key=lambda v: sign * v)[: max(1, len(there) // reduction)]
            if sign * value > sign * chosen[-1]:
                return step
            rung += 1
    return len(curve)


@pytest.mark.row("S3-28")
@given(
    st.lists(st.lists(st.integers(0, 40), min_size=9, max_size=9), min_size=1, max_size=9),
    st.integers(1, 3),
    st.integers(2, 4),
    st.booleans(),
)
@limits(max_examples=25)
def test_promotion_equals_brute_force_and_optuna_left_alone(
    curves: list[list[int]], least: int, reduction: int, smaller: bool
) -> None:
    direction = "minimize" if smaller else "maximize"
    search = sweep(halving={"least": least, "reduction": reduction}, direction=direction)
    values = [[float(value) for value in curve] for curve in curves]
    ended = [trial.step for trial in run_all(search, values, range(1, 10))]
    seen: dict[int, list[float]] = {}
    sign = 1 if smaller else -1
    assert ended == [rule(seen, curve, least=least, reduction=reduction, sign=sign) for curve in values]
    pruner = optuna.pruners.SuccessiveHalvingPruner(min_resource=least, reduction_factor=reduction)
    study = optuna.create_study(direction=direction, pruner=pruner)
    alone: list[int] = []
    for curve in values:
        trial, step = study.ask(), 0
        for step, value in enumerate(curve, 1):
            trial.report(value, step)
            if trial.should_prune():
                break
        alone.append(step)
        study.tell(trial, state=optuna.trial.TrialState.PRUNED)
    assert ended == alone


@pytest.mark.row("S3-28")
@pytest.mark.parametrize("method", ["random", "tpe"])
def test_what_is_drawn_follows_from_the_trials_before(method: str) -> None:
    search = sweep(method=method)
    trials: list[Trial] = []
    for number in range(14):
        first, second = Running(search, trials), Running(search, trials)
        assert first.values == second.values
        assert Running(search, trials, values=first.values).values == first.values
        assert 1e-4 <= first.values[LR] <= 1e-2
        assert first.values[RANK] in (4, 8, 16)
        value = abs(math.log10(first.values[LR]) + 3)
        trials.append(Trial(number=number, values=first.values, state="complete", value=value, step=1))
    assert len({trial.values[LR] for trial in trials}) == 14
    assert Running(sweep(method=method, seed=1), []).values != trials[0].values


@pytest.mark.row("S3-28")
@pytest.mark.parametrize("method", ["random", "tpe"])
def test_nothing_is_tried_twice(method: str) -> None:
    lists = sweep(method=method, search={LR: [1e-3, 1e-2, 3e-2], RANK: [4, 8, 16], "data.questions": [{"yes_no": 1}]})
    assert lists.number == 9
    assert sweep(method=method, search=lists.search, trials=4).number == 4
    numbers = sweep(method=method, search={RANK: {"low": 1, "high": 12}, LR: [1e-3]}, trials=12)
    for search in (lists, numbers):
        trials: list[Trial] = []
        for number in range(search.number):
            values = Running(search, trials).values
            assert values not in [trial.values for trial in trials]
            assert Running(search, trials).values == values
            trials.append(Trial(number=number, values=values, state="complete", value=float(values[RANK]), step=1))
    again = Running(numbers, trials)
    assert again.values in [trial.values for trial in trials], "there is nothing else"
    assert Running(numbers, trials[:3], values=trials[0].values).values == trials[0].values


@pytest.mark.row("S3-28")
def test_settings_that_are_drawn_anew_leave_the_rungs_alone() -> None:
    search = sweep(halving={"least": 2, "reduction": 2}, search={RANK: [4, 8]}, method="random", trials=2)
    for seed in range(8):
        first = Running(search.model_copy(update={"seed": seed}), [])
        assert first.goes_on(2, 1.0)
        done = Trial(number=0, values=first.values, state="complete", value=1.0, step=2, rungs=first.rungs)
        second = Running(search.model_copy(update={"seed": seed}), [done])
        assert second.values != first.values
        assert not second.goes_on(2, 2.0)
        assert list(second.rungs.values()) == [2.0]


def test_parzen_estimators_look_where_it_was_good() -> None:
    search = sweep(method="tpe", search={LR: {"low": 1e-4, "high": 1e-2, "log": True}})
    trials: list[Trial] = []
    for number in range(30):
        values = Running(search, trials).values
        value = abs(math.log10(values[LR]) + 3)
        trials.append(Trial(number=number, values=values, state="complete", value=value, step=1))
    drawn = [trial.value for trial in trials if trial.value is not None]
    assert sum(drawn[15:]) < 0.8 * sum(drawn[:15])


def test_a_grid_is_every_combination_in_order() -> None:
    search = sweep(method="grid", search={LR: [1e-3, 1e-2], RANK: [4, 8], "data.questions": [{"yes_no": 1}]})
    assert search.number == 4
    trials: list[Trial] = []
    for number in range(4):
        values = Running(search, trials).values
        trials.append(Trial(number=number, values=values, state="complete", value=1.0))
    assert [(t.values[LR], t.values[RANK]) for t in trials] == [(1e-3, 4), (1e-3, 8), (1e-2, 4), (1e-2, 8)]
    assert trials[0].values["data.questions"] == {"yes_no": 1}


def test_whole_numbers_and_steps() -> None:
    search = sweep(search={RANK: {"low": 2, "high": 10, "step": 4}, LR: {"low": 0, "high": 1}})
    drawn = [Running(search, [_done(i, search) for i in range(n)]).values for n in range(8)]
    assert {values[RANK] for values in drawn} <= {2, 6, 10}
    assert all(isinstance(values[LR], int) for values in drawn)


def _done(number: int, search: Sweep) -> Trial:
    return Trial(number=number, values=dict.fromkeys(search.search, 2) | {LR: 1}, state="failed", error="x")


def test_a_failed_trial_competes_with_none_and_is_never_the_best() -> None:
    search = sweep(halving={"least": 1, "reduction": 2})
    failed = Trial(number=0, values={LR: 1e-3, RANK: 4}, state="failed", error="out of memory")
    assert Running(search, [failed]).goes_on(1, 5.0)
    assert best_of(search, [failed]) is None
    assert importance(search, [failed]) == {}


def test_a_value_that_is_not_finite_ends_the_trial() -> None:
    assert not Running(sweep(halving={"least": 1, "reduction": 2}), []).goes_on(1, math.nan)


def test_importance_finds_the_setting_that_matters() -> None:
    search = sweep()
    trials: list[Trial] = []
    for number in range(24):
        values = Running(search, trials).values
        value = abs(math.log10(values[LR]) + 3)
        trials.append(Trial(number=number, values=values, state="complete", value=value, step=1))
    found = importance(search, trials)
    assert found[LR] > found[RANK]
