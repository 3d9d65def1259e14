"""Which sizes a picture becomes, from its width and height alone: a square, its own resolution, or tiles.

All of this is arithmetic: the account of a text's placeholders is known before any pixel is touched.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from typing import Any, NamedTuple

from plait.core.errors import CheckpointError, ConfigError, DataError

_LONGEST = 200
"""The most that one side may be of the other where both are rounded on their own (Qwen2-VL refuses beyond)."""


class Item(NamedTuple):
    """One item that a picture becomes.

    Attributes:
        height: Pixels.
        width: Pixels.
        bent: Whether the picture fills it, each side scaled on its own; else it is fitted whole and the rest is filled.
    """

    height: int
    width: int
    bent: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class Square:
    """The whole picture fitted into one square."""

    def items(self, width: int, height: int, *, size: int) -> tuple[Item, ...]:
        """One square of ``size`` pixels a side, whatever the picture's size."""
        _check(width, height)
        return (Item(size, size),)


@dataclass(frozen=True, slots=True, kw_only=True)
class Native:
    """The picture at its own resolution and shape, each side rounded to whole cells: Qwen2-VL's arithmetic.

    ``Qwen2-VL``, https://arxiv.org/abs/2409.12191, section 2.1; as transformers' ``smart_resize``. Where that refuses a
    picture (one side more than 200 times the other) or goes beyond its own limit (a strip less than a cell wide), the
    picture is fitted whole into a strip of at most ``max_pixels``, and the rest is filled.

    Attributes:
        cell: Both sides are multiples of this.
        max_pixels: No item has more; larger pictures are scaled down.
        min_pixels: Smaller pictures are scaled up to about this many.

    Raises:
        ConfigError: No item can be of such sizes.
    """

    cell: int
    max_pixels: int
    min_pixels: int = 0

    def __post_init__(self) -> None:
        if self.cell < 1 or self.max_pixels < self.cell**2 or not 0 <= self.min_pixels <= self.max_pixels:
            raise ConfigError(
                f"cell {self.cell}, min_pixels {self.min_pixels:,}, max_pixels {self.max_pixels:,}",
                place="fit",
                remedy="let max_pixels hold one cell (its side squared) or more, and min_pixels be no more than it",
            )

    def items(self, width: int, height: int, *, size: int) -> tuple[Item, ...]:
        """One item; ``size`` plays no part."""
        _check(width, height)
        high, wide = smart_resize(height, width, cell=self.cell, least=self.min_pixels, most=self.max_pixels)
        if high * wide > self.max_pixels:
            high, wide = _floored(height, width, cell=self.cell, most=self.max_pixels)
        if high * wide <= self.max_pixels and max(width, height) <= _LONGEST * min(width, height):
            return (Item(high, wide, bent=True),)
        short, long = self._strip(min(width, height), max(width, height))
        return (Item(short, long) if width >= height else Item(long, short),)

    def _strip(self, short: int, long: int) -> tuple[int, int]:
        """The sides of a strip that holds the picture whole, not enlarged."""
        cell = self.cell
        beta = max(1.0, math.sqrt(short * long / self.max_pixels))
        across = max(cell, math.floor(short / beta / cell) * cell)
        most = self.max_pixels // across // cell * cell
        scale = min(1.0, across / short, most / long)
        return across, min(most, max(cell, math.ceil(long * scale / cell) * cell))


@dataclass(frozen=True, slots=True, kw_only=True)
class Tiles:
    """Any resolution: an overview of one square, then the picture fitted into so many squares, whole.

    LLaVA-NeXT's and LLaVA-OneVision's scheme (https://arxiv.org/abs/2408.03326): of all arrangements, the one that
    keeps most of the picture's pixels, and of these the one with least filling. A picture for which that is a single
    square is its overview alone.

    Attributes:
        max_tiles: Rows times columns of an arrangement are at most this.

    Raises:
        ConfigError: There are fewer than two.
    """

    max_tiles: int

    def __post_init__(self) -> None:
        if self.max_tiles < 2:
            raise ConfigError(
                f"max_tiles is {self.max_tiles}", place="fit", remedy="set 2 or more, or fit pictures into a square"
            )

    def items(self, width: int, height: int, *, size: int) -> tuple[Item, ...]:
        """The overview and, if one tile is too few, the whole arrangement as one item."""
        _check(width, height)
        rows, columns = best_arrangement(height, width, size=size, most=self.max_tiles)
        overview = Item(size, size)
        return (overview,) if rows == columns == 1 else (overview, Item(rows * size, columns * size))


