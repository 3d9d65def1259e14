"""Questions whose answers depend on where things are, and controls that do not; made anew for every step."""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from jaxtyping import Int
from torch import Tensor

from plait.studies.placing.codes import Sides

SKIP = -100
"""Target of positions that are not asked."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Task:
    """Where questions come from.

    Attributes:
        words: Size of the vocabulary.
        answers: Number of answers.
        chance: Question → accuracy of the best guess that does not look.
        front: Whether a token that is no cell comes first.
        causal: Whether tokens see the past only.
        draw: Batch size, sides and generator → token ids, and for every question the targets of all tokens.
    """

    words: int
    answers: int
    chance: dict[str, float]
    front: bool
    causal: bool
    draw: Callable[[int, Sides, torch.Generator], tuple[Tensor, dict[str, Tensor]]]


def sequence_task(*, words: int, offset: int) -> Task:
    """Random words with one marker; two questions to every token.

    ``near``: which word stood ``offset`` places before? ``far``: which word followed the marker, wherever it was?
    Targets of both are dense, for training.

    Args:
        words: Words besides the marker.
        offset: Of ``near``.
    """
    marker = words

    def draw(rows: int, sides: Sides, generator: torch.Generator) -> tuple[Tensor, dict[str, Tensor]]:
        (length,) = sides
        ids = torch.randint(words, (rows, length), generator=generator)
        where = torch.randint(length - 2, (rows, 1), generator=generator)
        ids.scatter_(1, where, marker)
        near = torch.full_like(ids, SKIP)
        near[:, offset:] = ids[:, :-offset]
        near = near.masked_fill(near == marker, SKIP)
        followed = ids.gather(1, where + 1).expand(-1, length)
        far = followed.masked_fill(torch.arange(length) <= where + 1, SKIP)
        return ids, {"near": near, "far": far}

    return Task(
        words=words + 1,
        answers=words,
        chance={"near": 1 / words, "far": 1 / words},
        front=False,
        causal=True,
        draw=draw,
    )


COLORS = 4


def grid_task() -> Task:
    """Two marks A and B of four colors in an empty grid, and a question in front, answered there.

    ``color`` of A (a control: no places needed), ``quadrant`` of A (absolute), is A ``left`` of B (relative).
    """
    questions = ("color", "quadrant", "left")
    first_question = 1 + 2 * COLORS

    def draw(rows: int, sides: Sides, generator: torch.Generator) -> tuple[Tensor, dict[str, Tensor]]:
        height, breadth = sides
        a, b = _two_cells(rows, sides, generator)
        colors = torch.randint(COLORS, (2, rows), generator=generator)
        cells = torch.zeros(rows, height * breadth, dtype=torch.long)
        cells.scatter_(1, a[:, None], 1 + colors[0, :, None])
        cells.scatter_(1, b[:, None], 1 + COLORS + colors[1, :, None])
        asked = torch.arange(rows) % len(questions)
        ids = torch.cat([first_question + asked[:, None], cells], dim=1)
        quadrant = 2 * (a // breadth >= height / 2).long() + (a % breadth >= breadth / 2).long()
        right = {
            "color": colors[0],
            "quadrant": COLORS + quadrant,
            "left": COLORS + 4 + (a % breadth < b % breadth).long(),
        }
        targets: dict[str, Tensor] = {}
        for number, question in enumerate(questions):
            targets[question] = torch.full_like(ids, SKIP)
            targets[question][:, 0] = right[question].masked_fill(asked != number, SKIP)
        return ids, targets

    return Task(
        words=first_question + len(questions),
        answers=COLORS + 4 + 2,
        chance={"color": 1 / COLORS, "quadrant": 1 / 4, "left": 1 / 2},
        front=True,
        causal=False,
        draw=draw,
    )


def _two_cells(rows: int, sides: Sides, generator: torch.Generator) -> tuple[Int[Tensor, " r"], Int[Tensor, " r"]]:
    """Two cells in different columns, each pair of them equally likely."""
    height, breadth = sides
    column = torch.randint(breadth, (rows,), generator=generator)
    other = (column + torch.randint(1, breadth, (rows,), generator=generator)) % breadth
    down = torch.randint(height, (2, rows), generator=generator)
    return down[0] * breadth + column, down[1] * breadth + other
