"""Hidden cells of pictures: exact numbers, equal chances, blocks that hang together."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import assume, given
from hypothesis import strategies as st

from plait.core.errors import ConfigError
from plait.data.masking.cells import block_cells, hidden_number, random_cells

SIDES = st.integers(2, 20)


def drawn(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def pieces(hidden: torch.Tensor) -> int:
    """Connected parts, by flood."""
    left = {(int(at[0]), int(at[1])) for at in hidden.nonzero()}
    found = 0
    while left:
        found += 1
        edge = [left.pop()]
        while edge:
            row, column = edge.pop()
            for near in ((row + 1, column), (row - 1, column), (row, column + 1), (row, column - 1)):
                if near in left:
                    left.remove(near)
                    edge.append(near)
    return found


@pytest.mark.row("S4-52")
@given(rows=SIDES, columns=SIDES, ratio=st.floats(0.05, 0.95), blocks=st.booleans(), seed=st.integers(0, 999))
def test_the_number_is_exact_and_the_draw_is_of_its_seed(
    rows: int, columns: int, ratio: float, blocks: bool, seed: int
) -> None:
    shown = int(rows * columns * (1 - ratio) + 1e-9)
    assume(0 < shown < rows * columns)
    make = block_cells if blocks else random_cells
    hidden = make(rows, columns, ratio=ratio, generator=drawn(seed))
    assert hidden.shape == (rows, columns)
    assert int(hidden.sum()) == rows * columns - shown == hidden_number(rows * columns, ratio)
    assert torch.equal(hidden, make(rows, columns, ratio=ratio, generator=drawn(seed)))


@pytest.mark.row("S4-52")
def test_each_cell_is_hidden_as_often_as_another() -> None:
    generator = drawn(0)
    found = torch.stack([random_cells(7, 9, ratio=0.75, generator=generator) for _ in range(2000)]).double().mean(0)
    rate = hidden_number(63, 0.75) / 63
    assert float((found - rate).abs().max()) < 5 * math.sqrt(rate * (1 - rate) / 2000)


@pytest.mark.row("S4-52")
def test_blocks_hang_together() -> None:
    """BEiT's 14 x 14 cells: 40 % in a few pieces, where cells one by one are in some thirty."""
    one_by_one = [pieces(random_cells(14, 14, ratio=0.4, generator=drawn(at))) for at in range(50)]
    in_blocks = [pieces(block_cells(14, 14, generator=drawn(at))) for at in range(50)]
    assert max(in_blocks) <= 5 < 15 < min(one_by_one)


def test_one_block_has_the_shape_that_was_asked_for() -> None:
    """Where the smallest block is all that is hidden, there is one rectangle, and its sides are within the limits."""
    for at in range(50):
        hidden = block_cells(20, 20, ratio=0.1, smallest=40, aspect=0.5, generator=drawn(at))
        rows, columns = hidden.any(1).sum(), hidden.any(0).sum()
        if rows * columns == 40:  # else the area of whole cells was less, and one more was taken
            assert 0.4 <= float(rows / columns) <= 2.5


@pytest.mark.parametrize("ratio", [0.0, 1.0, 1.2, -0.1])
def test_ratios_that_cannot_be_are_refused(ratio: float) -> None:
    with pytest.raises(ConfigError, match="the ratio is"):
        random_cells(4, 4, ratio=ratio, generator=drawn(0))


def test_what_hides_nothing_or_all_is_refused() -> None:
    with pytest.raises(ConfigError, match="of 4 cells 4 would be hidden"):
        random_cells(2, 2, ratio=0.9, generator=drawn(0))
    with pytest.raises(ConfigError, match=r"smallest is 0"):
        block_cells(4, 4, smallest=0, generator=drawn(0))
    with pytest.raises(ConfigError, match=r"aspect is 1\.5"):
        block_cells(4, 4, aspect=1.5, generator=drawn(0))
