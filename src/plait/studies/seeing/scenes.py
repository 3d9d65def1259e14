"""Pictures of 32 x 32 pixels whose truth is known, with questions about one thing, about two, and about the whole.

Four by four cells of 8 pixels. Two opposite corners hold a dim mark of one of the colors. 2 to 5 objects of different
colors, each a square, a cross or a ring of 6 pixels, stand in other cells, anywhere inside them. Four more cells hold a
faint mark of 2 x 2 pixels: two lighter pixels, in the one diagonal (to be found) or in the other (to be left alone).
"""

from dataclasses import dataclass
from typing import Literal

import torch
from jaxtyping import Float, Int
from torch import Tensor

SIDE, CELL, FINE = 32, 8, 4
"""Pixels a side of a picture, of a cell that holds one thing, and of a cell that is asked for marks."""
SHAPES, COLORS, MARKS = 3, 5, 4
"""Kinds of shapes, colors (no two objects share one), and marks of a picture."""
LEAST, MOST = 2, 5
"""Objects of a picture."""
SKIP = -100
"""Target of what is not asked."""
QUESTIONS: tuple[str, ...] = ("shape", "left", "same", "count", "far")
"""``shape`` of each color that is there; of each pair of colors: is the one ``left`` of the other, have the two the
``same`` shape; how many squares are there (``count``)? ``far``: asked in the lower right corner, which color has the
mark in the upper left one?"""
ANSWERS = {"shape": SHAPES, "left": 2, "same": 2, "count": MOST + 1, "far": COLORS}
"""How many answers each question has."""
Region = Literal["anywhere", "left", "right"]
"""Where objects may stand: in all cells, or in those of one half of the picture."""

_PALETTE = torch.tensor([[0.9, 0.1, 0.1], [0.1, 0.8, 0.1], [0.15, 0.2, 1.0], [0.9, 0.9, 0.1], [0.9, 0.1, 0.9]])
_GRID = SIDE // CELL
_CORNERS = (0, _GRID * _GRID - 1)
_FREE = torch.tensor([cell for cell in range(_GRID * _GRID) if cell not in _CORNERS])
_NOISE, _GRAY, _FAINT, _DIM = 0.1, 0.3, 0.7, 0.6


def _templates() -> Tensor:
    """Square, cross, ring."""
    found = torch.zeros(SHAPES, 6, 6, dtype=torch.bool)
    found[0] = True
    found[1, 2:4], found[1, :, 2:4] = True, True
    found[2] = True
    found[2, 2:4, 2:4] = False
    return found


@dataclass(frozen=True, slots=True, kw_only=True)
class Scenes:
    """Pictures and their truth.

    Attributes:
        pixels: RGB in 0..1.
        targets: Right answers of each question: one a picture, a color, or a pair of colors; :data:`SKIP` where it
            cannot be asked.
        marks: Which cells of 4 pixels hold the upper left pixel of a mark that is to be found.
        columns: Column, in cells of 8 pixels, of the object of each color; -1 where there is none.
        cells: Color of the object in each cell of 8 pixels; :data:`COLORS` where there is none.
    """

    pixels: Float[Tensor, "b 3 h w"]
    targets: dict[str, Int[Tensor, "b *of"]]
    marks: Float[Tensor, "b fine"]
    columns: Int[Tensor, "b color"]
    cells: Int[Tensor, "b cell"]

    def __len__(self) -> int:
        """Pictures."""
        return len(self.pixels)

    def take(self, rows: Tensor) -> "Scenes":
        """Some of them."""
        return Scenes(
            pixels=self.pixels[rows],
            targets={name: target[rows] for name, target in self.targets.items()},
            marks=self.marks[rows],
            columns=self.columns[rows],
            cells=self.cells[rows],
        )


