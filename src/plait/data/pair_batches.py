"""Batches of picture-text pairs, as features computed before or as pixels: a function of seed and step alone."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor

from plait.core.errors import ConfigError
from plait.core.tensors import Batch, Patches
from plait.core.types import Modality
from plait.data.features import FeatureStore
from plait.data.order import Order, block, generator

_LEVELS = 255  # of an 8-bit channel


@dataclass(frozen=True, slots=True, kw_only=True)
class StoredPixels:
    """Prepared pictures in a cache: read when they are asked for, so that they take no memory.

    A tower that learns sees each picture in every epoch: decoding and scaling happen once, encoding every time.

    Attributes:
        store: Raw pixels by the sha256 of their picture, kept in float16.
        sha256s: Picture of each pair.
        device: Where pixels go.
    """

    store: FeatureStore
    sha256s: tuple[str, ...]
    device: torch.device

    def __len__(self) -> int:
        return len(self.sha256s)

    def __call__(self, pairs: Sequence[int]) -> Patches:
        """Pixels of some pairs, in this order: bit for bit those that the media contract prepares.

        Raises:
            DataError: A picture is not in the cache, or is several items.
        """
        kept = self.store.one_each([self.sha256s[pair] for pair in pairs])
        return Patches(values=exact(kept.values).to(self.device), grid=kept.grid.to(self.device))


@dataclass(frozen=True, slots=True, kw_only=True)
class StoredTokens:
    """Token ids of texts, which a tower learns from.

    Attributes:
        ids: Of each text.
        device: Where they go.
    """

    ids: Sequence[Sequence[int]]
    device: torch.device

    def __len__(self) -> int:
        return len(self.ids)

    def __call__(self, texts: Sequence[int]) -> Patches:
        """Ids of some texts as media: one channel, one column a token."""
        listed = [self.ids[text] for text in texts]
        values = torch.tensor([one for ids in listed for one in ids], dtype=torch.float32, device=self.device)
        grid = torch.tensor([[1, 1, len(ids)] for ids in listed], dtype=torch.long, device=self.device)
        return Patches(values=values.view(-1, 1), grid=grid.view(-1, 3))


def exact(values: Float[Tensor, "n 3"]) -> Float[Tensor, "n 3"]:
    """Pixels that were kept in 16 bits as the float32 they were: the nearest k/255.

    Below 1 float16 is off by at most 2^-12; half a level is 2^-9.

    Example:
        >>> level = torch.tensor([[0.0, 100 / 255, 1.0]])
        >>> torch.equal(exact(level.half()), level)
        True
    """
    return values.float().mul_(_LEVELS).round_().div_(_LEVELS)


@dataclass(frozen=True, slots=True, kw_only=True)
class PairBatches:
    """Source of contrastive batches for the training loop.

    All pairs are gone through in a new random order each epoch (:class:`plait.data.order.Order`). The pairs of a step,
    their texts and sounds are the same however the batch is split: over ranks into parts of equal size (to within one
    pair), then into micro-batches.

    Attributes:
        image: Feature of each picture; or its pixels, where a tower learns.
        text: Features of all texts; or their token ids, where a tower learns.
        texts_of: Which rows of ``text`` may stand for each pair. The first is taken half the time, else any.
        classes: Class of each pair; pairs of one class are positives of each other.
        ids: Sample ids.
        batch_size: Pairs in a batch, that of all ranks together.
        seed: Seed of order and choice of text and sound.
        audio: Features of all sounds, where there are any.
        sounds_of: Which rows of ``audio`` may stand for each pair, any of them; none for a pair without a sound.
        micro_batch: Pairs in a micro-batch at most; 0: all of a rank's pairs at once.
        rank: Which of the processes that train together this is: it takes its block of each batch.
        world: How many there are; the batch of all of them is the same for any number.

    Raises:
        ConfigError: There are fewer pairs in a batch than processes, no such rank, or ``micro_batch`` is negative.
    """

    image: Float[Tensor, "pair d"] | StoredPixels
    text: Float[Tensor, "text e"] | StoredTokens
    texts_of: Sequence[Sequence[int]]
    classes: Int[Tensor, " pair"]
    ids: Sequence[str]
    batch_size: int
    seed: int
    audio: Float[Tensor, "sound f"] | None = None
    sounds_of: Sequence[Sequence[int]] = ()
    micro_batch: int = 0
    rank: int = 0
    world: int = 1
    _order: Order = field(init=False, repr=False)

    def __post_init__(self) -> None:
        block(self.batch_size, rank=self.rank, world=self.world)
        if self.micro_batch < 0:
            raise ConfigError(
                f"micro-batches of {self.micro_batch} pairs", place="micro_batch", remedy="set 0 (all at once) or more"
            )
        object.__setattr__(self, "_order", Order(number=len(self.ids), batch_size=self.batch_size, seed=self.seed))

    def step_batches(self, step: int) -> list[Batch]:
        """The micro-batches of this rank for the update after ``step`` finished steps; always the same ones."""
        rows: list[int] = self.pairs_of(step).tolist()
        texts = drawn_texts(self.texts_of, rows, seed=self.seed, step=step)
        heard = drawn_sounds(self.sounds_of, rows, seed=self.seed, step=step) if self.audio is not None else {}
        mine = block(len(rows), rank=self.rank, world=self.world)
        size = self.micro_batch or mine.stop - mine.start
        return [
            self._batch(rows, texts, heard, places=range(start, min(start + size, mine.stop)))
            for start in range(mine.start, mine.stop, size)
        ]

    def _batch(self, rows: Sequence[int], texts: Sequence[int], heard: Mapping[int, int], *, places: range) -> Batch:
        """Some places of the batch of a step."""
        pairs, device = rows[places.start : places.stop], self.classes.device
        ones = torch.ones(len(pairs), 3, dtype=torch.long, device=device)
        place = torch.arange(len(pairs), device=device)
        text = picked(self.text, texts[places.start : places.stop])
        media: dict[Modality, Patches] = {"image": picked(self.image, pairs), "text": text}
        item_row: dict[Modality, Tensor] = {"image": place, "text": place}
        if self.audio is not None and (here := {at - places.start: heard[at] for at in places if at in heard}):
            media["audio"] = picked(self.audio, list(here.values()))
            item_row["audio"] = torch.tensor(list(here), device=device)
        return Batch(
            token_ids=torch.zeros(len(pairs), 1, dtype=torch.long, device=device),
            labels=self.classes[torch.tensor(pairs, device=device)][:, None],
            segment_ids=ones[:, :1],
            media=media,
            item_row=item_row,
            sample_ids=tuple(self.ids[pair] for pair in pairs),
        )

    def to(self, device: torch.device) -> "PairBatches":
        """The same batches on a device."""
        return replace(
            self,
            image=_moved(self.image, device),
            text=_moved(self.text, device),
            classes=self.classes.to(device),
            audio=None if self.audio is None else self.audio.to(device),
        )

    def pairs_of(self, step: int) -> Int[Tensor, " b"]:
        """Which pairs are in the batch of a step, of all ranks together."""
        return self._order.batch(step)


def drawn_texts(texts_of: Sequence[Sequence[int]], rows: Sequence[int], *, seed: int, step: int) -> list[int]:
    """A text for each pair of a batch: its first half the time, else any of its own.

    Args:
        texts_of: Numbers of the texts that may stand for each pair.
        rows: Pairs of the batch.
        seed: Of the choice.
        step: Finished steps.
    """
    draws = torch.rand(len(rows), 2, generator=generator(seed, "text", step)).tolist()
    return [
        texts_of[row][0 if main < 0.5 else int(which * len(texts_of[row]))]
        for row, (main, which) in zip(rows, draws, strict=True)
    ]


def drawn_sounds(sounds_of: Sequence[Sequence[int]], rows: Sequence[int], *, seed: int, step: int) -> dict[int, int]:
    """Place in the batch → a sound, for those pairs that have one.

    Args:
        sounds_of: Numbers of the sounds that may stand for each pair.
        rows: Pairs of the batch.
        seed: Of the choice.
        step: Finished steps.
    """
    draws = torch.rand(len(rows), generator=generator(seed, "sound", step)).tolist()
    return {
        place: sounds_of[row][int(which * len(sounds_of[row]))]
        for place, (row, which) in enumerate(zip(rows, draws, strict=True))
        if sounds_of[row]
    }


def picked(source: Float[Tensor, "all d"] | StoredPixels | StoredTokens, numbers: Sequence[int]) -> Patches:
    """Some pictures or texts as media: features one row an item, pixels, or token ids.

    Args:
        source: Of all.
        numbers: Of those wanted.

    Raises:
        DataError: A picture is not in the cache.
    """
    if not isinstance(source, Tensor):
        return source(numbers)
    values = source[torch.tensor(numbers, dtype=torch.long, device=source.device)]
    return Patches(values=values, grid=torch.ones(len(numbers), 3, dtype=torch.long, device=source.device))


def _moved(source: Tensor | StoredPixels | StoredTokens, device: torch.device) -> Any:
    return source.to(device) if isinstance(source, Tensor) else replace(source, device=device)
