"""Scenes of colored glyphs on a grid: as pictures, as words in two layouts, and questions whose answers are known."""

from __future__ import annotations

import random
from collections import Counter
from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from plait.studies.connectors import Kind, Layout

SIDE = 6
"""Cells a side."""
PIXELS = 6
"""A side of a cell, which is a patch of the tower."""
COLORS = {"red": (0.9, 0.2, 0.2), "green": (0.2, 0.8, 0.2), "blue": (0.3, 0.3, 0.95), "yellow": (0.85, 0.85, 0.2)}
GLYPHS = {
    "A": "0110 1001 1111 1001",
    "C": "0111 1000 1000 0111",
    "H": "1001 1111 1001 1001",
    "L": "1000 1000 1000 1111",
    "T": "1111 0100 0100 0100",
    "X": "1001 0110 0110 1001",
}
"""Rows of 4 x 4 pixels; a glyph lies somewhere in its cell."""
LEAST, MOST = 6, 14
"""Things of a scene."""
NOISE = 0.05
"""Of each pixel."""
PAD, BEGIN, END, IS, EMPTY = "<pad>", "<s>", ".", "=", "empty"

_THINGS = [f"{color}-{glyph}" for color in COLORS for glyph in GLYPHS]
_PLACES = [f"r{row + 1}c{column + 1}" for row in range(SIDE) for column in range(SIDE)]
_ROWS = [f"row{row + 1}" for row in range(SIDE)]
_ASKS: dict[Kind, str] = {"count": "count", "color": "color", "right": "right", "read": "read"}
WORDS = (
    *(PAD, BEGIN, END, IS, EMPTY),
    *_ASKS.values(),
    *_THINGS,
    *_PLACES,
    *_ROWS,
    *COLORS,
    *GLYPHS,
    *(str(n) for n in range(MOST + 1)),
)
"""The decoder's vocabulary."""
IDS = {word: i for i, word in enumerate(WORDS)}


@dataclass(frozen=True, slots=True, kw_only=True)
class Thing:
    """A glyph of a color."""

    color: str
    glyph: str

    @property
    def word(self) -> str:
        """Its name."""
        return f"{self.color}-{self.glyph}"


Scene = tuple[Thing | None, ...]
"""What is in each cell, in raster order."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Question:
    """A question about a scene.

    Attributes:
        kind: ``count``: how many things of a color; ``color``: which one a place has; ``right``: which color is right
            of a thing that is there once; ``read``: the glyphs of a row, from left to right.
        about: The color, place, thing or row.
        answer: Words; of ``read`` with an end.
    """

    kind: Kind
    about: str
    answer: tuple[str, ...]


def draw_scene(rng: random.Random) -> Scene:
    """6 to 14 things, anywhere."""
    cells: list[Thing | None] = [None] * SIDE**2
    for cell in rng.sample(range(SIDE**2), rng.randint(LEAST, MOST)):
        cells[cell] = Thing(color=rng.choice(list(COLORS)), glyph=rng.choice(list(GLYPHS)))
    return tuple(cells)


def ask(scene: Scene, kind: Kind, rng: random.Random) -> Question | None:
    """A question of this kind; None where the scene allows none.

    Example:
        >>> ask((None,) * 36, "count", random.Random(0)).answer
        ('0',)
        >>> ask((None,) * 36, "read", random.Random(0)) is None
        True
    """
    filled = [(cell, thing) for cell, thing in enumerate(scene) if thing is not None]
    match kind:
        case "count":
            color = rng.choice(list(COLORS))
            return Question(kind=kind, about=color, answer=(str(sum(t.color == color for _, t in filled)),))
        case "color":
            if not filled:
                return None
            cell, thing = rng.choice(filled)
            return Question(kind=kind, about=_PLACES[cell], answer=(thing.color,))
        case "right":
            often = Counter(thing for _, thing in filled)
            pairs = [
                (thing, scene[cell + 1])
                for cell, thing in filled
                if often[thing] == 1 and (cell + 1) % SIDE and scene[cell + 1] is not None
            ]
            if not pairs:
                return None
            thing, neighbor = rng.choice(pairs)
            assert neighbor is not None
            return Question(kind=kind, about=thing.word, answer=(neighbor.color,))
        case "read":
            rows = [row for row in range(SIDE) if any(scene[row * SIDE : (row + 1) * SIDE])]
            if not rows:
                return None
            row = rng.choice(rows)
            glyphs = [thing.glyph for thing in scene[row * SIDE : (row + 1) * SIDE] if thing is not None]
            return Question(kind=kind, about=_ROWS[row], answer=(*glyphs, END))


def describe(scene: Scene, layout: Layout, rng: random.Random) -> list[str]:
    """A scene in words.

    Args:
        scene: To describe.
        layout: ``grid``: the word of each cell, in raster order. ``list``: place and word of each thing, in any order.
        rng: Draws that order.
    """
    if layout == "grid":
        return [EMPTY if thing is None else thing.word for thing in scene]
    found = [(_PLACES[cell], thing.word) for cell, thing in enumerate(scene) if thing is not None]
    rng.shuffle(found)
    return [word for pair in found for word in pair]


def spoken(question: Question) -> list[str]:
    """A question in words, without its answer."""
    return [_ASKS[question.kind], question.about, IS]


def labels(scenes: list[Scene]) -> Tensor:
    """The word of each cell as a number: 0 is empty."""
    return torch.tensor([[0 if t is None else 1 + _THINGS.index(t.word) for t in scene] for scene in scenes])


CLASSES = 1 + len(_THINGS)
"""Different cells."""


def pictures(scenes: list[Scene], *, seed: int) -> Float[Tensor, "b h w c"]:
    """RGB in 0..1; where a glyph lies in its cell, and the noise of the pixels, are drawn from the seed."""
    random_ = np.random.default_rng(seed)
    cells = labels(scenes).numpy()
    shifts = random_.integers((PIXELS - 4 + 1) ** 2, size=cells.shape)
    grid = _SPRITES[cells, shifts].reshape(len(scenes), SIDE, SIDE, PIXELS, PIXELS, 3)
    flat = grid.transpose(0, 1, 3, 2, 4, 5).reshape(len(scenes), SIDE * PIXELS, SIDE * PIXELS, 3)
    noisy = flat + random_.normal(scale=NOISE, size=flat.shape).astype(np.float32)
    return torch.from_numpy(noisy.clip(0, 1))


def _sprites() -> np.ndarray:
    """Word of a cell, shift → its pixels."""
    free = PIXELS - 4 + 1
    table = np.full((CLASSES, free**2, PIXELS, PIXELS, 3), 0.1, dtype=np.float32)
    names = [(color, glyph) for color in COLORS for glyph in GLYPHS]
    for number, (color, glyph) in enumerate(names, 1):
        mask = np.array([[bit == "1" for bit in row] for row in GLYPHS[glyph].split()])
        for shift in range(free**2):
            down, across = divmod(shift, free)
            table[number, shift, down : down + 4, across : across + 4][mask] = COLORS[color]
    return table


_SPRITES = _sprites()
