"""Relative position codes: hand formulas, and that only differences of places count."""

import math
from collections.abc import Callable

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from plait.core.errors import ConfigError, DataError
from plait.models.attention import Attention, AttentionSizes, Places
from plait.models.position.relative import BucketBias, GridBias, KeyOffsets, LinearBias, gaps
from plait.models.position.rotary import Rotary


@pytest.mark.row("S0-11")
def test_shaw_by_hand() -> None:
    torch.manual_seed(0)
    code = KeyOffsets(4, furthest=2)
    queries = torch.randn(2, 3, 5, 4)
    at = torch.arange(5)[:, None]
    found = code(gaps(at, at), queries)
    for b in range(2):
        for h in range(3):
            for i in range(5):
                for j in range(5):
                    row = max(-2, min(2, i - j)) + 2
                    wanted = queries[b, h, i] @ code.table[row] / math.sqrt(4)
                    torch.testing.assert_close(found[b, h, i, j], wanted)
    with pytest.raises(ConfigError, match="furthest is 0"):
        KeyOffsets(4, furthest=0)


@pytest.mark.row("S0-11")
@pytest.mark.parametrize("heads", [1, 3, 8, 12])
def test_linear_bias_in_closed_form(heads: int) -> None:
    at = torch.tensor([[0, 0], [2, 5], [7, 1]])
    found = LinearBias(heads)(gaps(at, at))
    for h in range(heads):
        slope = 2.0 ** (-8 * (h + 1) / heads)
        wanted = torch.tensor([[0.0, 7.0, 8.0], [7.0, 0.0, 9.0], [8.0, 9.0, 0.0]]) * -slope
        torch.testing.assert_close(found[0, h], wanted)
    assert not LinearBias(heads).state_dict()


@pytest.mark.row("S0-11")
@settings(deadline=None, max_examples=40)
@given(
    buckets=st.integers(2, 16).map(lambda n: 4 * n),
    furthest=st.integers(33, 300),
    both_ways=st.booleans(),
)
def test_buckets_grow_with_the_distance_and_end(buckets: int, furthest: int, both_ways: bool) -> None:
    code = BucketBias(1, buckets=buckets, furthest=furthest, both_ways=both_ways)
    distance = torch.arange(0, 2 * furthest)
    behind = code.bucket(distance)
    assert behind.diff().ge(0).all()
    assert behind[furthest:].unique().numel() == 1
    half = buckets // 2 if both_ways else buckets
    assert int(behind.max()) == half - 1
    assert torch.equal(behind[: half // 2], distance[: half // 2]), "near keys have a bucket each"
    ahead = code.bucket(-distance[1:])
    assert torch.equal(ahead, behind[1:] + half) if both_ways else not ahead.any()


@pytest.mark.row("S0-11")
def test_a_grid_bias_reads_its_own_offsets_only() -> None:
    code = GridBias(2, 2, 3)
    at = torch.cartesian_prod(torch.arange(2), torch.arange(3))
    gap = gaps(at, at)
    found = code(gap)[0]
    rows = {tuple(g): i for i, g in enumerate((r, c) for r in (-1, 0, 1) for c in (-2, -1, 0, 1, 2))}
    for i in range(6):
        for j in range(6):
            assert torch.equal(found[:, i, j], code.table[rows[tuple(gap[i, j].tolist())]])
    wider = torch.cartesian_prod(torch.arange(2), torch.arange(4))
    with pytest.raises(DataError, match="grid of 2 x 4, a bias for 2 x 3"):
        code(gaps(wider, wider))
    assert torch.equal(code(gaps(wider, wider), grid=(2, 4)), code.resized(2, 4)(gaps(wider, wider)))


@pytest.mark.row("S0-11")
def test_a_resized_grid_bias_keeps_its_class_token_and_its_grid() -> None:
    code = GridBias(2, 3, 4, class_token=True)
    same = code.resized(3, 4)
    assert torch.equal(same.table, code.table)
    other = code.resized(5, 2)
    assert torch.equal(other.table[-3:], code.table[-3:])
    assert other.grid == (5, 2)
    assert len(other.table) == 9 * 3 + 3
    # The middle is the bias of a token to itself: odd sides keep it.
    middle, was = (9 * 3) // 2, (5 * 7) // 2
    torch.testing.assert_close(other.table[middle], code.table[was])


CODES: dict[str, Callable[[], nn.Module]] = {
    "t5": lambda: BucketBias(2, buckets=8, furthest=20),
    "t5 decoder": lambda: BucketBias(2, buckets=8, furthest=20, both_ways=False),
    "alibi": lambda: LinearBias(2),
    "shaw": lambda: KeyOffsets(4, furthest=3),
}


@pytest.mark.row("S0-11")
@pytest.mark.parametrize("turns", [False, True])
@pytest.mark.parametrize("name", CODES)
@settings(deadline=None, max_examples=10)
@given(shift=st.integers(-60, 60), seed=st.integers(0, 99))
def test_a_common_shift_changes_no_weight_of_attention(name: str, turns: bool, shift: int, seed: int) -> None:
    torch.manual_seed(seed)
    attention = Attention(AttentionSizes(d=8, heads=2), relative=CODES[name]())
    x, at = torch.randn(2, 7, 8) * 3, torch.randint(0, 30, (7, 1))
    with torch.no_grad():
        here, there = (
            attention(
                x,
                Places(gap=gaps(where, where), turn=Rotary.sequence(4)(where) if turns else None),
                need_weights=True,
            )
            for where in (at, at + shift)
        )
    # Worst measured: 0; with turns, whose angles are rounded, 5e-7 and 1.2e-6.
    torch.testing.assert_close(here.weights, there.weights, atol=2e-5 if turns else 0.0, rtol=0)
    torch.testing.assert_close(here.values, there.values, atol=5e-5 if turns else 0.0, rtol=0)


@pytest.mark.row("S0-11")
@pytest.mark.parametrize("name", CODES)
def test_codes_learn_and_matter(name: str) -> None:
    torch.manual_seed(0)
    code = CODES[name]()
    for weight in code.parameters():
        nn.init.normal_(weight)
    attention = Attention(AttentionSizes(d=8, heads=2), relative=code)
    x, at = torch.randn(1, 6, 8), torch.arange(6)[:, None]
    out = attention(x, Places(gap=gaps(at, at))).values
    shuffled = attention(x, Places(gap=gaps(at.flip(0) * 5, at.flip(0) * 5))).values
    assert not torch.allclose(out, shuffled, atol=1e-3)
    out.square().sum().backward()
    assert all(w.grad is not None and w.grad.any() for w in code.parameters())


def test_a_relative_code_needs_gaps() -> None:
    attention = Attention(AttentionSizes(d=8, heads=2), relative=LinearBias(2))
    with pytest.raises(ConfigError, match=r"Places\.gap is None"):
        attention(torch.randn(1, 3, 8))
