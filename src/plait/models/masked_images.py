"""Pictures of which a part is hidden: what a vision transformer tells of it.

MAE: https://arxiv.org/abs/2111.06377. BEiT: https://arxiv.org/abs/2106.08254. SimMIM: https://arxiv.org/abs/2111.09886.

A batch has one picture a row, all of one size; ``batch.labels``, ``b n``, has an entry for each of the n cells
(patches, in raster order), and is :data:`~plait.core.tensors.IGNORE` where a cell is seen.
"""

from typing import NamedTuple

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn

from plait.core.errors import ConfigError, DataError
from plait.core.tensors import IGNORE, Batch
from plait.models.attention import Places, real_keys
from plait.models.position.absolute import SinCosGrid
from plait.models.towers.vit import VisionTransformer, patches_of
from plait.models.transformer import Transformer, TransformerSizes

_EPS = 1e-6
"""Added to the variance of a cell's pixels; MAE's code has it."""


class HiddenPixels(NamedTuple):
    """Pixels of hidden cells, as :class:`plait.objectives.masked.MaskedPixels` compares them."""

    found: Float[Tensor, "n e"]
    wanted: Float[Tensor, "n e"]


class MaskedAutoencoder(nn.Module):
    """MAE: the tower sees the cells that are left, a small decoder finds the pixels of the others.

    What is hidden costs the tower nothing: at a ratio of 0.75 it computes a quarter of the tokens. The decoder is
    thrown away afterwards.

    Args:
        tower: Without relative positions, whose tables are of whole grids.
        d: Width of the decoder, a multiple of 4; the paper's is 512.
        depth: Its blocks; 8 in the paper.
        heads: Its heads; 16 in the paper.
        normalized: Set each cell's pixels to mean 0 and variance 1 before they are compared, which the paper found
            better.

    Raises:
        ConfigError: The tower has relative positions or drops patches, or the width is no multiple of 4.
    """

    def __init__(
        self, tower: VisionTransformer, *, d: int = 512, depth: int = 8, heads: int = 16, normalized: bool = True
    ) -> None:
        super().__init__()
        if tower.sizes.relative != "none":
            raise ConfigError(
                f"relative positions ({tower.sizes.relative}) are those of whole grids, and cells are missing",
                place="relative",
                remedy="use absolute positions (learned, sincos, row_column)",
            )
        _check_keeps(tower)
        self.tower, self.normalized = tower, normalized
        self.narrow = nn.Linear(tower.d_out, d)
        self.mask = nn.Parameter(torch.empty(d))
        nn.init.normal_(self.mask, std=0.02)
        self.position = SinCosGrid(d)
        self.decoder = Transformer(TransformerSizes(d=d, depth=depth, heads=heads, eps=tower.sizes.transformer.eps))
        self.pixels = nn.Linear(d, 3 * tower.sizes.patch**2)

    def forward(self, batch: Batch) -> HiddenPixels:
        """Pixels of hidden cells, in reading order, beside those that stood there.

        Raises:
            DataError: Pictures differ in size, or a row has not one; labels are not those of its cells; or all or none
                of a row's cells are hidden.
        """
        pixels, hidden, grid = _read(self.tower, batch)
        tokens = self.tower.embedded(pixels)
        front = self.tower.prefix
        seen = self._seen(tokens, hidden)
        number, cells = len(hidden), hidden.shape[1]
        code = self.position(*grid).to(seen)
        inside = self.mask.to(seen).expand(number, cells, -1).clone()
        inside[~hidden] = seen[:, front:][self._real(hidden)]
        whole = torch.cat([seen[:, :front], inside + code], 1)
        found = self.decoder(whole)[:, front:][hidden]
        return HiddenPixels(self.pixels(found), self._wanted(pixels)[hidden])

    def _seen(self, tokens: Float[Tensor, "b m d"], hidden: Bool[Tensor, "b n"]) -> Float[Tensor, "b k e"]:
        """What the tower makes of the cells that are left, narrowed; rows that have fewer are filled up behind."""
        front, real = self.tower.prefix, self._real(hidden)
        order = hidden.int().argsort(dim=1, stable=True)[:, : real.shape[1]]  # seen cells first, in raster order
        left = tokens[:, front:].gather(1, order[..., None].expand(-1, -1, tokens.shape[2]))
        mask = None
        if not bool(real.all()):
            mask = real_keys(torch.cat([real.new_ones(len(real), front), real], 1))
        return self.narrow(self.tower.transformer(torch.cat([tokens[:, :front], left], 1), Places(mask=mask)))

    @staticmethod
    def _real(hidden: Bool[Tensor, "b n"]) -> Bool[Tensor, "b k"]:
        """Which of a row's places hold a cell that is left."""
        seen = (~hidden).sum(1)
        return torch.arange(int(seen.max()), device=hidden.device) < seen[:, None]

    def _wanted(self, pixels: Float[Tensor, "b 3 h w"]) -> Float[Tensor, "b n e"]:
        whole = self.tower.whole(self.tower.normalize(pixels))
        cells = patches_of(whole.permute(0, 2, 3, 1), self.tower.sizes.patch)
        if not self.normalized:
            return cells
        return (cells - cells.mean(-1, keepdim=True)) / (cells.var(-1, keepdim=True) + _EPS).sqrt()


