"""Every conversation once, in order, with its own media: packed or not, the same trained tokens."""

from __future__ import annotations

import pytest
import torch
from tests.unit.data.test_conversations import conversation, store

from plait.core.tensors import IGNORE
from plait.core.types import MediaRef
from plait.data.held_batches import HeldBatches

LENGTHS = (5, 9, 14, 7, 8, 20, 11)


@pytest.mark.parametrize("packed", [True, False])
@pytest.mark.parametrize("batch_size", [1, 3, 9])
def test_every_conversation_comes_once_as_it_is(batch_size: int, packed: bool) -> None:
    features = store(0, len(LENGTHS))

    def of(refs: list[MediaRef]):
        return features([ref.sha256 for ref in refs])

    batches = HeldBatches(
        conversations=[conversation(number, "name", length) for number, length in enumerate(LENGTHS)],
        features=of,
        grid_out=lambda grid: grid,
        batch_size=batch_size,
        pad=0,
        packed=packed,
    )
    found = list(batches)
    assert sorted(name for batch in found for name in batch.sample_ids) == [f"q{n}" for n in range(len(LENGTHS))]
    assert [len(batch.sample_ids) for batch in found] == [
        min(batch_size, len(LENGTHS) - start) for start in range(0, len(LENGTHS), batch_size)
    ]
    for batch in found:
        assert int((batch.labels != IGNORE).sum()) == len(batch.sample_ids)
        assert int((batch.segment_ids != 0).sum()) == sum(LENGTHS[int(name[1:])] for name in batch.sample_ids)
        shown = batch.media["image"].values.view(len(batch.sample_ids), 2, 2)[:, 0]
        assert torch.equal(shown[:, 0], torch.tensor([float(name[1:]) for name in batch.sample_ids]))
        assert not packed or len(batch.token_ids) <= len(batch.sample_ids)
        assert packed or len(batch.token_ids) == len(batch.sample_ids)
    assert [b.token_ids.tolist() for b in batches] == [b.token_ids.tolist() for b in found]
