"""Batches of pictures and the texts that name them, as token ids: a function of seed and step alone."""

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from jaxtyping import Int
from torch import Tensor

from plait.core.tensors import IGNORE, Batch
from plait.data.features import FeatureStore
from plait.data.order import Order, block
from plait.data.pair_batches import drawn_texts


@dataclass(frozen=True, slots=True, kw_only=True)
class CaptionBatches:
    """Source of batches for the first stage of a Q-Former: a picture's features and one text a row.

    Pictures and texts are drawn as in :class:`~plait.data.pair_batches.PairBatches`. What is to be written is a name:
    a row with other words for the concept is compared and judged, and trains no token.

    Attributes:
        store: Features of the pictures by their sha256.
        sha256s: Picture of each pair.
        texts: Token ids of all texts.
        texts_of: Which of them may stand for each pair; the first is its name.
        ids: Sample ids.
        batch_size: Pairs in a batch.
        seed: Seed of order and choice of text.
        pad: Token id behind shorter texts.
        rank: Which of the processes that train together this is: it takes its block of each batch.
        world: How many there are; the batch of all of them is the same for any number.

    Raises:
        ConfigError: There are fewer pairs in a batch than processes, or no such rank.
    """

    store: FeatureStore
    sha256s: Sequence[str]
    texts: Sequence[Sequence[int]]
    texts_of: Sequence[Sequence[int]]
    ids: Sequence[str]
    batch_size: int
    seed: int
    pad: int = 0
    rank: int = 0
    world: int = 1
    _order: Order = field(init=False, repr=False)

    def __post_init__(self) -> None:
        block(self.batch_size, rank=self.rank, world=self.world)
        object.__setattr__(self, "_order", Order(number=len(self.ids), batch_size=self.batch_size, seed=self.seed))

    def step_batches(self, step: int) -> list[Batch]:
        """The one batch of the update after ``step`` finished steps; always the same one.

        Raises:
            DataError: A picture is not in the cache, or is several items.
        """
        mine = block(self.batch_size, rank=self.rank, world=self.world)
        whole: list[int] = self._order.batch(step).tolist()
        rows, chosen = whole[mine], drawn_texts(self.texts_of, whole, seed=self.seed, step=step)[mine]
        token_ids, present = padded([self.texts[number] for number in chosen], pad=self.pad)
        names = torch.tensor([self.texts_of[row][0] == number for row, number in zip(rows, chosen, strict=True)])
        return [
            Batch(
                token_ids=token_ids,
                labels=token_ids.masked_fill(~(present.bool() & names[:, None]), IGNORE),
                segment_ids=present,
                media={"image": self.store.one_each([self.sha256s[row] for row in rows])},
                item_row={"image": torch.arange(len(rows))},
                sample_ids=tuple(self.ids[row] for row in rows),
                encoded=True,
            )
        ]


def padded(texts: Sequence[Sequence[int]], *, pad: int) -> tuple[Int[Tensor, "b t"], Int[Tensor, "b t"]]:
    """Texts as rows, and 1 where a token is one.

    Example:
        >>> [part.tolist() for part in padded([[5, 6], [7]], pad=0)]
        [[[5, 6], [7, 0]], [[1, 1], [1, 0]]]
    """
    width = max(map(len, texts), default=0)
    ids = torch.full((len(texts), width), pad, dtype=torch.long)
    present = torch.zeros_like(ids)
    for row, text in enumerate(texts):
        ids[row, : len(text)] = torch.tensor(list(text), dtype=torch.long)
        present[row, : len(text)] = 1
    return ids, present
