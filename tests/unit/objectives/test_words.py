"""Reading pictures as words: the sums are torch's cross-entropy by hand, and they add over micro-batches."""

import dataclasses

import pytest
import torch
from torch import Tensor, nn

from plait.core.protocols import Objective
from plait.core.tensors import IGNORE, Batch, Patches
from plait.objectives.words import WordTargets

WORDS, NAMES, MIXED = 9, 5, 3


class Scores(nn.Module):
    """Scores by a linear layer each; one cell a picture."""

    def __init__(self) -> None:
        super().__init__()
        draw = torch.Generator().manual_seed(0)
        self.words = nn.Parameter(torch.randn(4, MIXED * WORDS, generator=draw, dtype=torch.float64))
        self.names = nn.Parameter(torch.randn(4, NAMES, generator=draw, dtype=torch.float64))

    def forward(self, media: Patches) -> tuple[Tensor, Tensor]:
        values = media.values
        return (values @ self.words).view(-1, MIXED, WORDS), values @ self.names


def batch_of(number: int, seed: int = 0) -> Batch:
    draw = torch.Generator().manual_seed(seed)
    words = torch.randint(WORDS, (number, MIXED), generator=draw)
    words[torch.rand(number, MIXED, generator=draw) < 0.3] = IGNORE
    labels = torch.cat([words, torch.randint(NAMES, (number, 1), generator=draw)], dim=1)
    return Batch(
        token_ids=torch.zeros_like(labels),
        labels=labels,
        segment_ids=torch.ones_like(labels),
        media={
            "image": Patches(
                values=torch.randn(number, 4, generator=draw, dtype=torch.float64),
                grid=torch.ones(number, 3, dtype=torch.long),
            )
        },
        item_row={"image": torch.arange(number)},
        sample_ids=tuple(map(str, range(number))),
        encoded=True,
    )


def part(batch: Batch, rows: slice) -> Batch:
    image = batch.media["image"]
    return dataclasses.replace(
        batch,
        token_ids=batch.token_ids[rows],
        labels=batch.labels[rows],
        segment_ids=batch.segment_ids[rows],
        media={"image": Patches(values=image.values[rows], grid=image.grid[rows])},
        item_row={"image": torch.arange(len(image.values[rows]))},
        sample_ids=batch.sample_ids[rows],
    )


def by_hand(scores: Tensor, target: int, smoothing: float) -> Tensor:
    """Smoothed cross-entropy as in arXiv 1512.00567, section 7: the target distribution is mixed with the uniform."""
    wanted = torch.full_like(scores, smoothing / len(scores))
    wanted[target] += 1 - smoothing
    return -(wanted * scores.log_softmax(0)).sum()


@pytest.mark.parametrize("smoothing", [0.0, 0.1, 0.4])
def test_sums_are_those_by_hand_and_unknown_words_count_nothing(smoothing: float) -> None:
    batch, model, objective = batch_of(12), Scores(), WordTargets(smoothing=smoothing)
    assert isinstance(objective, Objective)
    words, names = model(batch.media["image"])
    labels = batch.labels.tolist()
    known = [(row, place) for row in range(12) for place in range(MIXED) if labels[row][place] != IGNORE]
    assert 0 < len(known) < 12 * MIXED
    found = objective(model, batch)
    expected = sum(by_hand(words[row, place], labels[row][place], smoothing) for row, place in known)
    torch.testing.assert_close(found["word"], expected, rtol=1e-12, atol=0)
    expected = sum(
        by_hand(scores, target, smoothing) for scores, target in zip(names, batch.labels[:, -1].tolist(), strict=True)
    )
    torch.testing.assert_close(found["name"], expected, rtol=1e-12, atol=0)
    assert {term: int(count) for term, count in objective.count(batch).items()} == {"word": len(known), "name": 12}


def test_sums_and_counts_add_over_micro_batches() -> None:
    batch, model, objective = batch_of(11, seed=3), Scores(), WordTargets()
    parts = [part(batch, rows) for rows in (slice(0, 4), slice(4, 5), slice(5, 11))]
    whole, pieces = objective(model, batch), [objective(model, piece) for piece in parts]
    for term, value in whole.items():
        # A mean anywhere would be off by far more than the order of adding.
        torch.testing.assert_close(value, torch.stack([piece[term] for piece in pieces]).sum(), rtol=1e-13, atol=0)
        assert int(objective.count(batch)[term]) == sum(int(objective.count(piece)[term]) for piece in parts)


def test_a_batch_of_unknown_words_gives_zero_and_no_gradient() -> None:
    batch, model = batch_of(4), Scores()
    batch.labels[:, :-1] = IGNORE
    found = WordTargets()(model, batch)
    assert float(found["word"].detach()) == 0
    found["word"].backward()
    assert model.words.grad is not None
    assert float(model.words.grad.abs().sum()) == 0


def test_narrow_scores_are_summed_in_float32() -> None:
    batch, model = batch_of(200), Scores()
    exact = WordTargets()(model, batch)
    media = batch.media["image"]
    narrow = dataclasses.replace(batch, media={"image": Patches(values=media.values.bfloat16(), grid=media.grid)})
    found = WordTargets()(model.bfloat16(), narrow)
    for term, value in found.items():
        assert value.dtype == torch.float32
        # Scores of 8 bits: each is off by up to 2^-8 of its size, at random; summed in bfloat16 it would be far worse.
        torch.testing.assert_close(value.double(), exact[term], rtol=2e-3, atol=0)
