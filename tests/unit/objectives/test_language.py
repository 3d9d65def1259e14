"""Next-token loss: counts are trained tokens, and sums add over any split of the batch."""

import dataclasses

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from plait.core.protocols import Objective
from plait.core.tensors import IGNORE, Batch, Output
from plait.objectives.language import NextToken, next_token_loss, sequence_logprobs, token_logprobs

WORDS = 11


class Bigram(nn.Module):
    """Scores from the last token alone; logits where the next token is trained, like ``MultimodalLM``."""

    def __init__(self) -> None:
        super().__init__()
        table = torch.randn(WORDS, WORDS, generator=torch.Generator().manual_seed(0), dtype=torch.float64) * 3
        self.table = nn.Parameter(table)

    def forward(self, batch: Batch) -> Output:
        hidden = self.table[batch.token_ids]
        return Output(hidden=hidden, score=lambda: hidden[batch.predicting])


def batch_of(token_ids: Tensor, trained: Tensor) -> Batch:
    return Batch(
        token_ids=token_ids,
        labels=torch.where(trained, token_ids, IGNORE),
        segment_ids=torch.ones_like(token_ids),
        media={},
        item_row={},
        sample_ids=tuple(str(n) for n in range(len(token_ids))),
    )


def part(batch: Batch, rows: slice) -> Batch:
    return dataclasses.replace(
        batch, token_ids=batch.token_ids[rows], labels=batch.labels[rows], segment_ids=batch.segment_ids[rows]
    )


SHAPES = st.tuples(st.integers(1, 6), st.integers(1, 9), st.integers(0, 10**6), st.sampled_from([0.0, 0.3, 1.0]))


def drawn(shape: tuple[int, int, int, float]) -> Batch:
    rows, width, seed, share = shape
    generator = torch.Generator().manual_seed(seed)
    token_ids = torch.randint(0, WORDS, (rows, width), generator=generator)
    return batch_of(token_ids, torch.rand(rows, width, generator=generator) < share)


@settings(deadline=None)
@given(shape=SHAPES)
def test_the_count_is_the_trained_tokens_that_something_predicts(shape: tuple[int, int, int, float]) -> None:
    batch, objective = drawn(shape), NextToken()
    assert isinstance(objective, Objective)
    # The first token of a row has nothing before it: nobody can predict it.
    expected = sum(label != IGNORE for row in batch.labels.tolist() for label in row[1:])
    assert int(objective.count(batch)["next_token"]) == expected
    logits = Bigram()(batch).logits
    assert logits is not None
    assert len(logits) == expected


@settings(deadline=None)
@given(shape=SHAPES, where=st.integers(0, 6))
def test_sums_and_counts_add_over_splits(shape: tuple[int, int, int, float], where: int) -> None:
    batch, model, objective = drawn(shape), Bigram(), NextToken()
    cut = min(where, len(batch.token_ids))
    parts = [part(batch, slice(0, cut)), part(batch, slice(cut, None))]
    whole = objective(model, batch)["next_token"]
    assert int(objective.count(batch)["next_token"]) == sum(int(objective.count(p)["next_token"]) for p in parts)
    pieces = sum((objective(model, p)["next_token"] for p in parts), torch.zeros((), dtype=torch.float64))
    # Float64 up to the order of adding: a mean anywhere, or a token counted twice or never, is off by far more.
    torch.testing.assert_close(whole, pieces, rtol=1e-13, atol=1e-13)
    (ours,) = torch.autograd.grad(whole, model.table)
    (theirs,) = torch.autograd.grad(pieces, model.table)
    torch.testing.assert_close(ours, theirs, rtol=1e-13, atol=1e-13)
    oracle = -sum(
        float(model.table[before].detach().log_softmax(0)[after])
        for ids, labels in zip(batch.token_ids.tolist(), batch.labels.tolist(), strict=True)
        for before, after, label in zip(ids, ids[1:], labels[1:], strict=False)
        if label != IGNORE
    )
    assert float(whole.detach()) == pytest.approx(oracle, rel=1e-12, abs=1e-12)


def test_the_first_token_of_a_packed_sample_is_not_learned_from_its_neighbor() -> None:
    model, objective = Bigram(), NextToken()
    ids = torch.tensor([[1, 2, 3, 4, 5, 6]])
    alone = [batch_of(part, torch.ones_like(part, dtype=torch.bool)) for part in (ids[:, :2], ids[:, 2:3], ids[:, 3:])]
    packed = dataclasses.replace(
        batch_of(ids, torch.ones_like(ids, dtype=torch.bool)), segment_ids=torch.tensor([[1, 1, 2, 3, 3, 3]])
    )
    assert packed.predicting.tolist() == [[True, False, False, True, True, False]]
    assert packed.targets.tolist() == [2, 5, 6]
    assert int(objective.count(packed)["next_token"]) == 3
    together = objective(model, packed)["next_token"]
    torch.testing.assert_close(together, sum(objective(model, one)["next_token"] for one in alone), rtol=1e-14, atol=0)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_narrow_logits_are_summed_in_float32(dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(1)
    logits = torch.randn(500, WORDS, generator=generator).to(dtype)
    targets = torch.randint(0, WORDS, (500,), generator=generator)
    found = next_token_loss(logits, targets)
    assert found.dtype == torch.float32
    exact = float(next_token_loss(logits.double(), targets))
    assert float(found) == pytest.approx(exact, rel=1e-6)
    owner = torch.randint(0, 4, (500,), generator=generator)
    output = Output(hidden=logits[None], score=lambda: logits)
    each = sequence_logprobs(token_logprobs(output, targets), owner=owner, count=4)
    assert float(each.sum()) == pytest.approx(-exact, rel=1e-6)
