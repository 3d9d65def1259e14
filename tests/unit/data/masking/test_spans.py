"""Span corruption: nothing is lost, lengths are those of T5's formula, all ways to cut are equally likely."""

from __future__ import annotations

from collections import Counter
from itertools import pairwise
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from plait.core.errors import ConfigError, DataError
from plait.data.masking.spans import SpanMask, restored

SENTINELS = tuple(range(999, 899, -1))


def drawn(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


@pytest.mark.row("S4-49")
@given(
    ids=st.lists(st.integers(0, 800), min_size=2, max_size=120),
    rate=st.floats(0.01, 0.99),
    length=st.floats(1, 12),
    seed=st.integers(0, 999),
)
def test_a_text_comes_back_from_both_parts(ids: list[int], rate: float, length: float, seed: int) -> None:
    rule = SpanMask(sentinels=SENTINELS, rate=rate, length=length)
    read, written = rule(ids, generator=drawn(seed))
    hidden, spans = rule.sizes(len(ids))
    assert restored(read, written, SENTINELS) == ids
    assert (len(read), len(written)) == (len(ids) - hidden + spans, hidden + spans)
    assert [token for token in read if token > 899] == [*SENTINELS[:spans]]
    assert [token for token in written if token > 899] == [*SENTINELS[:spans]]
    assert read[0] == ids[0]
    marks = [at for at, token in enumerate(read) if token > 899]
    assert all(two - one > 1 for one, two in pairwise(marks))  # spans never touch
    assert marks[-1] == len(read) - 1


@pytest.mark.row("S4-49")
def test_lengths_are_those_of_the_paper() -> None:
    """T5 reads 512 tokens of 568 that were, and writes 114 with the end (its helper computes 568 and 114)."""
    hidden, spans = SpanMask(sentinels=SENTINELS).sizes(568)
    assert (568 - hidden + spans + 1, hidden + spans + 1) == (512, 114)  # each with its end token
    assert hidden / spans == pytest.approx(3, abs=0.1)


@pytest.mark.row("S4-49")
def test_every_way_to_cut_comes_as_often() -> None:
    """Three spans of six tokens: ten ways; 5,000 draws, each within five standard errors of a tenth."""
    rule = SpanMask(sentinels=SENTINELS, rate=0.3, length=2.0)
    generator, found = drawn(0), Counter[tuple[int, ...]]()
    for _ in range(5000):
        _, written = rule([*range(20)], generator=generator)
        marks = [*(at for at, token in enumerate(written) if token > 899), len(written)]
        found[tuple(two - one - 1 for one, two in pairwise(marks))] += 1
    assert len(found) == 10
    assert all((sum(cut) == 6 and min(cut) == 1) or cut == (2, 2, 2) for cut in found)
    assert all(abs(times - 500) < 5 * (500 * 0.9) ** 0.5 for times in found.values())


@pytest.mark.parametrize(
    ("given", "says"),
    [
        ({"rate": 0.0}, "rate is 0"),
        ({"rate": 1.0}, "below 1"),
        ({"length": 0.5}, "length is 0.5"),
        ({"sentinels": ()}, "no sentinels"),
    ],
)
def test_rules_that_cannot_be_are_refused(given: dict[str, Any], says: str) -> None:
    with pytest.raises(ConfigError, match=says):
        SpanMask(**{"sentinels": SENTINELS, **given})


def test_texts_that_cannot_be_are_refused() -> None:
    rule = SpanMask(sentinels=(9, 8), rate=0.5, length=1.0)
    with pytest.raises(DataError, match="a text of 1 tokens"):
        rule([1], generator=drawn(0))
    with pytest.raises(DataError, match="5 spans of 10 tokens, but 2 sentinels"):
        rule([*range(20, 30)], generator=drawn(0))
    with pytest.raises(DataError, match="has the sentinel 9 in it"):
        rule([1, 9], generator=drawn(0))
    with pytest.raises(DataError, match="were read and"):
        restored([1, 9], [8, 2], (9, 8))
