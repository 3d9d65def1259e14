"""Masks and positions from segment ids."""

from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from plait.core.errors import ConfigError
from plait.models.attention import Attention, AttentionSizes, Places, causal_mask, positions, same_segment
from plait.models.position.rotary import Rotary


def test_the_example_of_the_docstring() -> None:
    seen = causal_mask(torch.tensor([[1, 1, 2, 0]]), torch.float32)[0, 0] == 0
    assert seen.int().tolist() == [[1, 0, 0, 0], [1, 1, 0, 0], [0, 0, 1, 0], [0, 0, 0, 1]]
    assert positions(torch.tensor([[1, 1, 1, 2, 2, 0]])).tolist() == [[0, 1, 2, 0, 1, 0]]


@given(lengths=st.lists(st.integers(1, 6), min_size=1, max_size=5), padding=st.integers(0, 4))
def test_rows_are_block_diagonal_and_positions_restart(lengths: list[int], padding: int) -> None:
    ids = [s for s, n in enumerate(lengths, 1) for _ in range(n)] + [0] * padding
    segments = torch.tensor([ids])
    expected = torch.block_diag(*[torch.ones(n, n).tril() for n in lengths], *[torch.ones(1, 1)] * padding)
    assert torch.equal((causal_mask(segments, torch.bfloat16)[0, 0] == 0).float(), expected)
    wanted = [p for n in lengths for p in range(n)] + list(range(padding))
    assert positions(segments)[0].tolist() == wanted


@settings(deadline=None)
@given(lengths=st.lists(st.integers(1, 6), min_size=1, max_size=5))
def test_items_apart_are_what_a_mask_of_segments_makes_of_them(lengths: list[int]) -> None:
    torch.manual_seed(0)
    attention = Attention(AttentionSizes(d=8, heads=2, kv_heads=1)).double()
    segments = torch.tensor([[s for s, n in enumerate(lengths, 1) for _ in range(n)]])
    x = torch.randn(2, sum(lengths), 8, dtype=torch.float64)
    turn = Rotary.sequence(4)(positions(segments)[0][:, None])
    masked = attention(x, Places(mask=same_segment(segments), turn=turn)).values
    apart = attention(x, Places(lengths=tuple(lengths), turn=turn)).values
    torch.testing.assert_close(apart, masked, atol=1e-12, rtol=0)


def test_items_apart_go_with_no_mask_bias_or_weights() -> None:
    attention, x, places = Attention(AttentionSizes(d=8, heads=2)), torch.randn(1, 4, 8), Places(lengths=(3, 1))
    with pytest.raises(ConfigError, match="items apart"):
        attention(x, places, need_weights=True)
    for wrong in (replace(places, mask=torch.ones(1, 1, 4, 4).bool()), replace(places, bias=torch.ones(1, 2, 4, 4))):
        with pytest.raises(ConfigError, match="items apart"):
            attention(x, wrong)
