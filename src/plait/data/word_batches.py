"""Batches of pictures with the words of their names, for a connector that learns to read before any decoder runs."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Int
from torch import Tensor

from plait.core.tensors import IGNORE, Batch, Patches
from plait.data.collate import joined
from plait.data.features import FeatureStore
from plait.data.order import Order, block, generator


@dataclass(frozen=True, slots=True, kw_only=True)
class WordList:
    """Words that names are made of.

    Attributes:
        token_ids: The tokenizer's ids, rising; one of them fills the places after a name's end.
        filler: Row of that one.
    """

    token_ids: tuple[int, ...]
    filler: int

    @classmethod
    def of(cls, names: Sequence[Sequence[int]], *, filler: int) -> WordList:
        """All ids that occur in names, and the filler's id."""
        found = tuple(sorted({filler, *(token for name in names for token in name)}))
        return cls(token_ids=found, filler=found.index(filler))

    def targets(self, names: Sequence[Sequence[int]], *, count: int) -> Int[Tensor, "name count"]:
        """Rows of each name's first words, filled up; ``IGNORE`` where a word is not in the list."""
        row: Mapping[int, int] = {token: number for number, token in enumerate(self.token_ids)}
        found = torch.full((len(names), count), self.filler, dtype=torch.long)
        for number, name in enumerate(names):
            for place, token in enumerate(name[:count]):
                found[number, place] = row.get(token, IGNORE)
        return found


class WordBatches:
    """Source of batches: each picture once an epoch, in one of its views; labels as ``WordTargets`` reads them.

    Args:
        pictures: Sha256 of each picture.
        names: Row of its name.
        targets: Rows of the words of each name.
        stores: Features, one store a view.
        batch_size: Pictures in a batch.
        seed: Of order and views.
        rank: Which of the processes that train together this is: it takes its block of each batch.
        world: How many there are; the batch of all of them is the same for any number.

    Raises:
        ConfigError: There are fewer pictures in a batch than processes, or no such rank.
    """

    def __init__(
        self,
        pictures: Sequence[str],
        names: Int[Tensor, " picture"],
        *,
        targets: Int[Tensor, "name count"],
        stores: Sequence[FeatureStore],
        batch_size: int,
        seed: int,
        rank: int = 0,
        world: int = 1,
    ) -> None:
        self.pictures, self.names, self.targets, self.stores = pictures, names, targets, stores
        self.seed = seed
        self.order = Order(number=len(pictures), batch_size=min(batch_size, len(pictures)), seed=seed)
        self.mine = block(self.order.batch_size, rank=rank, world=world)

    def step_batches(self, step: int) -> list[Batch]:
        """The one batch of the update after ``step`` finished steps; always the same one."""
        chosen = self.order.batch(step)
        views = torch.randint(len(self.stores), (len(chosen),), generator=generator(self.seed, "view", step))
        chosen, views = chosen[self.mine], views[self.mine]
        names = self.names[chosen]
        rows: list[int] = chosen.tolist()
        view = views.sort(stable=True)
        rows = [rows[place] for place in view.indices.tolist()]
        names = names[view.indices]
        items: list[Patches] = []
        for number, store in enumerate(self.stores):
            of_view = [row for row, its in zip(rows, view.values.tolist(), strict=True) if its == number]
            if of_view:
                items.append(store.one_each([self.pictures[row] for row in of_view]))
        labels = torch.cat([self.targets[names], names[:, None]], dim=1)
        return [
            Batch(
                token_ids=torch.zeros_like(labels),
                labels=labels,
                segment_ids=torch.ones_like(labels),
                media={"image": joined(items)},
                item_row={"image": torch.arange(len(rows))},
                sample_ids=tuple(self.pictures[row][:12] for row in rows),
                encoded=True,
            )
        ]
