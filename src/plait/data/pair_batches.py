"""Batches of picture-text pairs from features that were computed before; which ones depends on seed and step alone."""

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from jaxtyping import Float, Int
from torch import Tensor

from plait.core.tensors import Batch, Patches


@dataclass(frozen=True, slots=True, kw_only=True)
class PairBatches:
    """Source of contrastive batches for the training loop.

    All pairs are gone through in a new random order each epoch. The epochs follow each other without a gap: a batch may
    hold the end of one and the beginning of the next, so every pair is seen equally often and no batch is short.

    Attributes:
        image: Feature of each picture.
        text: Features of all texts.
        texts_of: Which rows of ``text`` may stand for each pair. The first is taken half the time, else any.
        classes: Class of each pair; pairs of one class are positives of each other.
        ids: Sample ids.
        batch_size: Pairs in a batch.
        seed: Seed of order and choice of text.
    """

    image: Float[Tensor, "pair d"]
    text: Float[Tensor, "text e"]
    texts_of: Sequence[Sequence[int]]
    classes: Int[Tensor, " pair"]
    ids: Sequence[str]
    batch_size: int
    seed: int
    _orders: dict[int, Tensor] = field(default_factory=dict, init=False, repr=False)

    def step_batches(self, step: int) -> list[Batch]:
        """The one batch of the update after ``step`` finished steps; always the same one."""
        chosen = self.pairs_of(step)
        rows: list[int] = chosen.tolist()
        generator = _generator(self.seed, "text", step)
        draws = torch.rand(len(rows), 2, generator=generator).tolist()
        texts = [
            self.texts_of[row][0 if main < 0.5 else int(which * len(self.texts_of[row]))]
            for row, (main, which) in zip(rows, draws, strict=True)
        ]
        device = self.image.device
        ones = torch.ones(len(rows), 3, dtype=torch.long, device=device)
        place = torch.arange(len(rows), device=device)
        image, text = self.image[chosen.to(device)], self.text[torch.tensor(texts, device=device)]
        return [
            Batch(
                token_ids=torch.zeros(len(rows), 1, dtype=torch.long, device=device),
                labels=self.classes[chosen.to(device)][:, None],
                segment_ids=ones[:, :1],
                media={"image": Patches(values=image, grid=ones), "text": Patches(values=text, grid=ones)},
                item_row={"image": place, "text": place},
                sample_ids=tuple(self.ids[row] for row in rows),
            )
        ]

    def pairs_of(self, step: int) -> Int[Tensor, " b"]:
        """Which pairs are in the batch of a step."""
        number = len(self.ids)
        first, last = step * self.batch_size, (step + 1) * self.batch_size
        stream = torch.cat([self._order(epoch) for epoch in range(first // number, -(-last // number))])
        start = first % number
        return stream[start : start + self.batch_size]

    def _order(self, epoch: int) -> Int[Tensor, " pair"]:
        if epoch not in self._orders:
            for old in [e for e in self._orders if e < epoch - 1]:
                del self._orders[old]
            self._orders[epoch] = torch.randperm(len(self.ids), generator=_generator(self.seed, "order", epoch))
        return self._orders[epoch]


def _generator(seed: int, purpose: str, number: int) -> torch.Generator:
    digest = hashlib.sha256(f"{seed} {purpose} {number}".encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest[:8], "little") >> 1)
