"""Packing: nothing is lost, nothing is cut."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from plait.core.errors import DataError
from plait.core.packing import pack
from plait.data.packing import row_length

pytestmark = pytest.mark.light


@given(lengths=st.lists(st.integers(1, 50), max_size=60), row=st.integers(50, 80))
def test_every_item_is_in_exactly_one_row_that_holds_it(lengths: list[int], row: int) -> None:
    rows = pack(lengths, row=row)
    assert sorted(i for members in rows for i in members) == list(range(len(lengths)))
    assert all(sum(lengths[i] for i in members) <= row for members in rows)
    # First-fit decreasing needs at most 11/9 of the optimum plus 6/9 rows (Dosa 2007); the sum bounds the optimum.
    assert len(rows) <= 11 / 9 * max(-(-sum(lengths) // row), 0) * 2 + 1


def test_an_item_that_does_not_fit_is_named() -> None:
    with pytest.raises(DataError, match="item 1 has 9 tokens, a row holds 8"):
        pack([3, 9], row=8)


def test_the_order_of_equal_items_is_stable() -> None:
    assert pack([4, 4, 4, 4], row=8) == [[0, 1], [2, 3]]


@given(steps=st.lists(st.lists(st.integers(1, 90), min_size=1, max_size=12), min_size=1, max_size=5))
def test_a_row_of_the_chosen_length_holds_every_item_and_takes_no_more_than_the_longest_would(
    steps: list[list[int]],
) -> None:
    row = row_length(steps)
    longest = max(map(max, steps))
    assert row >= longest
    assert row % 8 == 0

    def cost(length: int) -> float:
        return max(len(pack(step, row=length)) for step in steps) * length * (1 + length / 512)

    assert all(cost(row) <= cost(other) for other in (-(-longest // 8) * 8, 128, 256, 512) if other >= longest)


def test_a_row_for_nothing() -> None:
    assert row_length([]) == 8


def test_of_many_steps_the_fullest_counts() -> None:
    light, heavy = [30] * 24, [300] * 24
    assert row_length([light] * 399) == 32
    assert row_length([*[light] * 399, heavy]) == row_length([heavy]) > 300