class MaskedCells(nn.Module):
    """BEiT: a learned token stands in place of hidden cells, and the tower tells which code each of them has.

    Labels are the codes, such as those of a :class:`plait.models.image_tokens.ImageTokenizer`; the loss is
    :class:`plait.objectives.masked.MaskedTokens`.

    Args:
        tower: Sees the whole grid; relative positions are welcome.
        codes: How many there are.

    Raises:
        ConfigError: The tower drops patches.
    """

    def __init__(self, tower: VisionTransformer, *, codes: int) -> None:
        super().__init__()
        _check_keeps(tower)
        self.tower = tower
        self.mask = nn.Parameter(torch.empty(tower.d_out))
        nn.init.trunc_normal_(self.mask, std=0.02)
        self.head = nn.Linear(tower.d_out, codes)

    def forward(self, batch: Batch) -> Float[Tensor, "n v"]:
        """Scores of the codes of hidden cells, in reading order.

        Raises:
            DataError: As :meth:`MaskedAutoencoder.forward`; a row may have no hidden cell here, or all.
        """
        pixels, hidden, _ = _read(self.tower, batch, some=False)
        found = self.tower.tokens(pixels, masked=hidden, mask=self.mask)
        return self.head(found[:, self.tower.prefix :][hidden])


def _check_keeps(tower: VisionTransformer) -> None:
    if tower.sizes.patch_dropout:
        raise ConfigError(
            f"patch_dropout is {tower.sizes.patch_dropout:g}, and hidden cells would be among what is dropped",
            place="patch_dropout",
            remedy="set it to 0: how much is hidden says the mask",
        )


def _read(
    tower: VisionTransformer, batch: Batch, *, some: bool = True
) -> tuple[Float[Tensor, "b 3 h w"], Bool[Tensor, "b n"], tuple[int, int]]:
    """Pixels, which cells are hidden, rows and columns of cells."""
    media, number = batch.media["image"], len(batch.labels)
    rows = batch.item_row["image"]
    if len(media.grid) != number or not torch.equal(rows, torch.arange(number, device=rows.device)):
        raise DataError(
            f"{len(media.grid)} pictures for {number} rows",
            place=f"sample {batch.sample_ids[0]}",
            remedy="give each row one picture, in the order of rows",
        )
    if len(media.grid.unique(dim=0)) > 1:
        raise DataError(
            "pictures of several sizes in a batch",
            place=f"sample {batch.sample_ids[0]}",
            remedy="scale pictures to one size, or group them by it",
        )
    _, height, width = (int(side) for side in tower.grid_out(media.grid[:1])[0])
    hidden = batch.labels != IGNORE
    if hidden.shape[1] != height * width:
        raise DataError(
            f"{hidden.shape[1]} labels for {height} x {width} cells",
            place=f"sample {batch.sample_ids[0]}",
            remedy="draw the mask for the grid that the tower makes of these pictures",
        )
    if some and bool((bad := hidden.all(1) | ~hidden.any(1)).any()):
        raise DataError(
            "all or none of a picture's cells are hidden",
            place=f"sample {batch.sample_ids[int(bad.int().argmax())]}",
            remedy="hide some cells, and leave some",
        )
    frames, high, wide = (int(side) for side in media.grid[0])
    if frames != 1:
        raise DataError(
            f"{frames} frames in an item", place=f"sample {batch.sample_ids[0]}", remedy="give pictures, not videos"
        )
    pixels = media.values.unflatten(0, (number, high, wide)).permute(0, 3, 1, 2)
    return pixels, hidden, (height, width)
