"""Which processes work together, by arithmetic alone."""

from __future__ import annotations

import itertools

import pytest
from hypothesis import given
from hypothesis import strategies as st

from plait.core.errors import ConfigError
from plait.core.grid import DIMENSIONS, Grid

degrees = st.integers(1, 4)


@given(degrees, degrees, degrees, degrees)
def test_groups_are_a_partition_and_every_member_finds_the_same_one(
    pipeline: int, data: int, context: int, tensor: int
) -> None:
    world = pipeline * data * context * tensor
    grids = [Grid.of(rank, world, pipeline=pipeline, context=context, tensor=tensor) for rank in range(world)]
    assert {grid.data for grid in grids} == {data}
    places = [tuple(grid.place(name) for name in DIMENSIONS) for grid in grids]
    assert len(set(places)) == world
    for count in (1, 2):
        for names in itertools.combinations(DIMENSIONS, count):
            for grid in grids:
                ranks = grid.ranks(*names)
                assert grid.rank in ranks
                assert all(grids[other].ranks(*names) == ranks for other in ranks)
                others = [n for n in DIMENSIONS if n not in names]
                assert len({tuple(grids[r].place(n) for n in others) for r in ranks}) == 1
    assert [grid.share for grid in grids] == [(grid.place("data"), data) for grid in grids]


def test_tensor_is_innermost_and_pipeline_outermost() -> None:
    grid = Grid.of(0, 8, pipeline=2, tensor=2)
    assert (grid.ranks("tensor"), grid.ranks("data"), grid.ranks("pipeline")) == ([0, 1], [0, 2], [0, 4])


def test_a_number_that_does_not_divide_is_refused_with_the_settings() -> None:
    with pytest.raises(ConfigError, match="6 processes cannot be divided into pipeline 2 x tensor 2"):
        Grid.of(0, 6, pipeline=2, tensor=2)
