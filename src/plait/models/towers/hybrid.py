"""Convolutions first, a Transformer after: local features are cheap early, global ones are needed late.

Two forms of one tower: convolutions as patch embedding (Xiao et al., "Early convolutions help transformers see better",
https://arxiv.org/abs/2106.14881), and stages of inverted bottlenecks before stages of attention with a relative bias
(Dai et al., "CoAtNet", https://arxiv.org/abs/2106.04803). Any other order is a list of stages, too.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise
from math import prod

import torch
from jaxtyping import Float
from torch import Tensor, nn

from plait.core.errors import ConfigError, DataError
from plait.models.attention import Places
from plait.models.position.relative import GridBias, gaps
from plait.models.position.rotary import Rotary
from plait.models.towers.convnet import Block as InvertedBottleneck
from plait.models.towers.convnet import Group
from plait.models.towers.maps import MapTower, channels_last, same_count
from plait.models.towers.pixels import IMAGENET_MEAN, IMAGENET_STD
from plait.models.towers.resnet import ConvNorm
from plait.models.transformer import Block, Transformer, TransformerSizes


class Stage(nn.Module):
    """A module from map to map, with what a tower must know of it.

    Args:
        inner: Takes ``b d_in h w``, gives ``b d_out rows columns``.
        d_in: Width of the map it takes.
        d_out: Width of the map it gives.
        stride: Cells a side that become one, begun ones included.
    """

    def __init__(self, inner: nn.Module, *, d_in: int, d_out: int, stride: int = 1) -> None:
        super().__init__()
        self.inner = inner
        self.d_in, self.d_out, self.stride = d_in, d_out, stride

    def forward(self, x: Float[Tensor, "b d h w"]) -> Float[Tensor, "b d2 rows columns"]:
        """One map to the next."""
        return self.inner(x)


class OnCells(nn.Module):
    """A Transformer on the cells of a map, with position codes of any kinds, or none.

    Relative codes are the Transformer's own (its ``relative``); they are told how far cells are apart.

    Args:
        transformer: On cells in raster order.
        absolute: Called with rows and columns, gives a vector a cell, which is added.
        rotary: Turns queries and keys by the cell's row and column.
    """

    def __init__(
        self, transformer: Transformer, *, absolute: nn.Module | None = None, rotary: Rotary | None = None
    ) -> None:
        super().__init__()
        self.transformer, self.absolute, self.rotary = transformer, absolute, rotary

    def forward(self, x: Float[Tensor, "b d rows columns"]) -> Float[Tensor, "b d rows columns"]:
        """Every cell sees every cell.

        Raises:
            DataError: The map is larger than the table of a relative bias.
        """
        rows, columns = x.shape[2:]
        tables = [bias.grid for _, bias in self.biases()]
        if any(rows > most[0] or columns > most[1] for most in tables):
            raise DataError(
                f"a map of {rows} x {columns} cells, the relative bias knows {tables[0][0]} x {tables[0][1]}",
                place="cells of a hybrid tower",
                remedy="give smaller pictures, or fit the tower to this size (HybridTower.fit) before training on",
            )
        tokens = x.flatten(2).mT
        if self.absolute is not None:
            tokens = tokens + self.absolute(rows, columns).to(tokens)
        tokens = self.transformer(tokens, self._places(rows, columns, x.device))
        return tokens.mT.unflatten(2, (rows, columns))

    def biases(self) -> Iterator[tuple[Block, GridBias]]:
        """Blocks with a table of relative biases, and the table."""
        for block in self.transformer.blocks:
            if isinstance(block, Block) and isinstance(block.attention.relative, GridBias):
                yield block, block.attention.relative

    def _places(self, rows: int, columns: int, device: torch.device) -> Places:
        at = torch.cartesian_prod(torch.arange(rows, device=device), torch.arange(columns, device=device))
        relative = any(isinstance(b, Block) and b.attention.relative is not None for b in self.transformer.blocks)
        return Places(gap=gaps(at, at) if relative else None, turn=self.rotary(at) if self.rotary else None)


def early_convolutions(widths: Sequence[int], d: int) -> Stage:
    """Patch embedding of 3x3 filters with stride 2 and a last 1x1, as in arXiv 2106.14881.

    In place of one filter of 16 x 16 pixels with stride 16, which makes Transformers hard to train.

    Args:
        widths: Channels after each filter, doubling in the paper; four of them make cells of 16 pixels.
        d: Width of the Transformer.
    """
    filters = [ConvNorm(before, after, 3, stride=2) for before, after in pairwise((3, *widths))]
    inner = nn.Sequential(*filters, nn.Conv2d(widths[-1], d, 1))
    return Stage(inner, d_in=3, d_out=d, stride=2 ** len(widths))


def inverted_bottlenecks(d_in: int, group: Group) -> Stage:
    """MobileNet's blocks, the first one with the stride."""
    blocks = (
        InvertedBottleneck(group.d_out if i else d_in, group, stride=1 if i else group.stride)
        for i in range(group.repeats)
    )
    return Stage(nn.Sequential(*blocks), d_in=d_in, d_out=group.d_out, stride=group.stride)


