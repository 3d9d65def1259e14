"""Ragged raw pixels to batches of one size and back: what every picture tower does first and last."""

from collections import defaultdict
from collections.abc import Callable
from itertools import accumulate, pairwise

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from plait.core.errors import DataError
from plait.core.tensors import Patches

HALF = (0.5, 0.5, 0.5)
IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
CLIP_MEAN, CLIP_STD = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)
"""Means and deviations of RGB in 0..1, as published with ImageNet models and with CLIP (arXiv 2103.00020)."""

Encode = Callable[[Float[Tensor, "b 3 h w"]], Float[Tensor, "b n d"]]
"""Pictures of one size to tokens in raster order."""


class Normalize(nn.Module):
    """Subtract a mean and divide by a deviation, channel by channel; part of a tower, so that it cannot be forgotten.

    Example:
        >>> Normalize()(torch.ones(1, 3, 2, 2)).unique().tolist()
        [1.0]
    """

    mean: Tensor
    std: Tensor

    def __init__(self, mean: tuple[float, ...] = HALF, std: tuple[float, ...] = HALF) -> None:
        super().__init__()
        self.register_buffer("mean", torch.tensor(mean).view(-1, 1, 1), persistent=False)
        self.register_buffer("std", torch.tensor(std).view(-1, 1, 1), persistent=False)

    def forward(self, pixels: Float[Tensor, "b c h w"]) -> Float[Tensor, "b c h w"]:
        """Normalize."""
        return (pixels - self.mean) / self.std


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
    sizes = [(h, w) for f, h, w in media.grid.tolist() for _ in range(f)]
    starts = [0, *accumulate(h * w for h, w in sizes)]
    if media.values.shape != (starts[-1], 3):
        raise DataError(
            f"the grid of {len(media.grid)} pictures counts {starts[-1]} RGB pixels, came {tuple(media.values.shape)}",
            place=f"{name or 'picture tower'} input",
            remedy="give raw pixels, one row a pixel, and the grid of each picture",
        )
    members: dict[tuple[int, int], list[int]] = defaultdict(list)
    for i, size in enumerate(sizes):
        members[size].append(i)
    tokens: dict[int, Tensor] = {}
    for (h, w), listed in members.items():
        step = batch_size or len(listed)
        for at in range(0, len(listed), step):
            batch = listed[at : at + step]
            pixels = _gather(media.values, [starts[i] for i in batch], h * w).view(len(batch), h, w, 3)
            tokens |= zip(batch, encode(pixels.permute(0, 3, 1, 2)), strict=True)
    values = [tokens[i] for i in range(len(sizes))] or [media.values.new_zeros(0, d_out)]
    found = Patches(values=torch.cat(values), grid=grid_out)
    if len(found.values) != int(grid_out.prod(1).sum()):
        raise DataError(
            f"{name or 'the tower'} made {len(found.values)} tokens of {len(media.grid)} pictures, its account says "
            f"{int(grid_out.prod(1).sum())}",
            place=f"{name or 'picture tower'} output",
            remedy="this is a fault of the tower: its grid_out and forward must agree",
        )
    return found


def _gather(values: Float[Tensor, "n c"], starts: list[int], rows: int) -> Float[Tensor, "b rows c"]:
    together = all(b - a == rows for a, b in pairwise(starts))
    if together:
        return values[starts[0] : starts[0] + rows * len(starts)].view(len(starts), rows, -1)
    return torch.stack([values[start : start + rows] for start in starts])
