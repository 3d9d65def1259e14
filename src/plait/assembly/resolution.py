"""A tower and its contract at another resolution than one square: the picture's own, or in tiles; and the account."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

import torch
from pydantic import TypeAdapter, ValidationError
from torch import Tensor

from plait.assembly.contract import ImageContract
from plait.assembly.fit import SQUARE, Native, Tiles
from plait.core.errors import ConfigError, DataError
from plait.core.protocols import Encoder
from plait.core.types import MediaRef
from plait.models import specs
from plait.models.towers.tiled import TiledEncoder


def read_fit(fit: specs.Fit | Mapping[str, Any] | None) -> specs.Fit:
    """Settings of a fit, given as such or as plain data; a square where there are none.

    Raises:
        ConfigError: They describe no fit.
    """
    try:
        return TypeAdapter[specs.Fit](specs.Fit).validate_python(specs.Square() if fit is None else fit)
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        raise ConfigError(
            f"fit, {'.'.join(map(str, first['loc'])) or 'kind'}: {first['msg']}",
            place="fit",
            remedy="give kind square, native or tiles, with its settings",
        ) from error


def fitted(
    encoder: Encoder, contract: ImageContract, fit: specs.Fit, *, name: str, fixed: bool
) -> tuple[Encoder, ImageContract]:
    """The same tower for pictures that are fitted otherwise, and the contract that says so.

    Args:
        encoder: Of squares.
        contract: Of squares.
        fit: How pictures are fitted.
        name: Of the tower, for errors.
        fixed: Whether the tower takes no other pictures than such squares.

    Raises:
        ConfigError: The tower cannot, or the settings do not fit together.
    """
    match fit:
        case specs.Native():
            return encoder, replace(contract, fit=_native(encoder, contract, fit, name=name, fixed=fixed))
        case specs.Tiles():
            return TiledEncoder(encoder, contract.size), replace(contract, fit=Tiles(max_tiles=fit.max_tiles))
        case _:
            return encoder, contract


def _native(encoder: Encoder, contract: ImageContract, fit: specs.Native, *, name: str, fixed: bool) -> Native:
    side = contract.size
    if fixed:
        raise ConfigError(
            f"fit is native, this tower takes pictures of {side} x {side} pixels only",
            place=name,
            remedy="set fit to tiles, or use a tower whose positions are computed or interpolated",
        )
    cell = cell_of(encoder, side) * fit.join
    return Native(cell=cell, max_pixels=fit.max_pixels or side * side, min_pixels=fit.min_pixels)


def cell_of(encoder: Encoder, size: int) -> int:
    """Pixels a side of a token, read off the tower's account of pictures up to twice its size.

    Raises:
        ConfigError: However large the picture, it becomes one token.
    """
    sides = torch.arange(2 * size + 2)
    rows: list[int] = encoder.grid_out(torch.stack([torch.ones_like(sides), sides, sides], dim=1))[:, 1].tolist()
    if 1 not in rows or 2 not in rows:
        raise ConfigError(
            f"pictures of up to {2 * size} pixels a side become {max(rows)} row of tokens",
            place="fit",
            remedy="use a tower that gives larger pictures more tokens (max_cells of efficientnet-lite0 limits them)",
        )
    return rows.index(2) - rows.index(1)


def slots_of(contract: ImageContract, *accounts: Callable[[Tensor], Tensor]) -> Callable[[MediaRef], int]:
    """The token account of a picture, from its width and height alone, for :class:`plait.data.template.Template`.

    Args:
        contract: How pictures become items.
        accounts: What each item goes through, grid to grid: of the tower, then of the model or its connector.

    Example:
        ``slots_of(tower.contract, tower.encoder.grid_out, connector.grid_out)``
    """

    def slots(ref: MediaRef) -> int:
        known = ref.width > 0 and ref.height > 0
        if not known and contract.fit != SQUARE:
            raise DataError(
                f"the size of the picture is not known ({ref.width} x {ref.height}), and how many tokens it becomes "
                "depends on it",
                place=f"picture {ref.sha256[:12]} ({ref.uri or 'no uri'})",
                remedy="let MediaRef say the picture's width and height in pixels, as the data stage does",
            )
        sizes = contract.sizes(ref.width or 1, ref.height or 1)
        grid = torch.tensor([[1, height, width] for height, width in sizes])
        for account in accounts:
            grid = account(grid)
        return int(grid.prod(1).sum())

    return slots
