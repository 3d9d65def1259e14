"""Pictures larger than a tower takes: cut into tiles, encoded as a batch, and stitched together again.

Any resolution, as LLaVA-NeXT and LLaVA-OneVision have it (https://arxiv.org/abs/2408.03326). Tiles do not see each
other in the tower; what reads the tokens does.
"""

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from plait.core.errors import ConfigError, DataError
from plait.core.protocols import Encoder
from plait.core.tensors import Patches


class TiledEncoder(nn.Module):
    """An :class:`~plait.core.protocols.Encoder` that gives a tower items of one tile at most.

    An item larger than a tile, whose sides are multiples of it, is cut; its tiles' tokens are put together so that they
    are in raster order over the whole item. An item of a tile or less goes to the tower as it is. All tiles and such
    items go there in one call.

    Args:
        tower: Encodes tiles.
        tile: Pixels a side of a tile.

    Raises:
        ConfigError: The tower makes no tokens of a tile.

    Example:
        A tower that makes 24 x 24 tokens of 336 x 336 pixels makes 48 x 72 of 672 x 1,008, in six tiles.
    """

    def __init__(self, tower: Encoder, tile: int) -> None:
        super().__init__()
        self.tower, self.tile = tower, tile
        self.d_out: int = tower.d_out
        found = tower.grid_out(torch.tensor([[1, tile, tile]]))[0].tolist()
        if tile < 1 or min(found) < 1:
            raise ConfigError(
                f"a tile of {tile} x {tile} pixels becomes a grid of {found} tokens",
                place="tile",
                remedy="set the size that the tower was trained at",
            )
        self._rows, self._columns = int(found[1]), int(found[2])
        if found[0] != 1:
            raise ConfigError(
                f"a picture of one frame becomes {found[0]} frames", place="tile", remedy="use a tower of pictures"
            )

    def grid_out(self, grid: Int[Tensor, "item 3"]) -> Int[Tensor, "item 3"]:
        """Tokens of a tile times tiles; items of a tile or less as the tower says."""
        cut = self._cut(grid)
        whole = grid // grid.new_tensor([1, self.tile, self.tile]) * grid.new_tensor([1, self._rows, self._columns])
        return torch.where(cut[:, None], whole, self.tower.grid_out(grid))

    def forward(self, media: Patches) -> Patches:
        """Encode.

        Raises:
            DataError: An item is larger than a tile, and its sides are no multiples of it; or rows and grid disagree.
        """
        cut: list[bool] = self._cut(media.grid).tolist()
        if not any(cut):
            return self.tower(media)
        shapes: list[list[int]] = media.grid.tolist()
        self._check(shapes, cut, rows=len(media.values))
        items: list[Tensor] = []
        grids: list[list[int]] = []
        parts: list[int] = []
        for values, shape, large in zip(media.values.split(_rows(shapes)), shapes, cut, strict=True):
            items.append(cut_tiles(values.unflatten(0, shape), self.tile) if large else values)
            f, h, w = shape
            parts.append(f * (h // self.tile) * (w // self.tile) if large else 1)
            grids += [[1, self.tile, self.tile]] * parts[-1] if large else [shape]
        found = self.tower(Patches(values=torch.cat(items), grid=media.grid.new_tensor(grids)))
        out: list[list[int]] = self.grid_out(media.grid).tolist()
        tokens = [
            stitch_tiles(values, shape, rows=self._rows, columns=self._columns) if large else values
            for values, shape, large in zip(found.values.split(_rows(out)), out, cut, strict=True)
        ]
        return Patches(values=torch.cat(tokens), grid=media.grid.new_tensor(out))

    def _cut(self, grid: Int[Tensor, "item 3"]) -> Tensor:
        return (grid[:, 1:] > self.tile).any(1)

    def _check(self, shapes: list[list[int]], cut: list[bool], *, rows: int) -> None:
        if sum(_rows(shapes)) != rows:
            raise DataError(
                f"the grid of {len(shapes)} items counts {sum(_rows(shapes))} rows, came {rows}",
                place="TiledEncoder input",
                remedy="give raw pixels, one row a pixel, and the grid of each item",
            )
        for number, (shape, large) in enumerate(zip(shapes, cut, strict=True)):
            if large and (shape[1] % self.tile or shape[2] % self.tile):
                raise DataError(
                    f"item {number} has {shape[1]} x {shape[2]} pixels, which tiles of {self.tile} x {self.tile} do "
                    "not fill",
                    place="TiledEncoder input",
                    remedy="prepare pictures with a media contract whose fit is Tiles, of this tower's size",
                )


def cut_tiles(item: Float[Tensor, "f h w c"], tile: int) -> Float[Tensor, "n c"]:
    """Pixels of an item tile after tile, each in raster order; frames, then rows of tiles; see :func:`stitch_tiles`."""
    cells = item.unflatten(2, (-1, tile)).unflatten(1, (-1, tile))  # f R t C t c
    return cells.permute(0, 1, 3, 2, 4, 5).reshape(-1, item.shape[-1])


def stitch_tiles(values: Float[Tensor, "n d"], shape: list[int], *, rows: int, columns: int) -> Float[Tensor, "n d"]:
    """Tokens tile after tile to raster order over the whole item: the inverse of :func:`cut_tiles`.

    Args:
        values: Of one item.
        shape: Frames, rows and columns of the whole item, in tokens.
        rows: Of a tile's tokens.
        columns: Likewise.
    """
    frames, down, right = shape[0], shape[1] // rows, shape[2] // columns
    cells = values.unflatten(0, (frames, down, right, rows, columns))
    return cells.permute(0, 1, 3, 2, 4, 5).reshape(len(values), -1)


def _rows(shapes: list[list[int]]) -> list[int]:
    return [f * h * w for f, h, w in shapes]
