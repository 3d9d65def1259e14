from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from benchmarks import exactness
from benchmarks.layouts import source
from torch import nn

from plait.core.grid import Grid
from plait.training.units import Units, placeholders, total_units


def test_shares_of_packed_and_padded_rows_add_up_with_the_text() -> None:
    model = exactness.model(by_document=True)
    for packed in (True, False):
        micro = source(pieces=2, packed=packed).step_batches(0)
        found = total_units(micro, Grid(), placeholders=placeholders(model), flops=lambda batch: 3.0)
        assert found.samples == 6
        assert found.positions == sum(batch.token_ids.numel() for batch in micro)
        assert found.tokens == 158  # of the conversations, however they are laid out
        assert found.media == {"image": 4 * sum(len(b.media["image"].grid) for b in micro if "image" in b.media)}
        assert found.flops == 3.0 * len(micro)
        shares = found.shares()
        text = sum(int(((b.segment_ids != 0) & (b.token_ids != exactness.PLACE)).sum()) for b in micro)
        assert shares["padding"] + shares["image_tokens"] + text / found.positions == pytest.approx(1, abs=2e-6)


def test_what_stands_in_padding_is_not_counted() -> None:
    (batch,) = source().step_batches(0)
    padded = replace(batch, token_ids=torch.where(batch.segment_ids == 0, exactness.PLACE, batch.token_ids))
    ids = {"image": exactness.PLACE}
    assert total_units([padded], Grid(), placeholders=ids) == total_units([batch], Grid(), placeholders=ids)


def test_a_model_without_placeholders_has_a_share_of_padding_alone() -> None:
    assert placeholders(nn.Linear(2, 2)) == {}
    assert Units(samples=1, tokens=3, positions=4).shares() == {"padding": 0.25}