def draw_scenes(rows: int, generator: torch.Generator, *, region: Region = "anywhere") -> Scenes:
    """Scenes from a generator.

    Args:
        rows: How many.
        generator: Where they come from.
        region: Where objects stand; marks stand anywhere.
    """
    pixels = _GRAY + _NOISE * torch.randn(rows, 3, SIDE, SIDE, generator=generator)
    count = torch.randint(LEAST, MOST + 1, (rows,), generator=generator)
    there = torch.arange(MOST) < count[:, None]
    color = torch.rand(rows, COLORS, generator=generator).argsort(1)
    shape = torch.randint(SHAPES, (rows, MOST), generator=generator)
    cells = _cells(rows, generator, region)
    at = _inside(cells, 6, generator)
    for k in range(MOST):
        _paint(pixels, at[:, k], _templates()[shape[:, k]] & there[:, k, None, None], color=_PALETTE[color[:, k]])

    taken = torch.zeros(rows, _GRID * _GRID).scatter_(1, cells, 1.0)
    order = (torch.rand(rows, len(_FREE), generator=generator) + taken[:, _FREE]).argsort(1)
    marked = _inside(_FREE[order[:, :MARKS]], 2, generator)
    wanted = torch.rand(rows, MARKS, generator=generator) < 0.5
    diagonal = torch.eye(2, dtype=torch.bool)
    for k in range(MARKS):
        _paint(pixels, marked[:, k], torch.where(wanted[:, k, None, None], diagonal, diagonal.flip(0)), color=_FAINT)
    fine = marked // FINE
    marks = torch.zeros(rows, (SIDE // FINE) ** 2)
    marks.scatter_(1, fine[..., 0] * (SIDE // FINE) + fine[..., 1], wanted.float())

    corners = torch.randint(COLORS, (rows, 2), generator=generator)
    for k, corner in enumerate(_CORNERS):
        where = _inside(torch.full((rows, 1), corner), 4, generator)[:, 0]
        _paint(pixels, where, torch.ones(rows, 4, 4, dtype=torch.bool), color=_DIM * _PALETTE[corners[:, k]])

    # From objects in the order in which they were drawn to colors: argsort is the inverse of a permutation.
    back = color.argsort(1)
    there, shape, cells = there.gather(1, back), shape.gather(1, back), cells.gather(1, back)
    columns = (cells % _GRID).masked_fill(~there, -1)
    held = torch.full((rows, _GRID * _GRID + 1), COLORS)
    held.scatter_(1, cells.masked_fill(~there, _GRID * _GRID), torch.arange(COLORS).expand(rows, -1))
    targets = _of_colors(columns, shape, generator)
    targets |= {"count": ((shape == 0) & there).sum(1), "far": corners[:, 0]}
    return Scenes(pixels=pixels.clamp(0, 1), targets=targets, marks=marks, columns=columns, cells=held[:, :-1])


def _cells(rows: int, generator: torch.Generator, region: Region) -> Int[Tensor, "b o"]:
    """Different cells for the objects."""
    column = _FREE % _GRID
    outside = {"anywhere": column < 0, "left": column >= _GRID // 2, "right": column < _GRID // 2}[region]
    order = (torch.rand(rows, len(_FREE), generator=generator) + outside.float()).argsort(1)
    return _FREE[order[:, :MOST]]


def _inside(cells: Int[Tensor, "b k"], size: int, generator: torch.Generator) -> Int[Tensor, "b k 2"]:
    """Row and column of the upper left pixel of something of this size, anywhere inside its cell."""
    moved = torch.randint(CELL - size + 1, (*cells.shape, 2), generator=generator)
    return torch.stack([cells // _GRID, cells % _GRID], dim=-1) * CELL + moved


def _paint(pixels: Tensor, at: Int[Tensor, "b 2"], mask: Tensor, *, color: Tensor | float) -> None:
    """One thing into every picture, in place."""
    size = mask.shape[-1]
    row = (at[:, 0, None] + torch.arange(size))[:, :, None].expand(-1, size, size)
    column = (at[:, 1, None] + torch.arange(size))[:, None, :].expand(-1, size, size)
    picture = torch.arange(len(pixels))[:, None, None].expand_as(row)
    new = color[:, None, None, :] if isinstance(color, Tensor) else torch.tensor(color)
    old = pixels[picture, :, row, column]
    pixels[picture, :, row, column] = torch.where(mask[..., None], new, old)


def _of_colors(
    columns: Int[Tensor, "b color"], shape: Int[Tensor, "b color"], generator: torch.Generator
) -> dict[str, Tensor]:
    """Right answers of the questions about colors and pairs of colors."""
    there = columns >= 0
    both = there[:, :, None] & there[:, None, :] & ~torch.eye(COLORS, dtype=torch.bool)
    apart = columns[:, :, None] != columns[:, None, :]
    left = (columns[:, :, None] < columns[:, None, :]).long()
    same = shape[:, :, None] == shape[:, None, :]
    # Two of three pairs differ: half of those are not asked, so that yes is as frequent as no.
    kept = torch.rand(both.shape, generator=generator).triu(1)
    kept = (kept + kept.mT) < 1 / (SHAPES - 1)
    return {
        "shape": shape.masked_fill(~there, SKIP),
        "left": left.masked_fill(~(both & apart), SKIP),
        "same": same.long().masked_fill(~(both & (same | kept)), SKIP),
    }
