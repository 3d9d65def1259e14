"""Swin Transformer: attention inside windows that shift from block to block, on maps that get coarser.

Liu et al., "Swin Transformer: Hierarchical vision transformer using shifted windows", https://arxiv.org/abs/2103.14030.
Made of the blocks of the one Transformer: windows are the rows of their batch.
"""

from dataclasses import dataclass
from itertools import accumulate
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.nn import functional

from plait.models.attention import Backend, Places, same_segment
from plait.models.position.relative import GridBias, gaps
from plait.models.towers.maps import MapTower, channels_last, same_count
from plait.models.towers.pixels import IMAGENET_MEAN, IMAGENET_STD
from plait.models.transformer import Block, TransformerSizes


@dataclass(frozen=True, slots=True, kw_only=True)
class SwinSizes:
    """Shape of a Swin; section 3.3 of the paper.

    Attributes:
        d: Width of the first stage (C in the paper); each later one has twice as much.
        depths: Blocks of each stage.
        heads: Of each stage.
        window: Cells a side of a window (M).
        patch: Pixels a side of the cells of the first stage.
        mlp_ratio: Width inside the feed-forward network, in widths of the stage.
        qkv_bias: Whether queries, keys and values have one.
        eps: Of the norms of blocks, and of the last one.
        dropout: Share of what each part adds that is dropped.
        attention_dropout: Share of attention weights dropped.
        drop_path: Share of pictures for which the last block is skipped; earlier ones less, linearly.
        num_classes: Width of the classifier; 0: none.
    """

    d: int
    depths: tuple[int, ...]
    heads: tuple[int, ...]
    window: int = 7
    patch: int = 4
    mlp_ratio: float = 4.0
    qkv_bias: bool = True
    eps: float = 1e-5
    dropout: float = 0.0
    attention_dropout: float = 0.0
    drop_path: float = 0.1
    num_classes: int = 0

    def __post_init__(self) -> None:
        same_count(depths=self.depths, heads=self.heads)


SWIN_T = SwinSizes(d=96, depths=(2, 2, 6, 2), heads=(3, 6, 12, 24))
SWIN_S = SwinSizes(d=96, depths=(2, 2, 18, 2), heads=(3, 6, 12, 24))
SWIN_B = SwinSizes(d=128, depths=(2, 2, 18, 2), heads=(4, 8, 16, 32))
SWIN_L = SwinSizes(d=192, depths=(2, 2, 18, 2), heads=(6, 12, 24, 48))
"""The four of the paper, for pictures of 224 pixels; those for 384 have a ``window`` of 12."""


