from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from plait.core.errors import DataError
from plait.objectives.contrastive import info_nce, symmetric_nce
from plait.objectives.matching import hard_negatives, match_loss, same_text


def seeded(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


@given(st.integers(2, 7), st.integers(0, 50), st.floats(0, 300))
def test_negatives_never_match(n: int, seed: int, sharpness: float):
    classes = torch.randint(0, 4, (n,), generator=seeded(seed))
    classes[:2] = torch.tensor([0, 1])  # so that everyone has a negative
    positives = classes[:, None] == classes
    similarity = torch.randn(n, n, generator=seeded(seed)) * sharpness
    pictures, texts = hard_negatives(similarity, positives=positives, generator=seeded(seed))
    assert pictures[:n].tolist() == texts[n:].tolist() == list(range(n))
    assert not positives[pictures, texts].any()
    again = hard_negatives(similarity, positives=positives, generator=seeded(seed))
    assert torch.equal(again[0], pictures)
    assert torch.equal(again[1], texts)


def test_what_looks_most_right_comes_most_often():
    similarity = torch.tensor([[9.0, 0.0, math.log(3.0)], [0.0, 9.0, 0.0], [0.0, 0.0, 9.0]])
    drawn = torch.zeros(3, 3)
    for seed in range(2000):
        pictures, texts = hard_negatives(similarity, positives=torch.eye(3, dtype=torch.bool), generator=seeded(seed))
        drawn.index_put_((pictures[:3], texts[:3]), torch.ones(3), accumulate=True)
    wanted = torch.tensor([[0.0, 0.25, 0.75], [0.5, 0.0, 0.5], [0.5, 0.5, 0.0]])
    torch.testing.assert_close(drawn / 2000, wanted, atol=0.05, rtol=0)  # four deviations of 2,000 draws


def test_a_pair_without_negatives_is_named():
    with pytest.raises(DataError, match="1 of 1 pairs match everything"):
        hard_negatives(torch.zeros(1, 1), positives=torch.ones(1, 1).bool(), generator=seeded(0))
    positives = torch.eye(3, dtype=torch.bool)
    positives[1] = True
    with pytest.raises(DataError, match=r"1 of 3 pairs .* row 1"):
        hard_negatives(torch.zeros(3, 3), positives=positives, generator=seeded(0))


def test_match_loss_in_closed_form():
    logits = torch.tensor([[0.0, 2.0], [1.0, 1.0]], dtype=torch.float64, requires_grad=True)
    loss = match_loss(logits, torch.tensor([True, False]))
    assert loss.item() == pytest.approx(math.log(1 + math.exp(-2)) + math.log(2))
    loss.backward()
    p = 1 / (1 + math.exp(2))
    assert logits.grad is not None
    torch.testing.assert_close(logits.grad, torch.tensor([[p, -p], [-0.5, 0.5]], dtype=torch.float64))


def test_equal_texts_are_told_without_their_padding():
    ids = torch.tensor([[5, 6, 0], [5, 6, 9], [5, 6, 9], [5, 0, 0]])
    segments = torch.tensor([[1, 1, 0], [1, 1, 0], [1, 1, 1], [1, 0, 0]])
    assert same_text(ids, segments).int().tolist() == [[1, 1, 0, 0], [1, 1, 0, 0], [0, 0, 1, 0], [0, 0, 0, 1]]


def test_scores_that_are_there_cost_what_vectors_do():
    image, text = torch.randn(5, 4, generator=seeded(0)), torch.randn(5, 4, generator=seeded(1))
    positives = torch.rand(5, 5, generator=seeded(2)) > 0.5
    for relation in (None, positives):
        wanted = info_nce(image, text, torch.tensor(3.0), positives=relation)
        torch.testing.assert_close(symmetric_nce(3 * image @ text.T, positives=relation), wanted)
