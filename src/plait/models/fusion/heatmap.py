"""Attention weights and gates as pictures: a table of cells, or a shade over a picture's grid."""

from collections.abc import Sequence

import torch
from jaxtyping import Float
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

from plait.core.errors import DataError
from plait.report.token_boxes import plain

# From near white to dark blue through one hue, so that gray print and any color vision keep the order.
_STOPS = ((247, 250, 253), (158, 202, 225), (49, 130, 189), (8, 48, 107))
_INK, _PAPER = (27, 31, 36), (255, 255, 255)
_FONT_SIZE = 12
_PAD = 4


def heat_map(
    weights: Float[Tensor, "q k"], *, rows: Sequence[str] = (), columns: Sequence[str] = (), cell: int = 20
) -> Image.Image:
    """One cell a weight, white for 0 and darkest for the largest of all, with names at the side and, upright, on top.

    Args:
        weights: Of every query (row) and key (column), 0 or more.
        rows: Names of the rows; none, or one each.
        columns: Names of the columns; none, or one each.
        cell: Pixels along a side of a cell.

    Raises:
        DataError: Names do not fit the weights, or weights are empty, negative or not finite.

    Example:
        >>> heat_map(torch.eye(3), cell=10).size
        (38, 38)
    """
    values = _checked(weights)
    for names, count, what in ((rows, weights.shape[0], "rows"), (columns, weights.shape[1], "columns")):
        if names and len(names) != count:
            raise DataError(f"{len(names)} names for {count} {what}", place=what, remedy="give one name each, or none")
    font = ImageFont.load_default(_FONT_SIZE)
    left = _PAD + max((round(font.getlength(plain(name))) + _PAD for name in rows), default=0)
    top = _PAD + max((round(font.getlength(plain(name))) + _PAD for name in columns), default=0)
    high, wide = weights.shape[0] * cell, weights.shape[1] * cell
    picture = Image.new("RGB", (left + wide + _PAD, top + high + _PAD), _PAPER)
    picture.paste(_colored(values).resize((wide, high), Image.Resampling.NEAREST), (left, top))
    draw = ImageDraw.Draw(picture)
    for i, name in enumerate(rows):
        draw.text((_PAD, top + i * cell + (cell - _FONT_SIZE) // 2 - 1), plain(name), font=font, fill=_INK)
    for j, name in enumerate(columns):
        label = Image.new("RGB", (top - _PAD, _FONT_SIZE + 3), _PAPER)
        ImageDraw.Draw(label).text((_PAD // 2, 0), plain(name), font=font, fill=_INK)
        upright = label.transpose(Image.Transpose.ROTATE_90)
        picture.paste(upright, (left + j * cell + (cell - upright.width) // 2, _PAD // 2))
    draw.rectangle((left - 1, top - 1, left + wide, top + high), outline=_STOPS[1])
    return picture


def over_picture(picture: Image.Image, weights: Float[Tensor, "h w"], *, strength: float = 0.6) -> Image.Image:
    """A picture with the weights of its grid laid over it; where a weight is 0 the picture is as it was.

    Args:
        picture: What was looked at.
        weights: Of the grid's cells, 0 or more.
        strength: Opacity of the largest weight, 0 to 1.

    Raises:
        DataError: Weights are empty, negative or not finite.
    """
    values = _checked(weights)
    shade = _gray(values * strength).resize(picture.size, Image.Resampling.NEAREST)
    return Image.composite(Image.new("RGB", picture.size, (214, 39, 40)), picture.convert("RGB"), shade)


def _checked(weights: Tensor) -> Tensor:
    """Weights in 0..1, the largest 1."""
    values = weights.detach().float().cpu()
    if not values.numel() or not bool(torch.isfinite(values).all()) or bool((values < 0).any()):
        said = f"from {values.min().item():g} to {values.max().item():g}" if values.numel() else "none"
        raise DataError(
            f"weights of a heat map are finite and 0 or more; came {said}, shape {tuple(values.shape)}",
            remedy="give attention weights or gates, one head or their mean",
        )
    return values / values.max().clamp(min=torch.finfo(torch.float32).tiny)


def _colored(values: Tensor) -> Image.Image:
    stops = torch.tensor(_STOPS, dtype=torch.float32)
    at = values * (len(stops) - 1)
    low = at.floor().long().clamp(max=len(stops) - 2)
    share = (at - low)[..., None]
    mixed = stops[low] * (1 - share) + stops[low + 1] * share
    return Image.fromarray(mixed.round().to(torch.uint8).numpy())


def _gray(values: Tensor) -> Image.Image:
    return Image.fromarray((values * 255).round().to(torch.uint8).numpy())
