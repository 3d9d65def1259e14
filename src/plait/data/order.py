"""In which order items are gone through: a pure function of seed and step, so that a step number is the data cursor."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from jaxtyping import Int
from torch import Tensor

from plait.core.errors import ConfigError


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


def block(number: int, *, rank: int, world: int) -> slice:
    """The places of a batch that one of several ranks takes: blocks in order, one longer than another at most by one.

    So what ranks gather in order is the whole batch in its order.

    Args:
        number: Places of the whole batch.
        rank: Of this process.
        world: How many processes there are.

    Raises:
        ConfigError: A rank would get none, or there is no such rank.

    Example:
        >>> [block(5, rank=rank, world=2) for rank in range(2)]
        [slice(0, 3, None), slice(3, 5, None)]
    """
    check_rank(rank, world)
    if number < world:
        raise ConfigError(
            f"a batch of {number} samples for {world} processes",
            place="batch_size",
            remedy=f"set it to {world} or more, or start fewer processes",
        )
    each, more = divmod(number, world)
    start = rank * each + min(rank, more)
    return slice(start, start + each + (rank < more))


def check_enough(number: int, world: int, *, what: str, place: str, remedy: str) -> None:
    """See that each of several processes gets one, where a batch has no more than there are.

    Args:
        number: How many there are.
        world: How many processes there are.
        what: They are, in words.
        place: Where they come from.
        remedy: What makes more of them.

    Raises:
        ConfigError: There are fewer than processes.
    """
    if number < world:
        raise ConfigError(
            f"{number} {what} for {world} processes: a batch has no more, whatever batch_size is",
            place=place,
            remedy=f"start {number} processes or fewer, or {remedy}",
        )


def check_rank(rank: int, world: int) -> None:
    """Refuse a rank that is not there.

    Raises:
        ConfigError: ``rank`` is not below ``world``, or negative.
    """
    if not 0 <= rank < world:
        raise ConfigError(f"rank {rank} of {world}", place="rank", remedy="count ranks from 0 to world - 1")


def by_length(plan: Sequence[int], lengths: Sequence[int], *, batch_size: int, window: int, seed: int) -> list[int]:
    """Put samples of like length into one batch, within windows of several batches.

    A window keeps its samples, so nothing comes more or less often, and a longer plan begins like a shorter one. The
    batches of a window come in random order, lest training go from short to long again and again.

    Args:
        plan: Samples in the order in which they were to be trained.
        lengths: Of each sample.
        batch_size: Samples in a batch.
        window: Batches in a window.
        seed: Of the order of the batches.
    """
    found: list[int] = []
    for number, start in enumerate(range(0, len(plan), window * batch_size)):
        inside = sorted(plan[start : start + window * batch_size], key=lambda sample: lengths[sample])
        batches = [inside[at : at + batch_size] for at in range(0, len(inside), batch_size)]
        for which in torch.randperm(len(batches), generator=generator(seed, "window", number)).tolist():
            found += batches[which]
    return found


def generator(seed: int, purpose: str, number: int) -> torch.Generator:
    """A generator of its own for each purpose and number."""
    digest = hashlib.sha256(f"{seed} {purpose} {number}".encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest[:8], "little") >> 1)
