"""What each process holds and sends: the paper's published figures, its volumes, and how the layouts are built."""

from __future__ import annotations

import itertools

import pytest
from hypothesis import given
from hypothesis import strategies as st

from plait.training.zero import STAGES, zero_bytes, zero_traffic

pytestmark = pytest.mark.light

MIXED = {"bytes_weight": 2, "bytes_gradient": 2, "bytes_state": 12}


@pytest.mark.row("S4-66")
@pytest.mark.parametrize(("stage", "published"), [(0, 120), (1, 31.4), (2, 16.6), (3, 1.9)])
def test_the_papers_figure_1(stage: int, published: float) -> None:
    """7.5 billion weights, 64 GPUs, Adam in mixed precision (K = 12): arXiv 1910.02054, figure 1."""
    held = zero_bytes(7_500_000_000, world=64, stage=stage, **MIXED)
    assert round(sum(held.values()) / 1e9, 1) == published


@pytest.mark.row("S4-66")
@pytest.mark.parametrize(("stage", "times"), [(1, 4), (2, 8)])
def test_the_papers_bounds(stage: int, times: int) -> None:
    """Sections 5.1 and 5.2: 4 and 8 times less for many processes; 5.3: as many times less as there are."""
    held = [sum(zero_bytes(10**12, world=10**6, stage=s, **MIXED).values()) for s in (0, stage, 3)]
    assert held[0] / held[1] == pytest.approx(times, rel=1e-5)
    assert held[0] == 10**6 * held[2]


@given(st.integers(1, 10**12), st.integers(1, 4096))
def test_a_higher_stage_never_holds_more(weights: int, world: int) -> None:
    held = [zero_bytes(weights, world=world, stage=stage) for stage in STAGES]
    for lower, higher in itertools.pairwise(held):
        assert all(higher[part] <= lower[part] for part in lower)
    if world == 1:
        assert all(one == held[0] for one in held)
    # All pieces of all processes make up one whole, but for the last bytes.
    assert 0 <= world * sum(held[3].values()) - sum(held[0].values()) < 3 * world


@given(st.integers(0, 10**9), st.integers(0, 10**9), st.integers(1, 64))
def test_volumes_of_the_paper(blocks: int, rest: int, world: int) -> None:
    """Section 7: stages 1 and 2 send what data parallel sends, stage 3 half as much again; in one pass."""
    sent = {s: sum(zero_traffic(blocks, rest, world=world, stage=s).values()) for s in STAGES}
    assert sent[0] == sent[1] == sent[2]
    every = 2 * 4 * (blocks + rest) * (world - 1) / world
    assert sent[0] == pytest.approx(every, abs=2)
    assert sum(zero_traffic(blocks, 0, world=world, stage=3).values()) == pytest.approx(
        1.5 * sum(zero_traffic(blocks, 0, world=world, stage=0).values()), abs=4
    )


def test_passes_by_hand() -> None:
    """Two processes, 6 weights in blocks and 4 beside, three micro-batches, a byte a number."""
    found = [zero_traffic(6, 4, world=2, stage=s, passes=3, bytes_number=1) for s in STAGES]
    assert found == [
        {"gathers": 5, "sums": 5},
        {"gathers": 5, "sums": 5},
        {"gathers": 15, "sums": 15},
        {"gathers": 24, "sums": 15},
    ]


@pytest.mark.parametrize(("world", "stage"), [(0, 1), (2, 4), (2, -1)])
def test_what_there_is_not(world: int, stage: int) -> None:
    with pytest.raises(ValueError, match="expected a stage"):
        zero_bytes(1, world=world, stage=stage)
    with pytest.raises(ValueError, match="expected a stage"):
        zero_traffic(1, 1, world=world, stage=stage)
