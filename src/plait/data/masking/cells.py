"""Which cells of a picture are hidden: at random (MAE), or in blocks (BEiT). The number is exact.

MAE: https://arxiv.org/abs/2111.06377. BEiT: https://arxiv.org/abs/2106.08254, algorithm 1.
"""

from __future__ import annotations

import math

import torch
from jaxtyping import Bool
from torch import Tensor

from plait.core.errors import ConfigError

_TRIES = 10
"""For a block that adds something and not too much, as in the authors' code."""


def hidden_number(cells: int, ratio: float) -> int:
    """How many of so many cells are hidden: those that are left are ``int(cells * (1 - ratio))``, as in MAE.

    Raises:
        ConfigError: The ratio is not between 0 and 1, or none or all would be hidden.

    Example:
        >>> hidden_number(196, 0.75)
        147
    """
    if not 0 < ratio < 1:
        raise ConfigError(f"the ratio is {ratio:g}", place="ratio", remedy="set it above 0 and below 1")
    shown = int(cells * (1 - ratio) + 1e-9)
    if not 0 < shown < cells:
        raise ConfigError(
            f"of {cells} cells {cells - shown} would be hidden",
            place="ratio",
            remedy="choose a ratio that hides some and leaves some, or smaller patches",
        )
    return cells - shown


def random_cells(rows: int, columns: int, *, ratio: float, generator: torch.Generator) -> Bool[Tensor, "row column"]:
    """Cells chosen one by one, all equally likely.

    Args:
        rows: Of the picture.
        columns: Of the picture.
        ratio: Share that is hidden.
        generator: Of the choice, on the CPU.

    Raises:
        ConfigError: As :func:`hidden_number`.
    """
    number = hidden_number(rows * columns, ratio)
    hidden = torch.zeros(rows * columns, dtype=torch.bool)
    hidden[torch.randperm(rows * columns, generator=generator)[:number]] = True
    return hidden.view(rows, columns)


def block_cells(
    rows: int,
    columns: int,
    *,
    ratio: float = 0.4,
    smallest: int = 16,
    aspect: float = 0.3,
    generator: torch.Generator,
) -> Bool[Tensor, "row column"]:
    """Rectangles until the number is reached: what is hidden hangs together, and cannot be guessed from next door.

    A block's area is drawn between the smallest and what is still wanted, the logarithm of its height over its width
    between both limits. Where ten blocks in a row add nothing or too much, the rest is taken cell by cell at the rim of
    what is hidden; there BEiT's code stops short of the number, or begins again.

    Args:
        rows: Of the picture.
        columns: Of the picture.
        ratio: Share that is hidden; the paper's is 0.4.
        smallest: Cells of a block at least; the paper's 16 are for 14 x 14 cells.
        aspect: Smallest height over width; the largest is its inverse.
        generator: Of the choice, on the CPU.

    Raises:
        ConfigError: As :func:`hidden_number`; the smallest block is below 1, or the aspect not above 0 and at most 1.
    """
    number = hidden_number(rows * columns, ratio)
    if smallest < 1:
        raise ConfigError(f"smallest is {smallest}", place="smallest", remedy="set it to 1 or more")
    if not 0 < aspect <= 1:
        raise ConfigError(f"aspect is {aspect:g}", place="aspect", remedy="set it above 0 and to at most 1")
    hidden = torch.zeros(rows, columns, dtype=torch.bool)
    while (left := number - int(hidden.sum())) > 0:
        for _ in range(_TRIES):
            block = _block(hidden, area=(min(smallest, left), left), aspect=aspect, generator=generator)
            if block is not None and 0 < int((~hidden[block]).sum()) <= left:
                hidden[block] = True
                break
        else:
            _grow(hidden, left, generator)
    return hidden


def _block(
    hidden: Bool[Tensor, "row column"], *, area: tuple[int, int], aspect: float, generator: torch.Generator
) -> tuple[slice, slice] | None:
    """A rectangle anywhere; None where the one drawn is larger than the picture."""
    one, two, *where = torch.rand(4, dtype=torch.float64, generator=generator).tolist()
    size = area[0] + one * (area[1] - area[0])
    shape = math.exp((2 * two - 1) * -math.log(aspect))
    height, width = max(1, round(math.sqrt(size * shape))), max(1, round(math.sqrt(size / shape)))
    rows, columns = hidden.shape
    if height > rows or width > columns:
        return None
    top, left = int(where[0] * (rows - height + 1)), int(where[1] * (columns - width + 1))
    return slice(top, top + height), slice(left, left + width)


def _grow(hidden: Bool[Tensor, "row column"], number: int, generator: torch.Generator) -> None:
    """Hide so many cells more, each beside one that is hidden (or anywhere, where none is)."""
    for _ in range(number):
        near = torch.zeros_like(hidden)
        near[1:] |= hidden[:-1]
        near[:-1] |= hidden[1:]
        near[:, 1:] |= hidden[:, :-1]
        near[:, :-1] |= hidden[:, 1:]
        rim = (near & ~hidden).flatten().nonzero()[:, 0]
        rim = rim if len(rim) else (~hidden).flatten().nonzero()[:, 0]
        chosen = rim[int(torch.randint(len(rim), (), generator=generator))]
        hidden.view(-1)[chosen] = True
