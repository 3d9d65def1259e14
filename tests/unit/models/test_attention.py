"""Masks and positions from segment ids."""

import torch
from hypothesis import given
from hypothesis import strategies as st

from plait.models.attention import causal_mask, positions


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
