"""Batches of picture-text pairs from features that were computed before; which ones depends on seed and step alone."""

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from jaxtyping import Float, Int
from torch import Tensor

from plait.core.tensors import Batch, Patches
from plait.data.order import Order, generator


@dataclass(frozen=True, slots=True, kw_only=True)
class PairBatches:
    """Source of contrastive batches for the training loop.

    All pairs are gone through in a new random order each epoch (:class:`plait.data.order.Order`).

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
    _order: Order = field(init=False, repr=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "_order", Order(number=len(self.ids), batch_size=self.batch_size, seed=self.seed))

    def step_batches(self, step: int) -> list[Batch]:
        """The one batch of the update after ``step`` finished steps; always the same one."""
        chosen = self.pairs_of(step)
        rows: list[int] = chosen.tolist()
        draws = torch.rand(len(rows), 2, generator=generator(self.seed, "text", step)).tolist()
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
        return self._order.batch(step)
