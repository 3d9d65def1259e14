"""Scenes of colored glyphs on a grid: as pictures, as words, and questions whose answers are known."""

from __future__ import annotations

import random
from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from plait.studies.connectors import Kind

SIDE = 4
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
LEAST, MOST = 4, 10
"""Things of a scene."""
NOISE = 0.05
"""Of each pixel."""
PAD, BEGIN, END, EMPTY = "<pad>", "<s>", "</s>", "empty"

_COLORS, _GLYPHS = list(COLORS), list(GLYPHS)
_NAMES = [(color, glyph) for color in COLORS for glyph in GLYPHS]
PLACES = [f"r{row + 1}c{column + 1}" for row in range(SIDE) for column in range(SIDE)]
_ROWS = [f"row{row + 1}" for row in range(SIDE)]
_ASKS: dict[Kind, str] = {"count": "count", "color": "color", "right": "right", "read": "read"}
WORDS = (
    *(PAD, BEGIN, END, EMPTY),
    *(f"{color}-{glyph}" for color, glyph in _NAMES),
    *_ASKS.values(),
    *PLACES,
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


Scene = tuple[Thing | None, ...]
"""What is in each cell, in raster order."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Question:
    """A question about a scene.

    Attributes:
        kind: ``count``: how many things of a color; ``color``: which one a place has; ``right``: which one is right of
            a place; ``read``: the glyphs of a row, from left to right.
        about: The color, place or row.
        answer: Words.
        form: Words that are given before each word of the answer: of ``read`` the places of its glyphs.
    """

    kind: Kind
    about: str
    answer: tuple[str, ...]
    form: tuple[str, ...] = ()


def draw_scene(rng: random.Random) -> Scene:
    """4 to 10 things, anywhere."""
    cells: list[Thing | None] = [None] * SIDE**2
    for cell in rng.sample(range(SIDE**2), rng.randint(LEAST, MOST)):
        cells[cell] = Thing(color=rng.choice(_COLORS), glyph=rng.choice(_GLYPHS))
    return tuple(cells)


def ask(scene: Scene, kind: Kind, rng: random.Random) -> Question | None:
    """A question of this kind; None where the scene allows none.

    Of a place there is something, and something right of it if that is asked; of a row there are two things or more.

    Example:
        >>> ask((None,) * 16, "count", random.Random(0)).answer
        ('0',)
        >>> ask((None,) * 16, "read", random.Random(0)) is None
        True
    """
    match kind:
        case "count":
            color = rng.choice(_COLORS)
            count = sum(thing is not None and thing.color == color for thing in scene)
            return Question(kind=kind, about=color, answer=(str(count),))
        case "color" | "right":
            step = int(kind == "right")
            pairs = [
                (place, scene[place + step])
                for place, thing in enumerate(scene)
                if thing is not None and place % SIDE + step < SIDE and scene[place + step] is not None
            ]
            if not pairs:
                return None
            place, found = rng.choice(pairs)
            assert found is not None
            return Question(kind=kind, about=PLACES[place], answer=(found.color,))
        case "read":
            rows = [range(start, start + SIDE) for start in range(0, SIDE**2, SIDE)]
            full = [row for row in rows if sum(scene[place] is not None for place in row) > 1]
            if not full:
                return None
            row = rng.choice(full)
            seen = [(PLACES[place], thing.glyph) for place in row if (thing := scene[place]) is not None]
            form, glyphs = zip(*seen, strict=True)
            return Question(kind=kind, about=_ROWS[row.start // SIDE], answer=glyphs, form=form)


def describe(scene: Scene) -> list[str]:
    """A scene in words: one for each cell, in raster order.

    Example:
        >>> describe((Thing(color="red", glyph="A"), None))
        ['red-A', 'empty']
    """
    return [EMPTY if thing is None else f"{thing.color}-{thing.glyph}" for thing in scene]


def spoken(question: Question) -> list[tuple[str, bool]]:
    """A question with its answer in words, and which of them are the answer.

    Example:
        >>> spoken(Question(kind="color", about="r1c2", answer=("red",)))
        [('color', False), ('r1c2', False), ('red', True)]
    """
    words = [(_ASKS[question.kind], False), (question.about, False)]
    for i, answer in enumerate(question.answer):
        words += [(word, False) for word in question.form[i : i + 1]]
        words.append((answer, True))
    return words


def labels(scenes: list[Scene]) -> Tensor:
    """What is in each cell as a number: 0 is nothing."""
    number = {None: 0} | {Thing(color=color, glyph=glyph): i for i, (color, glyph) in enumerate(_NAMES, 1)}
    return torch.tensor([[number[thing] for thing in scene] for scene in scenes])


CLASSES = 1 + len(_NAMES)
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
    for number, (color, glyph) in enumerate(_NAMES, 1):
        mask = np.array([[bit == "1" for bit in row] for row in GLYPHS[glyph].split()])
        for shift in range(free**2):
            down, across = divmod(shift, free)
            table[number, shift, down : down + 4, across : across + 4][mask] = COLORS[color]
    return table


_SPRITES = _sprites()
