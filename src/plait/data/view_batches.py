"""Batches of several changed views of each picture: a function of seed and step alone."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import Tensor

from plait.core.errors import ConfigError
from plait.core.tensors import IGNORE, Batch, Patches
from plait.core.types import MediaRef
from plait.data.augment.pictures import change, draws
from plait.data.augment.settings import Changes
from plait.data.media import decode_image
from plait.data.order import Order, block
from plait.data.shards import ShardReader


class ShardPictures:
    """Pictures of one split, decoded when they are asked for; each process opens the shards for itself.

    Args:
        shards: Folder of the data stage's shards.
        split: Its name.
        refs: The picture of each sample.
        ids: Sample ids.
    """

    def __init__(self, shards: Path, split: str, *, refs: Sequence[MediaRef], ids: Sequence[str]) -> None:
        self.shards, self.split = shards, split
        self.refs, self.ids = tuple(refs), tuple(ids)
        self._reader: ShardReader | None = None

    def __getstate__(self) -> dict[str, Any]:
        return vars(self) | {"_reader": None}

    def __len__(self) -> int:
        return len(self.refs)

    def __getitem__(self, number: int) -> Image.Image:
        """RGB.

        Raises:
            DataError: A shard is gone or damaged, or the picture is.
        """
        if self._reader is None:
            self._reader = ShardReader(self.shards, self.split)
        return decode_image(self._reader.media(self.refs[number]), place=self.ids[number])


@dataclass(frozen=True, slots=True, kw_only=True)
class ViewBatches:
    """Source of batches of views for the training loop.

    All pictures are gone through in a new random order each epoch (:class:`plait.data.order.Order`). The views of a
    step are the same bits however the batch is split, over ranks and then into micro-batches, and whatever the size of
    a batch was in the epochs before: what is drawn for a view follows from seed, epoch, sample id and its number.

    Attributes:
        pictures: RGB pictures by number; goes to workers, so it must be picklable.
        ids: Sample ids.
        classes: Class of each picture; None: nobody knows, :data:`~plait.core.tensors.IGNORE`.
        prepare: RGB picture to raw pixels; picklable.
        size: Pixels a side of a crop.
        changes: How views come about.
        views: Of each picture.
        batch_size: Pictures in a batch, that of all ranks together.
        seed: Of order and changes.
        micro_batch: Pictures in a micro-batch at most; 0: all of a rank's at once.
        rank: Which of the processes that train together this is: it takes its block of each batch.
        world: How many there are; the batch of all of them is the same for any number.

    Raises:
        ConfigError: There are fewer pictures in a batch than processes, no such rank, or ``micro_batch`` is negative.
    """

    pictures: Any
    ids: Sequence[str]
    classes: Sequence[int] | None
    prepare: Callable[[Image.Image], Patches]
    size: int
    changes: Changes
    views: int
    batch_size: int
    seed: int
    micro_batch: int = 0
    rank: int = 0
    world: int = 1
    _order: Order = field(init=False, repr=False)

    def __post_init__(self) -> None:
        block(self.batch_size, rank=self.rank, world=self.world)
        if self.micro_batch < 0:
            raise ConfigError(
                f"micro-batches of {self.micro_batch} pictures",
                place="micro_batch",
                remedy="set 0 (all at once) or more",
            )
        object.__setattr__(self, "_order", Order(number=len(self.ids), batch_size=self.batch_size, seed=self.seed))

    def step_batches(self, step: int) -> list[Batch]:
        """The micro-batches of this rank for the update after ``step`` finished steps; always the same ones."""
        rows: list[int] = self._order.batch(step).tolist()
        mine = block(len(rows), rank=self.rank, world=self.world)
        size = self.micro_batch or mine.stop - mine.start
        first = step * self.batch_size
        return [
            self._batch(rows[start : min(start + size, mine.stop)], first=first + start)
            for start in range(mine.start, mine.stop, size)
        ]

    def sample_ids(self, step: int) -> list[str]:
        """Of this rank's share of a step, without making its views."""
        rows: list[int] = self._order.batch(step).tolist()
        mine = block(len(rows), rank=self.rank, world=self.world)
        return [self.ids[row] for row in rows[mine.start : mine.stop]]

    def _batch(self, rows: Sequence[int], *, first: int) -> Batch:
        """Some pictures; ``first`` is the place of the first one in the stream of all epochs."""
        parts = [view for place, row in enumerate(rows) for view in self._views(row, (first + place) // len(self.ids))]
        known = [IGNORE] * len(rows) if self.classes is None else [self.classes[row] for row in rows]
        belongs: Tensor = torch.arange(len(rows)).repeat_interleave(self.views)
        return Batch(
            token_ids=torch.zeros(len(rows), 1, dtype=torch.long),
            labels=torch.tensor(known, dtype=torch.long)[:, None],
            segment_ids=torch.ones(len(rows), 1, dtype=torch.long),
            media={
                "image": Patches(
                    values=torch.cat([part.values for part in parts]), grid=torch.cat([part.grid for part in parts])
                )
            },
            item_row={"image": belongs},
            sample_ids=tuple(self.ids[row] for row in rows),
        )

    def _views(self, row: int, epoch: int) -> list[Patches]:
        picture: Image.Image = self.pictures[row]
        return [
            self.prepare(
                change(
                    picture,
                    self.changes,
                    size=self.size,
                    rng=draws(self.seed, epoch=epoch, sample=self.ids[row], view=view),
                )
            )
            for view in range(self.views)
        ]
