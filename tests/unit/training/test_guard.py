"""Spikes are told from noise, and single outliers do not move what is usual."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy.stats import median_abs_deviation

from plait.training.guard import LEAST, Guard, Watch

NORM = 1.0


def watched(values, **settings) -> Watch:
    watch = Watch(Guard(**settings))
    for value in values:
        watch.took(value, NORM)
    return watch


@given(
    st.lists(st.floats(1.0, 9.0), min_size=LEAST, max_size=60),
    st.floats(0.0, 200.0),
)
def test_sigma_is_that_of_scipys_median_deviation(values, value):
    spread = max(float(median_abs_deviation(values, scale="normal")), 0.05 * float(np.median(values)))
    expected = (value - float(np.median(values))) / spread
    spike = watched(values).judge(value, NORM)
    if abs(expected - 10) > 1e-3:  # scipy's factor has more digits
        assert (spike is not None) == (expected > 10)
    if spike is not None:
        assert spike.sigma == pytest.approx(expected, rel=1e-3)
        assert spike.usual == pytest.approx(float(np.median(values)))


@pytest.mark.row("S4-60")
@pytest.mark.parametrize("seed", range(3))
def test_noisy_falling_losses_are_no_spikes_and_ten_sigma_are(seed):
    rng = np.random.default_rng(seed)
    loss = 1 + 4 * np.exp(-np.arange(3_000) / 300)
    loss *= np.exp(0.1 * rng.standard_normal(len(loss)))
    norm = np.exp(0.5 * rng.standard_normal(len(loss)))
    watch, found = Watch(Guard()), []
    for step, (one, other) in enumerate(zip(loss.tolist(), norm.tolist(), strict=True)):
        value = one * 3 if step % 500 == 400 else one
        if watch.judge(value, other) is not None:
            found.append(step)
        else:
            watch.took(value, other)
    assert found == list(range(400, 3_000, 500))


def test_outliers_never_join_and_a_resumed_watch_judges_alike():
    values = [2.0 + 0.1 * (i % 5) for i in range(40)]
    watch = watched(values)
    before = watch.plain()
    assert [watch.judge(1e6, NORM) is not None for _ in range(50)] == [True] * 50
    assert watch.plain() == before
    again = Watch(Guard(), before)
    for value in (2.2, 3.9, 4.1, 500.0):
        assert watch.judge(value, NORM) == again.judge(value, NORM)


def test_a_norm_is_judged_by_its_logarithm():
    watch = Watch(Guard())
    for i in range(64):
        watch.took(2.0, math.exp(0.3 * math.sin(i)))
    assert watch.judge(2.0, 5.0) is None
    spike = watch.judge(2.0, 100.0)
    assert spike is not None
    assert spike.name == "grad_norm"
    assert "sigma above the usual" in str(spike)


def test_little_is_not_judged_and_off_never():
    assert watched([2.0] * (LEAST - 1)).judge(1e9, NORM) is None
    assert watched([2.0] * LEAST).judge(1e9, NORM) is not None
    assert watched([2.0] * LEAST, spike="off").judge(1e9, NORM) is None


def test_a_new_usual_is_learned_after_forgetting():
    watch = watched([2.0] * 50)
    watch.forget()
    assert watch.judge(50.0, NORM) is None
    for _ in range(LEAST):
        watch.took(50.0, NORM)
    assert watch.judge(52.0, NORM) is None


def test_what_is_below_is_no_spike_and_zeros_do_no_harm():
    assert watched([2.0] * 50).judge(0.0, 0.0) is None
    watch = Watch(Guard())
    for _ in range(50):
        watch.took(0.0, 0.0)
    assert watch.judge(0.0, 0.0) is None
    assert watch.judge(1.0, 0.0) is not None
