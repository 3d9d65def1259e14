"""Mixtures: shares as asked for, exact where sources take turns, and the same order from any position on."""

from __future__ import annotations

import itertools
import random
from collections import Counter

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats

from plait.core.errors import ConfigError
from plait.data.mixture import Mixture, alone, tempered

SIZES = {"a": 5, "b": 11, "c": 2}
OFFSETS = {"a": 0, "b": 100, "c": 200}
SOURCES = {name: alone(range(OFFSETS[name], OFFSETS[name] + size)) for name, size in SIZES.items()}

weights = st.dictionaries(st.sampled_from("abc"), st.floats(0.01, 10.0), min_size=1)


def source_of(sample: int) -> str:
    return "abc"[sample // 100]


def mixture(**changes) -> Mixture:
    return Mixture(**{"sources": SOURCES, "weights": {"a": 1.0, "b": 3.0, "c": 0.5}, "seed": 0} | changes)


@given(short=st.integers(0, 40), more=st.integers(0, 60), seed=st.integers(0, 9), even=st.booleans(), given_=weights)
def test_a_longer_plan_begins_like_a_shorter_one(short, more, seed, even, given_):
    begun = mixture(seed=seed, even=even, weights=given_).first(short)
    assert len(begun) == short
    assert mixture(seed=seed, even=even, weights=given_).first(short + more)[:short] == begun


@given(number=st.integers(1, 200), seed=st.integers(0, 9), even=st.booleans(), given_=weights)
def test_each_source_is_gone_through_in_a_new_order_each_epoch(number, seed, even, given_):
    plan = mixture(seed=seed, even=even, weights=given_).first(number)
    assert {source_of(sample) for sample in plan} <= set(given_)
    for name in given_:
        came = [sample for sample in plan if source_of(sample) == name]
        epochs = [came[at : at + SIZES[name]] for at in range(0, len(came), SIZES[name])]
        assert all(len(set(epoch)) == len(epoch) for epoch in epochs)
    assert mixture(seed=seed, even=even, weights=given_).first(number) == plan


def test_orders_differ_between_epochs_and_seeds():
    plan = mixture(weights={"b": 1.0}).first(33)
    epochs = [tuple(plan[at : at + 11]) for at in (0, 11, 22)]
    assert len(set(epochs)) == 3
    assert mixture(weights={"b": 1.0}, seed=1).first(11) != plan[:11]


@settings(max_examples=60)
@given(shares=st.lists(st.floats(0.001, 1.0), min_size=1, max_size=7), number=st.integers(1, 300))
def test_turns_keep_every_share_to_within_one_sample_at_every_moment(shares, number):
    """And so to within two in any window, which is the difference of two beginnings."""
    names = "abcdefg"[: len(shares)]
    mixed = Mixture(
        sources={name: alone([place]) for place, name in enumerate(names)},
        weights=dict(zip(names, shares, strict=True)),
        seed=0,
        even=True,
    )
    had = [0] * len(shares)
    bound = 1 - 1 / (2 * len(shares) - 2) if len(shares) > 1 else 0
    for position, sample in enumerate(mixed.first(number), 1):
        had[sample] += 1
        off = [abs(count - position * share / sum(shares)) for count, share in zip(had, shares, strict=True)]
        assert max(off) <= bound + 1e-6


def test_turns_are_the_best_that_there_is_for_two_sources():
    """Every order of 12 samples is off by at least as much at its worst moment (for other shares than halves)."""
    share = 0.3

    def worst(order):
        return max(abs(sum(order[:n]) - n * share) for n in range(1, len(order) + 1))

    mixed = Mixture(sources={"x": alone([0]), "y": alone([1])}, weights={"x": 0.7, "y": 0.3}, seed=0, even=True)
    best = min(worst(order) for order in itertools.product((0, 1), repeat=12))
    assert worst(mixed.first(12)) <= max(best, 0.5) + 1e-9


def test_drawn_shares_pass_a_chi_square_test():
    number, given_ = 6000, {"a": 1.0, "b": 3.0, "c": 0.5}
    seen = Counter(map(source_of, mixture(weights=given_).first(number)))
    expected = [number * share / 4.5 for share in given_.values()]
    assert stats.chisquare([seen[name] for name in given_], expected).pvalue > 1e-3


@pytest.mark.parametrize("even", [False, True])
def test_groups_stay_together_and_change_no_share(even):
    pairs = [(100 + 2 * n, 101 + 2 * n) for n in range(20)]
    mixed = mixture(sources={"a": alone(range(30)), "b": pairs}, weights={"a": 1.0, "b": 3.0}, even=even)
    plan = mixed.first(4000)
    asked = [sample for sample in plan if sample >= 100]
    assert all(second == first + 1 for first, second in zip(asked[::2], asked[1::2], strict=False))
    places = [place for place, sample in enumerate(plan) if sample >= 100 and sample % 2 == 0]
    assert all(plan[place + 1 : place + 2] in ([plan[place] + 1], []) for place in places)
    assert abs(len(asked) / len(plan) - 0.75) < (0.001 if even else 0.03)


@given(late=st.integers(0, 50), number=st.integers(0, 80), even=st.booleans())
def test_late_weights_hold_from_their_position_on_and_change_nothing_before(late, number, even):
    changed = mixture(late=(late, {"c": 1.0}), even=even).first(number)
    assert changed[:late] == mixture(even=even).first(number)[:late]
    assert {source_of(sample) for sample in changed[late:]} <= {"c"}


def test_the_order_is_the_one_that_recipes_have_been_trained_in():
    """As drawn before there was this module: choices and samples of one generator, group by group."""
    rng = random.Random("4 tasks")
    piles: dict[str, list[tuple[int]]] = {name: [] for name in SOURCES}
    expected: list[int] = []
    while len(expected) < 60:
        name = rng.choices(["a", "b"], [1.0, 3.0])[0]
        if not piles[name]:
            piles[name] = rng.sample(SOURCES[name], len(SOURCES[name]))
        expected += piles[name].pop()
    assert mixture(weights={"b": 3.0, "a": 1.0, "c": 0.0}, seed=4).first(60) == expected


@given(temperature=st.floats(0.3, 50.0), sizes=st.lists(st.integers(1, 10**9), min_size=1, max_size=6))
def test_tempered_weights_are_powers_of_the_sizes(temperature, sizes):
    named = {str(place): size for place, size in enumerate(sizes)}
    found = tempered(named, temperature)
    assert sum(found.values()) == pytest.approx(1.0)
    for one, other in itertools.combinations(named, 2):
        expected = (named[one] / named[other]) ** (1 / temperature)
        if min(found[one], found[other]) > 1e-300:
            assert found[one] / found[other] == pytest.approx(expected, rel=1e-6)


def test_temperatures_that_are_known():
    assert tempered({"x": 30, "y": 10}, 1.0) == pytest.approx({"x": 0.75, "y": 0.25})
    assert tempered({"x": 10**12, "y": 1}, 1e9) == pytest.approx({"x": 0.5, "y": 0.5})
    for sizes, temperature in (({"x": 1}, 0.0), ({"x": 1}, float("nan")), ({"x": 0}, 1.0), ({}, 1.0)):
        with pytest.raises(ConfigError):
            tempered(sizes, temperature)


@pytest.mark.parametrize(
    ("given_", "message"),
    [({}, "no source with a weight"), ({"d": 1.0}, "has samples: d"), ({"a": -1.0, "b": 1.0}, "the weight of a is -1")],
)
def test_weights_that_make_no_sense_are_refused(given_, message):
    with pytest.raises(ConfigError, match=message):
        mixture(weights=given_)
    with pytest.raises(ConfigError, match=message):
        mixture(late=(3, given_))
