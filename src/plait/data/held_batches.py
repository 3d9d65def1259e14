"""Batches in which every conversation comes once, as it is: what a loss is measured on, not trained on."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass

from plait.core.tensors import Batch, Patches
from plait.core.types import MediaRef
from plait.data.collate import Account, collate, collate_rows
from plait.data.conversations import Conversation
from plait.data.packing import row_length


@dataclass(frozen=True, slots=True, kw_only=True)
class HeldBatches:
    """Every conversation once, in order: no view, no dropout, no draw by task.

    Attributes:
        conversations: All of them.
        features: Of media of one modality.
        grid_out: The token account of the connector, or of the one of each modality.
        batch_size: Conversations in a batch.
        pad: Id of padding.
        packed: Whether a row holds several conversations.
    """

    conversations: Sequence[Conversation]
    features: Callable[[Sequence[MediaRef]], Patches]
    grid_out: Account
    batch_size: int
    pad: int
    packed: bool = True

    def __iter__(self) -> Iterator[Batch]:
        """The batches, made one after the other."""
        for start in range(0, len(self.conversations), self.batch_size):
            yield self._batch(self.conversations[start : start + self.batch_size])

    def _batch(self, part: Sequence[Conversation]) -> Batch:
        refs = {ref.sha256: ref for conversation in part for ref in conversation.rendered.media}
        features: Mapping[str, Patches] = {sha256: self.features([ref]) for sha256, ref in refs.items()}
        samples = [(conversation.id, conversation.rendered) for conversation in part]
        lengths = [len(rendered) for _, rendered in samples]
        if self.packed:
            row = row_length([lengths])
            return collate(samples, features, grid_out=self.grid_out, encoded=True, row=row, pad=self.pad)
        rows = [[sample] for sample in samples]
        return collate_rows(rows, features, grid_out=self.grid_out, encoded=True, row=max(lengths), pad=self.pad)
