"""Pictures of glyphs, with words or without, as batches of the training loop."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from jaxtyping import Float, Int
from torch import Tensor

from plait.core.tensors import IGNORE, Batch, Patches
from plait.data.order import Order
from plait.studies.connecting.scenes import (
    COLORS,
    GLYPHS,
    IDS,
    NOISE,
    PIXELS,
    SIDE,
    Scene,
    Thing,
    draw_scene,
    labels,
    pictures,
)

PICTURE = SIDE * PIXELS
"""Pixels a side."""
NAMES = tuple(GLYPHS)
"""Classes of a picture with one glyph."""
FILLERS = tuple(COLORS)
_WORDS, _FULL = 4, 6


@dataclass(frozen=True, slots=True, kw_only=True)
class Samples:
    """Pictures, words and what is to be said of them.

    Attributes:
        pixels: RGB in 0..1.
        targets: A class a picture (one column), or one a cell.
        words: Ids, as many for each; a column of zeros where there are none.
    """

    pixels: Float[Tensor, "b h w c"]
    targets: Int[Tensor, "b m"]
    words: Int[Tensor, "b t"]

    def __len__(self) -> int:
        return len(self.pixels)

    def take(self, rows: Tensor) -> Samples:
        """Some of them."""
        return Samples(pixels=self.pixels[rows], targets=self.targets[rows], words=self.words[rows])

    def batch(self) -> Batch:
        """All as one batch; targets are its labels."""
        b, h, w, c = self.pixels.shape
        long = max(self.words.shape[1], self.targets.shape[1])
        words, targets = torch.zeros(b, long, dtype=torch.long), torch.full((b, long), IGNORE)
        words[:, : self.words.shape[1]] = self.words
        targets[:, : self.targets.shape[1]] = self.targets
        return Batch(
            token_ids=words,
            labels=targets,
            segment_ids=torch.ones_like(words),
            media={"image": Patches(values=self.pixels.reshape(-1, c), grid=torch.tensor([[1, h, w]]).expand(b, -1))},
            item_row={"image": torch.arange(b)},
            sample_ids=tuple(map(str, range(b))),
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class Rounds:
    """Batches of the same samples in a new order each epoch: a pure function of the step.

    Attributes:
        samples: To learn from.
        batch: Samples an update; where there are fewer, some come twice in it.
        seed: Of the orders.
        micro: Samples of a micro-batch; 0: all at once.
    """

    samples: Samples
    batch: int
    seed: int
    micro: int = 0
    _order: list[Order] = field(default_factory=list, init=False, repr=False)

    def step_batches(self, step: int) -> Sequence[Batch]:
        """Micro-batches of an update."""
        if not self._order:
            self._order.append(Order(number=len(self.samples), batch_size=self.batch, seed=self.seed))
        rows = self._order[0].batch(step)
        return [self.samples.take(part).batch() for part in rows.split(self.micro or self.batch)]


@dataclass(frozen=True, slots=True, kw_only=True)
class Fresh:
    """New scenes at every step, whose cells are to be named: a pure function of the step.

    Attributes:
        batch: Pictures an update.
        seed: Of all of them.
    """

    batch: int
    seed: int

    def step_batches(self, step: int) -> Sequence[Batch]:
        """One micro-batch."""
        return [cells(self.batch, f"{self.seed} step {step}").batch()]


def cells(count: int, key: str) -> Samples:
    """Pictures of scenes, and what is in each cell."""
    rng = random.Random(key)
    return _shown([draw_scene(rng) for _ in range(count)], rng)


def colors(count: int, key: str) -> Samples:
    """Pictures of scenes in which one color is more frequent than all others, and which one that is."""
    rng, drawn, most = random.Random(key), list[Scene](), list[int]()
    while len(drawn) < count:
        scene = draw_scene(rng)
        counts = [sum(thing is not None and thing.color == color for thing in scene) for color in COLORS]
        if sum(one == max(counts) for one in counts) == 1:
            drawn.append(scene)
            most.append(counts.index(max(counts)))
    return _shown(drawn, rng, torch.tensor(most)[:, None])


def named(count: int, key: str, *, told: float, noise: float) -> Samples:
    """Pictures of one glyph in six cells, with noise, and four words, one of which names it, or often another glyph.

    Args:
        count: Samples.
        key: What they are drawn from.
        told: Share whose word is right; others name one of the other glyphs, each as often.
        noise: Standard deviation of the pixels.
    """
    rng, scenes, targets, words = random.Random(key), list[Scene](), list[int](), list[list[int]]()
    for _ in range(count):
        target, full = rng.randrange(len(NAMES)), set(rng.sample(range(SIDE**2), _FULL))
        things = [Thing(color=rng.choice(FILLERS), glyph=NAMES[target]) for _ in range(SIDE**2)]
        scenes.append(tuple(thing if place in full else None for place, thing in enumerate(things)))
        other = (target + rng.randrange(1, len(NAMES))) % len(NAMES)
        said = [IDS[rng.choice(FILLERS)] for _ in range(_WORDS)]
        said[rng.randrange(_WORDS)] = IDS[NAMES[target if rng.random() < told else other]]
        targets.append(target)
        words.append(said)
    found = _shown(scenes, rng, torch.tensor(targets)[:, None])
    more = max(noise**2 - NOISE**2, 0.0) ** 0.5
    noisy = found.pixels + more * torch.randn(
        found.pixels.shape, generator=torch.Generator().manual_seed(rng.getrandbits(32))
    )
    return Samples(pixels=noisy, targets=found.targets, words=torch.tensor(words))


def _shown(scenes: list[Scene], rng: random.Random, targets: Tensor | None = None) -> Samples:
    return Samples(
        pixels=pictures(scenes, seed=rng.getrandbits(32)),
        targets=labels(scenes) if targets is None else targets,
        words=torch.zeros(len(scenes), 1, dtype=torch.long),
    )