Fit = Square | Native | Tiles
"""How pictures become items."""

SQUARE = Square()
"""What contracts were before there was a choice."""

_KINDS: Mapping[str, type[Square] | type[Native] | type[Tiles]] = {"square": Square, "native": Native, "tiles": Tiles}


def smart_resize(height: int, width: int, *, cell: int, least: int, most: int) -> tuple[int, int]:
    """Height and width of Qwen2-VL: each side rounded to cells; beyond the limits scaled first, down or up.

    Its limits hold for ordinary pictures; for strips less than a cell wide the result may have more pixels than
    ``most``. It may have no pixels where ``least`` is 0 and a side is less than half a cell: then one cell is taken.

    Example:
        >>> smart_resize(480, 640, cell=28, least=56 * 56, most=1_003_520)
        (476, 644)
    """
    high, wide = (round(side / cell) * cell for side in (height, width))
    if high * wide > most:
        return _floored(height, width, cell=cell, most=most)
    least = max(least, 1)
    if high * wide < least:
        beta = math.sqrt(least / (height * width))
        high, wide = (math.ceil(side * beta / cell) * cell for side in (height, width))
    return high, wide


def _floored(height: int, width: int, *, cell: int, most: int) -> tuple[int, int]:
    """Scaled to ``most`` pixels, sides rounded down to cells, one at least."""
    beta = math.sqrt(height * width / most)
    high, wide = (max(cell, math.floor(side / beta / cell) * cell) for side in (height, width))
    return high, wide


def best_arrangement(height: int, width: int, *, size: int, most: int) -> tuple[int, int]:
    """Rows and columns of at most ``most`` squares that keep most of a picture, with least filling.

    Example:
        >>> best_arrangement(480, 1000, size=336, most=9)
        (2, 3)
    """

    def worth(arrangement: tuple[int, int]) -> tuple[int, int]:
        rows, columns = arrangement
        scale = min(columns * size / width, rows * size / height)
        # A side less than a pixel long has one: transformers counts none, and finds no arrangement for a line.
        kept = min(max(1, int(width * scale)) * max(1, int(height * scale)), width * height)
        return kept, kept - rows * columns * size * size

    return max(_arrangements(most), key=worth)


def _arrangements(most: int) -> Iterator[tuple[int, int]]:
    """All of them, few rows first."""
    return ((rows, columns) for rows in range(1, most + 1) for columns in range(1, most // rows + 1))


def fit_to_json(fit: Fit) -> dict[str, Any]:
    """Plain data; the inverse of :func:`fit_from_json`."""
    kind = next(name for name, found in _KINDS.items() if isinstance(fit, found))
    return {"kind": kind, **asdict(fit)}


def fit_from_json(record: Any) -> Fit:
    """Read what :func:`fit_to_json` wrote.

    Raises:
        CheckpointError: It describes no fit.
    """
    try:
        fields = dict(record)
        return _KINDS[fields.pop("kind")](**fields)
    except (KeyError, TypeError, ValueError, ConfigError) as error:
        raise CheckpointError(
            f"fit is {record!r}, which describes none of {', '.join(_KINDS)}: {error}",
            place="plait.json: fit",
            remedy="use an undamaged copy of the folder, or the version of plait that wrote it",
        ) from error


def _check(width: int, height: int) -> None:
    if width < 1 or height < 1:
        raise DataError(
            f"a picture of {width} x {height} pixels",
            place="media contract",
            remedy="let MediaRef say the picture's width and height in pixels, as the data stage does",
        )
