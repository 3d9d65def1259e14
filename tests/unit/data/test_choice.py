"""Questions are drawn evenly over tasks and over yes and no, the same ones whatever the limit."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from plait.core.types import Sample, Text, Turn
from plait.data.choice import held_out, in_shares, spread

pytestmark = pytest.mark.light


def question(number: int, task: str, answer: str) -> Sample:
    turns = (Turn(role="user", parts=(Text(text="?"),)), Turn(role="assistant", parts=(Text(text=answer),)))
    return Sample(id=f"{task}-{number}", turns=turns, meta={"task": task})


SAMPLES = [
    *(question(n, "name.en", f"thing {n}") for n in range(9)),
    *(question(n, "yesno", "yes") for n in range(8)),
    *(question(n + 100, "yesno", "no") for n in range(30)),
    *(question(n, "count", "two") for n in range(5)),
]


@given(limit=st.integers(0, 60), seed=st.integers(0, 50))
def test_a_draw_is_even_and_the_beginning_of_a_larger_one(limit: int, seed: int) -> None:
    found = spread(SAMPLES, ("yesno", "name.en"), limit=limit, seed=seed)
    everything = spread(SAMPLES, ("yesno", "name.en"), limit=99, seed=seed)
    assert found == everything[:limit]
    assert len(everything) == len({sample.id for sample in everything}) == 47
    tasks = Counter(sample.meta["task"] for sample in found)
    if limit <= 18:
        assert tasks["yesno"] - tasks["name.en"] in (0, 1)
    said = Counter(sample.text("assistant") for sample in found if sample.meta["task"] == "yesno")
    if tasks["yesno"] <= 16:
        assert abs(said["yes"] - said["no"]) <= 1


def test_another_seed_draws_others_and_the_order_of_the_samples_does_not_matter() -> None:
    one = spread(SAMPLES, ("name.en",), limit=4, seed=0)
    assert one == spread(SAMPLES[::-1], ("name.en",), limit=4, seed=0)
    assert one != spread(SAMPLES, ("name.en",), limit=4, seed=1)


def test_the_two_of_a_pair_come_one_after_the_other() -> None:
    pairs = [
        replace(question(2 * n + (answer == "no"), "yesno", answer), meta={"task": "yesno", "pair": f"pair {n}"})
        for n in range(12)
        for answer in ("yes", "no")
    ]
    found = [sample.meta["pair"] for sample in spread(pairs, ("yesno",), limit=24, seed=3)]
    assert found[::2] == found[1::2]
    assert len(set(found)) == 12


def test_the_wanted_split_or_the_first_that_is_there() -> None:
    assert held_out(["test-both", "test-concept", "train"], "test-both") == "test-both"
    assert held_out(["test-both", "test-concept", "train"], "test-style") == "test-concept"
    assert held_out(["train"], "test-style") is None


@given(
    shares=st.dictionaries(st.sampled_from(["name.en", "yesno", "count", "group"]), st.floats(0.01, 9.0), min_size=1),
    limit=st.integers(0, 60),
    seed=st.integers(0, 9),
)
def test_tasks_have_their_shares_to_within_one_question(shares: dict[str, float], limit: int, seed: int) -> None:
    found = in_shares(SAMPLES, shares, limit=limit, seed=seed)
    there = {task: share for task, share in shares.items() if task != "group"}  # of which there are none
    counts = Counter(str(sample.meta["task"]) for sample in found)
    assert len(found) == len({sample.id for sample in found}) <= limit
    assert set(counts) <= set(there)
    for task, share in there.items():
        assert abs(counts[task] - len(found) * share / sum(there.values())) < 1
    if there and len(found) < limit:  # then one more would be more than there are of a task
        available = Counter(str(sample.meta["task"]) for sample in SAMPLES)
        assert any((len(found) + 1) * share / sum(there.values()) > available[task] for task, share in there.items())
    assert found == in_shares(SAMPLES[::-1], shares, limit=limit, seed=seed)
