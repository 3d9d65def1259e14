"""Operations of a step against torch's own counter."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from benchmarks.layouts import Way, source
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from plait.core.tensors import Batch, Patches
from plait.data.collate import split_rows
from plait.models.dual import DualEncoder
from plait.models.heads import ProjectionHead
from plait.objectives.contrastive import Contrastive
from plait.objectives.language import NextToken
from plait.training.cost import DecoderShape
from plait.training.model_flops import (
    MediaFlops,
    decoder_flops_of,
    document_lengths,
    dual_flops,
    multimodal_flops,
    shape_of,
)


def alone() -> list[Batch]:
    """Conversations of a step, each a batch of its own without padding."""
    (batch,) = source(packed=False).step_batches(0)
    found = []
    for one in split_rows(batch, len(batch.token_ids)):
        long = int((one.segment_ids != 0).sum())
        cut = {name: getattr(one, name)[:, :long] for name in ("token_ids", "labels", "segment_ids")}
        found.append(replace(one, **cut))
    return found


def of_torch(objective, model: nn.Module, batch: Batch) -> int:
    model.train()
    with FlopCounterMode(display=False) as counter:
        torch.stack(list(objective(model, batch).values())).sum().backward()
    return counter.get_total_flops()


@pytest.mark.parametrize("whole", [False, True])
def test_a_conversation_costs_what_torch_counts(whole: bool) -> None:
    model = Way(name="any", whole=whole).model().float()
    flops = multimodal_flops(model)
    assert flops is not None
    for batch in alone():
        # Below the first adapter nothing needs a gradient, which no account by layers sees.
        assert 1.0 <= flops(batch) / of_torch(NextToken(), model, batch) < 1.06


def test_padding_and_packing_change_nothing() -> None:
    flops = multimodal_flops(Way(name="any").model().float())
    assert flops is not None
    apart = sum(flops(batch) for batch in alone())
    for packed in (True, False):
        assert sum(flops(batch) for batch in source(packed=packed).step_batches(0)) == apart


def test_lengths_of_documents_leave_padding_out() -> None:
    segments = torch.tensor([[1, 1, 2, 0], [1, 0, 0, 0], [0, 0, 0, 0]])
    assert sorted(length for length in document_lengths(segments).tolist() if length) == [1, 1, 2]


def test_a_decoder_of_other_blocks_has_no_sizes() -> None:
    decoder = Way(name="any").model().decoder
    assert isinstance(shape_of(decoder), DecoderShape)
    decoder.config.intermediate_size *= 2  # says what is not there
    assert shape_of(decoder) is None
    assert shape_of(nn.Linear(2, 2)) is None


@pytest.mark.parametrize("tower", [False, True])
def test_a_dual_encoder_costs_what_torch_counts(tower: bool) -> None:
    class Tower(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(6, 6)

        def forward(self, media: Patches) -> Patches:
            return replace(media, values=self.layer(media.values))

    model = DualEncoder(ProjectionHead(6, 8, 4), ProjectionHead(5, 8, 4), tower=Tower() if tower else None)
    ones = torch.ones(3, 1, dtype=torch.long)
    media = {
        "image": Patches(values=torch.randn(12, 6), grid=torch.tensor([[1, 2, 2]] * 3)),
        "text": Patches(values=torch.randn(3, 5), grid=torch.ones(3, 3, dtype=torch.long)),
    }
    row = {"image": torch.arange(3), "text": torch.arange(3)}
    batch = Batch(
        token_ids=ones, labels=ones * 0, segment_ids=ones, media=media, item_row=row, sample_ids=("a", "b", "c")
    )
    batch = replace(batch, labels=torch.arange(3)[:, None])
    assert dual_flops(model, pairs=3, width=4)(batch) == of_torch(Contrastive(), model, batch)


def test_counting_computes_nothing_and_draws_nothing() -> None:
    torch.manual_seed(0)
    part = nn.Sequential(nn.Linear(3, 4), nn.Dropout(0.5))

    class Reads(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.part = part

        def forward(self, media: Patches) -> torch.Tensor:
            return self.part(media.values)

    before = torch.get_rng_state()
    patches = Patches(values=torch.ones(4, 3), grid=torch.tensor([[1, 1, 2], [1, 2, 1]]))
    ones = torch.ones(1, 1, dtype=torch.long)
    batch = Batch(
        token_ids=ones, labels=ones, segment_ids=ones, media={"image": patches}, item_row={}, sample_ids=("a",)
    )
    assert MediaFlops({"image": Reads()})(batch) == 2 * (2 * 2 * 3 * 4) * 2  # forward, and the weights' gradient
    assert torch.equal(torch.get_rng_state(), before)
    assert part[0].weight.grad is None


def test_attention_is_of_documents() -> None:
    shape = DecoderShape(layers=2, d_model=4, d_ff=8, heads=2, kv_heads=2, vocab=16)
    two, one = torch.tensor([[1, 1, 2, 2]]), torch.tensor([[1, 1, 1, 1]])
    batch = Batch(token_ids=two, labels=two, segment_ids=two, media={}, item_row={}, sample_ids=("a", "b"))
    found = [
        decoder_flops_of(replace(batch, segment_ids=ids, labels=ids * 0 - 100), shape, gradients="through")
        for ids in (two, one)
    ]
    assert found[1] - found[0] == 3 * 4 * shape.layers * shape.d_attention * (16 - 8)