class _Permuted(torch.autograd.Function):
    """``x[:, order]`` for a permutation: its gradient is a gather too; that of indexing would add cell by cell.

    ``orders`` are the permutation and its inverse.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, orders: tuple[Tensor, Tensor]) -> Tensor:
        ctx.orders = orders
        return x.index_select(1, orders[0])

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None]:
        there, back = ctx.orders
        return _Permuted.apply(gradients[0], (back, there)), None


class Windows:
    """How a map is cut into windows: computed once for all blocks of a stage that cut it alike.

    The map is padded with zeros, below and to the right, to whole windows; padded cells are looked at like others, as
    in the authors' code. Shifted windows are those of the map rolled up and left by ``shift``; where a window then
    holds cells of opposite borders, they do not see each other.

    Args:
        rows: Of the map.
        columns: Of the map.
        window: Cells a side.
        shift: Cells by which windows are moved; 0: none.
        like: A tensor on the device and of the dtype of the tokens.
        pictures: Of the batch, for the mask.
    """

    def __init__(self, rows: int, columns: int, window: int, *, shift: int, like: Tensor, pictures: int) -> None:
        self.map, self.cells = (rows, columns), window**2
        self.padded = tuple(-(-side // window) * window for side in (rows, columns))
        down, right = (torch.arange(side, device=like.device) for side in self.padded)
        cell = down[:, None] * self.padded[1] + right
        self.order = self._cut(cell.roll((-shift, -shift), (0, 1)), window).flatten()
        self.back = self.order.argsort()
        at = torch.arange(window, device=like.device)
        at = torch.cartesian_prod(at, at)
        bias = None
        if shift:
            over = [(side >= len(side) - shift).long() for side in (down, right)]
            region = self._cut(1 + 2 * over[0][:, None] + over[1], window)
            seen = same_segment(region)
            bias = torch.zeros_like(seen, dtype=like.dtype).masked_fill_(~seen, float("-inf"))
            bias = bias.repeat(pictures, 1, 1, 1)
        self.places = Places(gap=gaps(at, at), bias=bias)

    @staticmethod
    def _cut(cells: Int[Tensor, "rows columns"], window: int) -> Int[Tensor, "n cell"]:
        rows, columns = cells.shape
        cut = cells.view(rows // window, window, columns // window, window)
        return cut.transpose(1, 2).flatten(2).flatten(0, 1)

    def split(self, x: Float[Tensor, "b t d"]) -> Float[Tensor, "n cell d"]:
        """Tokens of maps in raster order to windows, those of a picture after each other."""
        if self.padded != self.map:
            (rows, columns), (below, right) = self.map, (p - m for p, m in zip(self.padded, self.map, strict=True))
            x = functional.pad(x.unflatten(1, (rows, columns)), (0, 0, 0, right, 0, below)).flatten(1, 2)
        windows: Tensor = _Permuted.apply(x, (self.order, self.back))
        return windows.view(-1, self.cells, x.shape[-1])

    def joined(self, windows: Float[Tensor, "n cell d"]) -> Float[Tensor, "b t d"]:
        """Back to maps in raster order, without what was padded."""
        x: Tensor = _Permuted.apply(windows.view(-1, len(self.order), windows.shape[-1]), (self.back, self.order))
        if self.padded == self.map:
            return x
        rows, columns = self.map
        return x.unflatten(1, self.padded)[:, :rows, :columns].flatten(1, 2)


class PatchEmbedding(nn.Module):
    """Patches of normalized pixels to tokens, with a norm; borders are filled with zeros to whole patches."""

    def __init__(self, patch: int, d: int) -> None:
        super().__init__()
        self.patch = patch
        self.projection = nn.Conv2d(3, d, patch, patch)
        self.norm = nn.LayerNorm(d)

    def forward(self, pixels: Float[Tensor, "b 3 h w"]) -> Float[Tensor, "b rows columns d"]:
        """Embed."""
        below, right = (-side % self.patch for side in pixels.shape[2:])
        if below or right:
            pixels = functional.pad(pixels, (0, right, 0, below))
        return self.norm(self.projection(pixels).permute(0, 2, 3, 1))


class PatchMerging(nn.Module):
    """Two by two cells to one of twice the width: a quarter of the cells."""

    def __init__(self, d: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(4 * d)
        self.reduction = nn.Linear(4 * d, 2 * d, bias=False)

    def forward(self, x: Float[Tensor, "b rows columns d"]) -> Float[Tensor, "b rows2 columns2 d2"]:
        """Merge; an odd border is filled with zeros."""
        below, right = (side % 2 for side in x.shape[1:3])
        if below or right:
            x = functional.pad(x, (0, 0, 0, right, 0, below))
        # Of the four cells the left column comes first, from top to bottom.
        x = x.unflatten(2, (-1, 2)).unflatten(1, (-1, 2)).permute(0, 1, 3, 4, 2, 5).flatten(3)
        return self.reduction(self.norm(x))


class SwinStage(nn.Module):
    """Blocks on maps of one scale; every second one has its windows shifted by half of their side.

    Of a map that is no larger than a window, in rows or in columns, the shorter side is the window, and nothing is
    shifted; relative places are then a part of those that the bias knows.

    Args:
        sizes: Of its blocks; ``depth`` of them.
        window: Cells a side.
        drop_path: Share of pictures for which a block is skipped, for each block.
        backend: How attention is computed.
    """

    def __init__(
        self, sizes: TransformerSizes, window: int, *, drop_path: tuple[float, ...], backend: Backend = "sdpa"
    ) -> None:
        super().__init__()
        self.window = window
        self.blocks = nn.ModuleList(
            Block(sizes, relative=GridBias(sizes.heads, window, window), drop_path=share, backend=backend)
            for share in drop_path
        )

    def forward(self, x: Float[Tensor, "b rows columns d"]) -> Float[Tensor, "b rows columns d"]:
        """All blocks."""
        pictures, rows, columns, _ = x.shape
        side = min(self.window, rows, columns)
        shift = self.window // 2 if side == self.window and side < min(rows, columns) else 0
        shifts = (0, shift) if shift else (0,)
        cuts = [Windows(rows, columns, side, shift=by, like=x, pictures=pictures) for by in shifts]
        x = x.flatten(1, 2)
        for number, block in enumerate(self.blocks):
            assert isinstance(block, Block)
            x = through(block, x, cuts[number % len(cuts)])
        return x.unflatten(1, (rows, columns))


def through(block: Block, x: Float[Tensor, "b t d"], windows: Windows) -> Float[Tensor, "b t d"]:
    """A block of the one Transformer whose attention stays inside windows; equation 3 of the paper.

    Norms and the feed-forward network see maps, so that what is padded costs nothing but attention, and a block is
    skipped for whole pictures.
    """

    def attend(y: Tensor) -> Tensor:
        return windows.joined(block.attention(windows.split(y), windows.places).values)

    return block.feed_forward_part(block.attention_part(x, attend), block.feed_forward)


class Swin(MapTower):
    """Pictures to a grid of features, of cells of 32 pixels; :meth:`stages` gives maps of cells of 4, 8, 16 and 32.

    Cost of attention is linear in the area: ``4 h w C^2 + 2 M^2 h w C`` multiplications a block (equation 2), where
    attention over the whole map takes ``4 h w C^2 + 2 (h w)^2 C``.

    Args:
        sizes: Shape.
        mean: Of the three channels.
        std: Of the three channels.
        batch_size: Pictures computed together at most; 0: all of one size.
        backend: How attention is computed.

    Example:
        >>> with torch.device("meta"):
        ...     tower = Swin(SWIN_T)
        >>> sum(p.numel() for p in tower.parameters())
        27519354
    """

    def __init__(
        self,
        sizes: SwinSizes,
        *,
        mean: tuple[float, ...] = IMAGENET_MEAN,
        std: tuple[float, ...] = IMAGENET_STD,
        batch_size: int = 0,
        backend: Backend = "sdpa",
    ) -> None:
        widths = [sizes.d * 2**i for i in range(len(sizes.depths))]
        super().__init__(
            d_out=widths[-1],
            cell=sizes.patch * 2 ** (len(widths) - 1),
            num_classes=sizes.num_classes,
            mean=mean,
            std=std,
            batch_size=batch_size,
        )
        self.sizes = sizes
        self.embedding = PatchEmbedding(sizes.patch, sizes.d)
        ends = list(accumulate(sizes.depths))
        shares = [sizes.drop_path * i / max(1, ends[-1] - 1) for i in range(ends[-1])]
        self.blocks = nn.ModuleList(
            SwinStage(
                _block_sizes(sizes, d, heads),
                sizes.window,
                drop_path=tuple(shares[end - depth : end]),
                backend=backend,
            )
            for d, heads, depth, end in zip(widths, sizes.heads, sizes.depths, ends, strict=True)
        )
        self.merges = nn.ModuleList(PatchMerging(d) for d in widths[:-1])
        self.norm = nn.LayerNorm(self.d_out, eps=sizes.eps)
        self.apply(_start)
        channels_last(self)

    def stages(self, pixels: Float[Tensor, "b 3 h w"]) -> list[Tensor]:
        """Maps of all stages, the finest first; before they are merged, and not normalized."""
        x = functional.dropout(self.embedding(self.prepared(pixels)), self.sizes.dropout, self.training)
        maps: list[Tensor] = []
        for number, stage in enumerate(self.blocks):
            x = stage(self.merges[number - 1](x) if number else x)
            maps.append(x.permute(0, 3, 1, 2))
        return maps

    def features(self, pixels: Float[Tensor, "b 3 h w"]) -> Float[Tensor, "b d rows columns"]:
        """The last map, normalized, of pictures of one size, in the dtype of the weights."""
        return self.norm(self.stages(pixels)[-1].permute(0, 2, 3, 1)).permute(0, 3, 1, 2)


def _block_sizes(sizes: SwinSizes, d: int, heads: int) -> TransformerSizes:
    return TransformerSizes(
        d=d,
        depth=1,
        heads=heads,
        d_ff=int(sizes.mlp_ratio * d),
        eps=sizes.eps,
        qkv_bias=sizes.qkv_bias,
        dropout=sizes.dropout,
        attention_dropout=sizes.attention_dropout,
    )


def _start(module: nn.Module) -> None:
    """Matrices start as in the authors' code."""
    if isinstance(module, nn.Linear):
        nn.init.trunc_normal_(module.weight, std=0.02)
        if module.bias is not None:
            nn.init.zeros_(module.bias)
