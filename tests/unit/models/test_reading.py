"""Text transformers as models of a batch: what they refuse."""

from __future__ import annotations

import pytest
import torch

from plait.core.errors import DataError
from plait.core.tensors import IGNORE, Batch
from plait.models.reading import Rewriter
from plait.models.towers.seq2seq import EncoderDecoder, Seq2SeqSizes
from plait.models.transformer import TransformerSizes

O = IGNORE  # noqa: E741  reads as a hole in a row of labels


def batch(labels: list[int], segments: list[int]) -> Batch:
    ids = torch.tensor([[5] * len(labels)])
    return Batch(
        token_ids=ids,
        labels=torch.tensor([labels]),
        segment_ids=torch.tensor([segments]),
        media={},
        item_row={},
        sample_ids=("one",),
    )


@pytest.fixture
def model() -> Rewriter:
    sizes = TransformerSizes(d=8, depth=1, heads=2, norm="rms", bias=False)
    return Rewriter(EncoderDecoder(Seq2SeqSizes(transformer=sizes, vocabulary=12)))


@pytest.mark.parametrize(
    ("labels", "segments"),
    [
        ([5, 5, 5], [1, 1, 1]),  # nothing to read
        ([O, O, O], [1, 1, 1]),  # nothing to write
        ([O, 5, O, 5], [1, 1, 1, 1]),  # a gap
        ([O, 5, O], [1, 1, 1]),  # something to read behind
        ([O, 5, O, 5], [1, 1, 2, 2]),  # two texts
        ([O, O], [0, 0]),  # padding alone
    ],
)
def test_a_row_that_is_no_beginning_and_rest_is_named(model: Rewriter, labels: list[int], segments: list[int]) -> None:
    with pytest.raises(DataError, match="a beginning to read and a rest to write") as error:
        model(batch(labels, segments))
    assert error.value.place == "sample one"


def test_a_row_with_padding_behind_is_one(model: Rewriter) -> None:
    one = batch([O, O, 5, 5, O], [1, 1, 1, 1, 0])
    assert model(one).logits.shape == (2, 12)
    assert int(one.predicting.sum()) == 2