def attention_stage(cells: OnCells, *, d_in: int = 0, stride: int = 1) -> Stage:
    """A Transformer on a map that is made coarser by its maxima, and brought to its width by a 1x1 convolution.

    Args:
        cells: The Transformer.
        d_in: Width of the map it takes; 0: that of the Transformer.
        stride: Cells a side that become one.
    """
    d = cells.transformer.d_out
    before: list[nn.Module] = [nn.MaxPool2d(stride, ceil_mode=True)] if stride > 1 else []
    if d_in not in (0, d):
        before.append(nn.Conv2d(d_in, d, 1))
    return Stage(nn.Sequential(*before, cells), d_in=d_in or d, d_out=d, stride=stride)


class HybridTower(MapTower):
    """Pictures through a list of stages: an :class:`~plait.core.protocols.Encoder`.

    Args:
        parts: Stages, the first one from 3 channels.
        num_classes: Width of the classifier; 0: none.
        mean: Of the three channels.
        std: Of the three channels.
        batch_size: Pictures computed together at most; 0: all of one size.

    Raises:
        ConfigError: A stage does not take what the one before it gives.

    Example:
        >>> sizes = TransformerSizes(d=64, depth=2, heads=2)
        >>> cells = OnCells(Transformer(sizes), absolute=SinCosGrid(64))
        >>> tower = HybridTower([early_convolutions((8, 16, 32, 64), 64), attention_stage(cells)])
        >>> tower(Patches(values=torch.rand(96 * 64, 3), grid=torch.tensor([[1, 96, 64]]))).grid.tolist()
        [[1, 6, 4]]
    """

    def __init__(
        self,
        parts: Sequence[Stage],
        *,
        num_classes: int = 0,
        mean: tuple[float, ...] = IMAGENET_MEAN,
        std: tuple[float, ...] = IMAGENET_STD,
        batch_size: int = 0,
    ) -> None:
        widths = [3, *(part.d_out for part in parts)]
        for number, (part, width) in enumerate(zip(parts, widths, strict=False)):
            if part.d_in != width:
                raise ConfigError(
                    f"stage {number} takes {part.d_in} channels, what comes before it gives {width}",
                    place="stages of a hybrid tower",
                    remedy="give neighboring stages the same width, and the first one 3 channels",
                )
        super().__init__(
            d_out=widths[-1],
            cell=prod(part.stride for part in parts),
            num_classes=num_classes,
            mean=mean,
            std=std,
            batch_size=batch_size,
        )
        self.parts = nn.ModuleList(parts)
        channels_last(self)

    def stages(self, pixels: Float[Tensor, "b 3 h w"]) -> list[Tensor]:
        """Maps of all stages, the finest first."""
        maps = [self.prepared(pixels)]
        for part in self.parts:
            maps.append(part(maps[-1]))
        return maps[1:]

    def fit(self, height: int, width: int) -> None:
        """Interpolate tables of relative biases to maps of pictures of this size, in place, as CoAtNet does."""
        cell = 1
        for part in self.parts:
            assert isinstance(part, Stage)
            cell *= part.stride
            for cells in part.modules():
                if isinstance(cells, OnCells):
                    for block, bias in cells.biases():
                        block.attention.relative = bias.resized(-(-height // cell), -(-width // cell))


@dataclass(frozen=True, slots=True, kw_only=True)
class CoAtNetSizes:
    """Shape of a CoAtNet: a column of its table 3.

    Attributes:
        widths: Of the stem, of the stages of inverted bottlenecks, and of those of attention.
        depths: Blocks of each; of the stem, filters.
        attention: How many of the stages have attention, the last ones.
        d_head: Width of heads.
        picture: Pixels a side of the largest pictures, for the tables of relative biases.
        num_classes: Width of the classifier; 0: none.
    """

    widths: tuple[int, ...]
    depths: tuple[int, ...]
    attention: int = 2
    d_head: int = 32
    picture: int = 224
    num_classes: int = 0

    def __post_init__(self) -> None:
        same_count(widths=self.widths, depths=self.depths)
        if any(d % self.d_head for d in self.widths[-self.attention :]):
            raise ConfigError(
                f"heads of {self.d_head} do not divide widths {self.widths[-self.attention :]}",
                remedy="choose widths of the stages of attention that d_head divides",
            )


COATNET_0 = CoAtNetSizes(widths=(64, 96, 192, 384, 768), depths=(2, 2, 3, 5, 2))
COATNET_1 = CoAtNetSizes(widths=(64, 96, 192, 384, 768), depths=(2, 2, 6, 14, 2))
"""Depths and widths of the paper's two smallest."""


def coatnet(sizes: CoAtNetSizes) -> HybridTower:
    """A tower like CoAtNet: every stage halves the map; convolutions first, attention last (C-C-T-T in the paper).

    Its inverted bottlenecks are those of EfficientNet-Lite, without squeeze-and-excite and with ReLU6, and a stage of
    attention is made coarser before its first block instead of inside: published weights do not fit.

    Example:
        >>> tower = coatnet(CoAtNetSizes(widths=(8, 8, 16, 32, 64), depths=(1, 1, 1, 1, 1), picture=64))
        >>> [tuple(m.shape[1:]) for m in tower.stages(torch.rand(1, 3, 64, 64))]
        [(8, 32, 32), (8, 16, 16), (16, 8, 8), (32, 4, 4), (64, 2, 2)]
    """
    stem = [
        ConvNorm(sizes.widths[0] if i else 3, sizes.widths[0], 3, stride=1 if i else 2) for i in range(sizes.depths[0])
    ]
    parts = [Stage(nn.Sequential(*stem), d_in=3, d_out=sizes.widths[0], stride=2)]
    convolved = len(sizes.widths) - sizes.attention
    for number in range(1, len(sizes.widths)):
        d_in, d, depth = sizes.widths[number - 1], sizes.widths[number], sizes.depths[number]
        if number < convolved:
            parts.append(inverted_bottlenecks(d_in, Group(depth, 3, 2, 4, d)))
            continue
        side, heads = -(-sizes.picture // 2 ** (number + 1)), d // sizes.d_head
        transformer = Transformer(
            TransformerSizes(d=d, depth=depth, heads=heads),
            relative=lambda _, heads=heads, side=side: GridBias(heads, side, side),
            final_norm=number == len(sizes.widths) - 1,
        )
        parts.append(attention_stage(OnCells(transformer), d_in=d_in, stride=2))
    return HybridTower(parts, num_classes=sizes.num_classes)
