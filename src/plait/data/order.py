"""In which order items are gone through: a pure function of seed and step, so that a step number is the data cursor."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass, field

import torch
from jaxtyping import Int
from torch import Tensor


@dataclass(frozen=True, slots=True, kw_only=True)
class Order:
    """All items in a new random order each epoch.

    The epochs follow each other without a gap: a batch may hold the end of one and the beginning of the next, so every
    item is seen equally often and no batch is short.

    Attributes:
        number: Items.
        batch_size: Items in a batch.
        seed: Of the orders.
    """

    number: int
    batch_size: int
    seed: int
    _orders: dict[int, Tensor] = field(default_factory=dict, init=False, repr=False)

    def batch(self, step: int) -> Int[Tensor, " b"]:
        """Items of the batch after ``step`` finished steps."""
        first, last = step * self.batch_size, (step + 1) * self.batch_size
        epochs = range(first // self.number, -(-last // self.number))
        stream = torch.cat([self._order(epoch) for epoch in epochs])
        start = first % self.number
        return stream[start : start + self.batch_size]

    def _order(self, epoch: int) -> Int[Tensor, " item"]:
        if epoch not in self._orders:
            for old in [e for e in self._orders if e < epoch - 1]:
                del self._orders[old]
            self._orders[epoch] = torch.randperm(self.number, generator=generator(self.seed, "order", epoch))
        return self._orders[epoch]


def generator(seed: int, purpose: str, number: int) -> torch.Generator:
    """A generator of its own for each purpose and number."""
    digest = hashlib.sha256(f"{seed} {purpose} {number}".encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest[:8], "little") >> 1)
