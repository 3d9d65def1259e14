"""Ring attention and Ulysses equal attention over whole rows, values and gradients; what they send."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from tests.rank_script import cases_of
from torch.autograd import gradcheck

from plait.core.errors import ConfigError
from plait.models.attention import attend
from plait.models.sequence.decoder import SharedRows
from plait.models.sequence.placement import Order, Placement
from plait.models.sequence.ring import View, ring_attention
from plait.models.sequence.ulysses import repeats_of

BOUND = 1e-10


@pytest.fixture(scope="module")
def said() -> dict[str, list[dict[str, Any]]]:
    """What each of 2 and of 4 processes found."""
    found = cases_of(Path(__file__).with_name("shared_rows.py"))
    log = found.pop("log")
    assert all(isinstance(one, dict) for ranks in found.values() for one in ranks), (found, log)
    return found


@pytest.mark.row("S4-65")
@pytest.mark.parametrize("world", [2, 4])
def test_shared_rows_are_attended_to_as_whole_ones(said: dict[str, list[dict[str, Any]]], world: int) -> None:
    ranks = [one["shared"] for one in said[str(world)]]
    assert len(ranks) == world
    assert all(one["cases"] == ranks[0]["cases"] for one in ranks)
    assert len(ranks[0]["cases"]) >= 50
    for name in ("ring", "ulysses"):
        for one in ranks:
            for case, distance in zip(one["cases"], one[name], strict=True):
                assert distance <= BOUND, (name, case)


@pytest.mark.row("S4-65")
@pytest.mark.parametrize("world", [2, 4])
def test_bytes_sent_are_those_of_the_formula(said: dict[str, list[dict[str, Any]]], world: int) -> None:
    for one in said[str(world)]:
        assert len(one["sent"]) == 8
        for name, (counted, formula) in one["sent"].items():
            assert counted == formula > 0, name


@pytest.mark.parametrize("world", [2, 4])
def test_zigzag_and_stripes_share_the_work_evenly(said: dict[str, list[dict[str, Any]]], world: int) -> None:
    by_order = {name: [one["scores"][name] for one in said[str(world)]] for name in said[str(world)][0]["scores"]}
    mean = 64 * 65 / 2 / world
    assert all(sum(counts) == 64 * 65 // 2 for counts in by_order.values())  # every score once
    assert max(by_order["contiguous"]) > (2 - 1 / world) * mean * 0.95
    assert max(by_order["zigzag"]) < 1.01 * mean
    assert max(by_order["striped"]) < 1.1 * mean


@given(length=st.integers(0, 40), world=st.integers(1, 5), order=st.sampled_from(["contiguous", "zigzag", "striped"]))
def test_every_position_is_in_one_process_and_comes_back_to_its_place(length: int, world: int, order: Order) -> None:
    row = torch.arange(1, length + 1)[None]
    total = torch.zeros_like(row)
    for rank in range(world):
        placement = Placement.of(length, order, world=world, rank=rank)
        part = placement.cut(row, 1)
        assert len(part[0]) == len(placement.ranks[0])
        assert torch.equal(row[0, placement.mine()], part[part > 0])
        total += placement.put(part, 1)
    assert torch.equal(total, row)


def test_the_gradient_of_one_process_is_that_of_finite_differences() -> None:
    torch.manual_seed(0)
    view = View(torch.tensor([[1, 1, 1, 2, 2, 0, 0]]), Placement.of(7), group=None, tile=2)
    parts = [torch.randn(1, h, 7, 3, dtype=torch.float64, requires_grad=True) for h in (4, 2, 2)]
    assert gradcheck(lambda q, k, v: ring_attention(q, k, v, view=view, scaling=0.5), parts)


def test_16_bit_rows_are_as_exact_as_their_format() -> None:
    torch.manual_seed(0)
    view = View(torch.ones(1, 40, dtype=torch.long), Placement.of(40), group=None, tile=8)
    parts = [torch.randn(1, 2, 40, 8, dtype=torch.float64) for _ in range(3)]
    exact = ring_attention(*parts, view=view, scaling=0.35)
    rounded = ring_attention(*(part.bfloat16() for part in parts), view=view, scaling=0.35)
    assert rounded.dtype == torch.bfloat16
    assert float((rounded.double() - exact).norm() / exact.norm()) < 0.01


@pytest.mark.parametrize("lengths", [(600,), (500, 90)])
@pytest.mark.parametrize("window", [0, 200])
def test_long_documents_and_short_ones_are_attended_to_alike(lengths: tuple[int, ...], window: int) -> None:
    torch.manual_seed(0)
    ids = torch.tensor([[number for number, size in enumerate(lengths, 1) for _ in range(size)] + [0] * 3])
    rows = SharedRows.of(ids, "ulysses", group=None)
    parts = [torch.randn(1, h, ids.shape[1], 4, dtype=torch.float64, requires_grad=True) for h in (4, 2, 2)]
    gap = torch.arange(ids.shape[1])[:, None] - torch.arange(ids.shape[1])
    mask = (ids[:, :, None] == ids[:, None]) & (ids != 0)[:, :, None] & (gap >= 0) & (gap < (window or 999))
    expected = attend(*parts, mask=mask[:, None], scale=0.5, backend="reference").values.transpose(1, 2)
    found = rows.attend(*parts, scaling=0.5, window=window)
    assert torch.allclose(found, expected, rtol=0, atol=BOUND)
    slope = torch.randn_like(expected)
    pairs = zip(*(torch.autograd.grad(out, parts, slope) for out in (found, expected)), strict=True)
    assert all(float((a - b).abs().max()) < BOUND for a, b in pairs)


def test_heads_that_cannot_be_dealt_out_are_refused() -> None:
    with pytest.raises(ConfigError, match="6 heads cannot be dealt out evenly to 4 processes"):
        repeats_of(6, 2, world=4)
