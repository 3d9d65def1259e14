from __future__ import annotations

import math

import numpy as np
import pytest
import scipy.stats
from hypothesis import given
from hypothesis import strategies as st

from plait.core.errors import DataError
from plait.evaluation.statistics import (
    bootstrap,
    mean_score,
    paired_difference,
    seeds_mean,
    seeds_score,
    spearman,
    wilson,
)

pytestmark = pytest.mark.light


def _ratio(sums):
    return sums[:, 0] / sums[:, 1]


def test_percentile_interval_agrees_with_scipy():
    values = np.random.default_rng(0).gamma(2.0, size=60)
    ours = mean_score(values, name="m", rule="mean")
    theirs = scipy.stats.bootstrap(
        (values,), np.mean, n_resamples=20_000, method="percentile", rng=np.random.default_rng(1)
    ).confidence_interval
    # Two independent streams: an end of the interval has a Monte Carlo deviation of about 0.06 standard errors here.
    error = values.std() / math.sqrt(len(values))
    assert ours.low == pytest.approx(theirs.low, abs=0.3 * error)
    assert ours.high == pytest.approx(theirs.high, abs=0.3 * error)
    assert ours.value == pytest.approx(values.mean(), abs=1e-12)


def test_interval_of_two_items_is_the_enumerated_one():
    # Resampled means of (0, 1): 0, 1/2, 1 with probability 1/4, 1/2, 1/4, so the 2.5 and 97.5 percentiles are 0 and 1.
    score = mean_score([0.0, 1.0], name="m", rule="mean")
    assert (score.low, score.value, score.high) == (0.0, 0.5, 1.0)


def test_interval_covers_the_truth_as_often_as_it_says():
    rng = np.random.default_rng(0)
    samples = rng.exponential(size=(300, 80))
    covered = 0
    for sample in samples:
        interval = bootstrap(np.stack([sample, np.ones(80)], 1), _ratio, resamples=400)
        covered += interval.low <= 1.0 <= interval.high
    # The percentile bootstrap undercovers a little on skewed data; sampling noise of 300 trials is 1.3 points.
    assert 0.89 <= covered / 300 <= 0.98


def test_clusters_widen_the_interval_by_the_design_effect():
    rng = np.random.default_rng(0)
    concept = rng.normal(size=100)
    values = np.repeat(concept, 4)  # four identical pictures a concept: 400 items that are worth 100
    groups = [f"c{i}" for i in range(100) for _ in range(4)]
    plain = mean_score(values, name="m", rule="mean")
    clustered = mean_score(values, name="m", rule="mean", groups=groups)
    assert (clustered.high - clustered.low) / (plain.high - plain.low) == pytest.approx(2.0, rel=0.1)
    assert clustered.value == plain.value
    assert clustered.rule.endswith("ci=cluster-bootstrap-percentile-2000")


def test_one_item_a_cluster_is_the_plain_bootstrap():
    values = np.random.default_rng(0).normal(size=50)
    groups = [f"{i:03d}" for i in range(50)]
    plain, clustered = (mean_score(values, name="m", rule="mean", groups=g) for g in (None, groups))
    assert (plain.low, plain.high) == pytest.approx((clustered.low, clustered.high), abs=1e-12)


def test_pairing_removes_what_both_share():
    rng = np.random.default_rng(0)
    hardness = rng.normal(scale=10.0, size=200)
    ours, theirs = hardness + 0.5 + rng.normal(scale=0.5, size=200), hardness + rng.normal(scale=0.5, size=200)
    score = paired_difference(ours, theirs, name="d", rule="f1")
    assert 0 < score.low < 0.5 < score.high
    assert score.high - score.low < 0.4
    assert "paired" in score.rule


def test_swapping_sides_mirrors_the_difference():
    rng = np.random.default_rng(0)
    a, b = rng.random(40), rng.random(40)
    forth, back = paired_difference(a, b, name="d", rule="r"), paired_difference(b, a, name="d", rule="r")
    assert (forth.low, forth.value, forth.high) == pytest.approx((-back.high, -back.value, -back.low), abs=1e-12)


@given(st.integers(0, 60), st.integers(1, 60))
def test_wilson_agrees_with_scipy(successes: int, n: int):
    successes = min(successes, n)
    theirs = scipy.stats.binomtest(successes, n).proportion_ci(method="wilson")
    assert wilson(successes, n) == pytest.approx((theirs.low, theirs.high), abs=1e-12)


