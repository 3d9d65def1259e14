"""Ragged raw pixels to batches of one size and back: what every picture tower does first and last."""

import math
from collections import defaultdict
from collections.abc import Callable
from itertools import accumulate, pairwise

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from plait.core.errors import DataError
from plait.core.tensors import Patches
from plait.models.fixed import Fixed

HALF = (0.5, 0.5, 0.5)
IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
CLIP_MEAN, CLIP_STD = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)
"""Means and deviations of RGB in 0..1, as published with ImageNet models and with CLIP (arXiv 2103.00020)."""

Encode = Callable[[Float[Tensor, "b 3 h w"]], Float[Tensor, "b n d"]]
"""Pictures of one size to tokens in raster order."""
EncodeClips = Callable[[Float[Tensor, "b f h w c"]], Float[Tensor, "b n d"]]
"""Items of one shape to tokens in raster order."""


class Normalize(nn.Module):
    """Subtract a mean and divide by a deviation, channel by channel; part of a tower, so that it cannot be forgotten.

    Example:
        >>> Normalize()(torch.ones(1, 3, 2, 2)).unique().tolist()
        [1.0]
    """

    def __init__(self, mean: tuple[float, ...] = HALF, std: tuple[float, ...] = HALF) -> None:
        super().__init__()
        self._mean, self._std = (Fixed(torch.tensor(x, device="cpu").view(-1, 1, 1)) for x in (mean, std))

    @property
    def mean(self) -> Float[Tensor, "c 1 1"]:
        """Of each channel."""
        return self._mean.values

    @property
    def std(self) -> Float[Tensor, "c 1 1"]:
        """Of each channel."""
        return self._std.values

    def forward(self, pixels: Float[Tensor, "b c h w"]) -> Float[Tensor, "b c h w"]:
        """Normalize."""
        return (pixels - self._mean.on(pixels.device)) / self._std.on(pixels.device)


class RawPixels(nn.Module):
    """An :class:`~plait.core.protocols.Encoder` that changes nothing, for a cache of prepared pictures.

    A tower that learns sees each picture in every epoch: decoding and scaling happen once, encoding every time.
    """

    d_out = 3

    def forward(self, media: Patches) -> Patches:
        """The same pixels."""
        return media

    def grid_out(self, grid: Int[Tensor, "item 3"]) -> Int[Tensor, "item 3"]:
        """One row a pixel."""
        return grid


def by_size(
    media: Patches, encode: Encode, *, grid_out: Int[Tensor, "item 3"], d_out: int, batch_size: int = 0, name: str = ""
) -> Patches:
    """Encode ragged pictures, those of one size together, and put their tokens back in order.

    Frames of one item are encoded one by one. Rows of pixels are channels-last memory already, so nothing is copied on
    the way in where all pictures are of one size.

    Args:
        media: Raw RGB pixels, one row a pixel.
        encode: Called with pictures of one size.
        grid_out: What the tower says it makes of the grid.
        d_out: Width of its tokens.
        batch_size: Pictures encoded together at most; 0 takes all of one size at once.
        name: Of the tower, for errors.

    Raises:
        DataError: Rows and grid disagree, the rows are not RGB, or the tower makes another number of tokens than it
            says.
    """
    shapes = media.grid.repeat_interleave(media.grid[:, 0], dim=0)
    shapes[:, 0] = 1
    rows = int(shapes.prod(1).sum())
    if media.values.shape != (rows, 3):
        raise DataError(
            f"the grid of {len(media.grid)} pictures counts {rows} RGB pixels, came {tuple(media.values.shape)}",
            place=f"{name or 'picture tower'} input",
            remedy="give raw pixels, one row a pixel, and the grid of each picture",
        )
    if not media.values.is_floating_point():
        raise DataError(
            f"pixels are {str(media.values.dtype).removeprefix('torch.')}, expected numbers in 0..1",
            place=f"{name or 'picture tower'} input",
            remedy="divide by 255",
        )
    return by_shape(
        Patches(values=media.values, grid=shapes),
        lambda clips: encode(clips[:, 0].permute(0, 3, 1, 2)),
        grid_out=grid_out,
        d_out=d_out,
        batch_size=batch_size,
        name=name or "picture tower",
    )


def by_shape(
    media: Patches, encode: EncodeClips, *, grid_out: Int[Tensor, "item 3"], d_out: int, batch_size: int = 0, name: str
) -> Patches:
    """Encode ragged items of any kind, those of one shape together, and put their tokens back in order.

    Nothing is padded, so every item comes out as it would alone.

    Args:
        media: Raw items: pixels of clips, samples of sounds.
        encode: Called with items of one shape, ``b f h w c``.
        grid_out: What the tower says it makes of the grid.
        d_out: Width of its tokens.
        batch_size: Items encoded together at most; 0 takes all of one shape at once.
        name: Of the tower, for errors.

    Raises:
        DataError: Rows and grid disagree, or the tower makes another number of tokens than it says.
    """
    shapes: list[tuple[int, ...]] = [tuple(shape) for shape in media.grid.tolist()]
    starts = [0, *accumulate(f * h * w for f, h, w in shapes)]
    if len(media.values) != starts[-1]:
        raise DataError(
            f"the grid of {len(media.grid)} items counts {starts[-1]} rows, came {tuple(media.values.shape)}",
            place=f"{name} input",
            remedy="give raw media, one row a pixel or sample, and the grid of each item",
        )
    members: dict[tuple[int, ...], list[int]] = defaultdict(list)
    for i, shape in enumerate(shapes):
        members[shape].append(i)
    tokens: dict[int, Tensor] = {}
    for shape, listed in members.items():
        step = batch_size or len(listed)
        for at in range(0, len(listed), step):
            batch = listed[at : at + step]
            items = _gather(media.values, [starts[i] for i in batch], math.prod(shape)).unflatten(1, shape)
            tokens |= zip(batch, encode(items), strict=True)
    values = [tokens[i] for i in range(len(shapes))] or [media.values.new_zeros(0, d_out)]
    found = Patches(values=torch.cat(values), grid=grid_out)
    if len(found.values) != int(grid_out.prod(1).sum()):
        raise DataError(
            f"{name} made {len(found.values)} tokens of {len(media.grid)} items, its account says "
            f"{int(grid_out.prod(1).sum())}",
            place=f"{name} output",
            remedy="this is a fault of the tower: its grid_out and forward must agree",
        )
    return found


def _gather(values: Float[Tensor, "n c"], starts: list[int], rows: int) -> Float[Tensor, "b rows c"]:
    together = all(b - a == rows for a, b in pairwise(starts))
    if together:
        return values[starts[0] : starts[0] + rows * len(starts)].view(len(starts), rows, -1)
    return torch.stack([values[start : start + rows] for start in starts])