@given(st.lists(st.sampled_from([0.0, 0.25, 1.0]), min_size=1, max_size=40), st.integers(0, 3))
def test_interval_holds_the_value_and_stays_in_range(values: list[float], seed: int):
    score = mean_score(values, name="m", rule="mean", seed=seed)
    assert 0.0 <= score.low <= score.value + 1e-12
    assert score.value - 1e-12 <= score.high <= 1.0
    assert score.n == len(values)
    assert score == mean_score(values, name="m", rule="mean", seed=seed)


def test_nothing_right_is_not_certainty():
    score = mean_score([0.0] * 10, name="m", rule="hit")
    assert (score.value, score.low) == (0.0, 0.0)
    assert score.high == pytest.approx(0.2775, abs=1e-3)
    assert score.rule == "hit; ci=wilson"
    # Ten pictures of two concepts are two trials, not ten.
    assert mean_score([1.0] * 10, name="m", rule="hit", groups=["a", "b"] * 5).low == pytest.approx(wilson(2, 2)[0])


@pytest.mark.parametrize(
    ("values", "groups", "match"),
    [
        ([], None, "no items"),
        ([1.0, math.nan], None, "not finite, the first is item 1"),
        ([1.0], ["a", "b"], "2 groups"),
    ],
)
def test_bad_tables_are_refused(values, groups, match):
    with pytest.raises(DataError, match=match):
        mean_score(values, name="m", rule="mean", groups=groups)


def test_unequal_sides_are_refused():
    with pytest.raises(DataError, match="came 2 and 1"):
        paired_difference([1.0, 0.0], [1.0], name="d", rule="r")
    with pytest.raises(DataError, match="0 of 0"):
        wilson(0, 0)


@pytest.mark.parametrize("n", [2, 3, 6, 11])
def test_interval_over_seeds_is_students(n: int):
    values = np.random.default_rng(n).uniform(0.4, 0.6, size=n)
    score = seeds_score(list(values), name="m", rule="share", n=10**9)
    error = values.std(ddof=1) / math.sqrt(n)
    low, high = scipy.stats.t.interval(0.95, n - 1, loc=values.mean(), scale=error)
    assert score.low == pytest.approx(max(0.0, low), abs=1e-4)
    assert score.high == pytest.approx(min(1.0, high), abs=1e-4)


@pytest.mark.parametrize("n", [2, 5, 11])
def test_mean_over_seeds_is_students_and_may_be_negative(n: int):
    values = np.random.default_rng(n).normal(-0.2, 0.1, size=n)
    score = seeds_mean(list(values), name="gain", rule="difference")
    error = values.std(ddof=1) / math.sqrt(n)
    low, high = scipy.stats.t.interval(0.95, n - 1, loc=values.mean(), scale=error)
    assert (score.low, score.value, score.high) == pytest.approx((low, values.mean(), high), abs=1e-3 * error * n)
    with pytest.raises(DataError, match="1 seeds"):
        seeds_mean([0.1], name="gain", rule="difference")


def test_interval_over_many_seeds_is_no_narrower_than_students():
    values = np.random.default_rng(0).uniform(0.4, 0.6, size=30)
    score = seeds_score(list(values), name="m", rule="share", n=10**9)
    low, high = scipy.stats.t.interval(0.95, 29, loc=values.mean(), scale=values.std(ddof=1) / math.sqrt(30))
    assert score.low < low
    assert score.high > high
    assert score.high - score.low < 1.1 * (high - low)


def test_equal_seeds_are_not_certain():
    score = seeds_score([1.0, 1.0, 1.0], name="m", rule="share", n=300)
    assert (score.low, score.high) == wilson(300, 300)
    assert seeds_score([0.5, 0.5], name="m", rule="share", n=100).low == pytest.approx(wilson(50, 100)[0])
    with pytest.raises(DataError, match="1 seeds"):
        seeds_score([0.5], name="m", rule="share", n=1)


@given(st.lists(st.tuples(st.integers(0, 5), st.integers(0, 5)), min_size=3, max_size=30))
def test_spearman_agrees_with_scipy(pairs: list[tuple[int, int]]):
    ours, theirs = (np.asarray(column, dtype=np.float64) for column in zip(*pairs, strict=True))
    if len(set(ours)) == 1 or len(set(theirs)) == 1:
        with pytest.raises(DataError, match="no order"):
            spearman(ours, theirs)
        return
    assert spearman(ours, theirs) == pytest.approx(scipy.stats.spearmanr(ours, theirs).statistic, abs=1e-12)


def test_spearman_needs_pairs():
    with pytest.raises(DataError, match="came 2 and 3"):
        spearman(np.arange(2.0), np.arange(3.0))
