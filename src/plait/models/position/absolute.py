"""Absolute position codes, added to tokens: sines and cosines, learned tables with interpolation, rows plus columns.

A code of a sequence is called with its length, a code of a grid with rows and columns; both give one vector a token, in
raster order.
"""

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.nn import functional

from plait.core.errors import ConfigError, DataError
from plait.models.fixed import Fixed


def sincos(
    at: Float[Tensor, " n"], frequency: Float[Tensor, " f"], *, interleaved: bool = False
) -> Float[Tensor, "n e"]:
    """Sines, then cosines, of ``at * frequency``; or sine and cosine of each frequency in turn.

    Section 3.5 of Vaswani et al. (https://arxiv.org/abs/1706.03762) writes them in turn; tensor2tensor, ViT-MAE and
    Whisper put all sines first. The code at ``p + k`` is a fixed rotation of the code at ``p``.

    Example:
        >>> sincos(torch.tensor([0.0]), torch.tensor([1.0, 0.1])).tolist()
        [[0.0, 0.0, 1.0, 1.0]]
    """
    angle = at[:, None] * frequency
    parts = (angle.sin(), angle.cos())
    return torch.stack(parts, dim=-1).flatten(1) if interleaved else torch.cat(parts, dim=-1)


def frequencies(d: int, *, base: float = 10_000.0) -> Float[Tensor, " f"]:
    """``base ** (-2i / d)`` for ``d / 2`` pairs, in float64.

    Raises:
        ConfigError: The width is odd.
    """
    if d % 2:
        raise ConfigError(f"sines and cosines need an even width, came {d}", remedy="choose an even width")
    return base ** (-torch.arange(0, d, 2, dtype=torch.float64, device="cpu") / d)


class SinCosSequence(nn.Module):
    """1-D sines and cosines, of any length; nothing is learned.

    Args:
        d: Width, even.
        base: The longest period is about ``2 pi base``.
        interleaved: Sine and cosine in turn, as in the paper; else sines first.

    Example:
        >>> SinCosSequence(64)(10).shape
        torch.Size([10, 64])
    """

    def __init__(self, d: int, *, base: float = 10_000.0, interleaved: bool = True) -> None:
        super().__init__()
        self.interleaved = interleaved
        self._frequency = Fixed(frequencies(d, base=base))

    @property
    def frequency(self) -> Float[Tensor, " f"]:
        """Radians a step of each pair."""
        return self._frequency.values

    def forward(self, length: int) -> Float[Tensor, "t d"]:
        """Codes of positions 0 to ``length - 1``, computed in float64, given in float32, on the CPU."""
        at = torch.arange(length, dtype=torch.float64, device="cpu")
        return sincos(at, self.frequency, interleaved=self.interleaved).float()


class SinCosGrid(nn.Module):
    """2-D sines and cosines, of any grid: the first half of the width is the column's code, the second the row's.

    The order is that of MAE (https://arxiv.org/abs/2111.06377), whose code puts columns first.

    Args:
        d: Width, a multiple of 4.
        base: As in 1-D.
    """

    def __init__(self, d: int, *, base: float = 10_000.0) -> None:
        super().__init__()
        if d % 4:
            raise ConfigError(f"a 2-D code needs a width that 4 divides, came {d}", remedy="choose such a width")
        self._frequency = Fixed(frequencies(d // 2, base=base))

    def forward(self, rows: int, columns: int) -> Float[Tensor, "n d"]:
        """Codes of the cells, computed in float64, given in float32, on the CPU."""
        down, right = (
            sincos(torch.arange(n, dtype=torch.float64, device="cpu"), self._frequency.values).float()
            for n in (rows, columns)
        )
        cells = (rows, columns, -1)
        return torch.cat([right[None].expand(cells), down[:, None].expand(cells)], dim=-1).flatten(0, 1)


class SinCosVolume(nn.Module):
    """3-D sines and cosines, of any volume: the time's code, then the row's, then the column's.

    Rows and columns have a third of the width each, rounded down to even, and time the rest.

    Args:
        d: Width, even, 6 or more.
        base: As in 1-D.

    Raises:
        ConfigError: The width is odd or too small.
    """

    across: Tensor
    along: Tensor

    def __init__(self, d: int, *, base: float = 10_000.0) -> None:
        super().__init__()
        side = d // 6 * 2
        if d % 2 or side == 0:
            raise ConfigError(f"a 3-D code needs an even width of 6 or more, came {d}", remedy="choose such a width")
        self.register_buffer("across", frequencies(side, base=base), persistent=False)
        self.register_buffer("along", frequencies(d - 2 * side, base=base), persistent=False)

    def forward(self, frames: int, rows: int, columns: int) -> Float[Tensor, "n d"]:
        """Codes of the cells, in float32."""
        time, down, right = (
            sincos(torch.arange(n, dtype=frequency.dtype, device=frequency.device), frequency).float()
            for n, frequency in ((frames, self.along), (rows, self.across), (columns, self.across))
        )
        cells = (frames, rows, columns, -1)
        parts = (time[:, None, None].expand(cells), down[None, :, None].expand(cells), right[None, None].expand(cells))
        return torch.cat(parts, dim=-1).flatten(0, 2)


class LearnedSequence(nn.Module):
    """A learned vector for each position, as in BERT and GPT-2.

    Args:
        length: Positions.
        d: Width.
    """

    def __init__(self, length: int, d: int) -> None:
        super().__init__()
        self.table = nn.Parameter(torch.empty(length, d))
        nn.init.trunc_normal_(self.table, std=0.02)

    def forward(self, length: int) -> Float[Tensor, "t d"]:
        """Codes of the first positions.

        Raises:
            DataError: There are fewer positions than tokens.
        """
        if length > len(self.table):
            raise DataError(
                f"{length} tokens, {len(self.table)} learned positions",
                place="learned positions",
                remedy=f"shorten to {len(self.table)} tokens, or resize the table (resized) before training on",
            )
        return self.table[:length]

    def resized(self, length: int) -> "LearnedSequence":
        """The same codes stretched or squeezed to another length, by linear interpolation."""
        new = LearnedSequence(length, self.table.shape[1]).to(self.table)
        with torch.no_grad():
            new.table.copy_(_interpolate(self.table.T[None], (length,), mode="linear")[0].T)
        return new


class LearnedGrid(nn.Module):
    """A learned vector for each cell of a grid, interpolated to any other grid (section 3.2 of arXiv 2010.11929).

    Args:
        rows: Of the grid that is learned.
        columns: Likewise.
        d: Width.
        prefix: Tokens before the cells that have a vector of their own, such as a class token's.
        antialias: Smooth when the grid shrinks, as SigLIP 2 does; ViT and DINOv2 do not.
        mode: How it is interpolated.

    Example:
        >>> LearnedGrid(14, 14, 768)(16, 10).shape
        torch.Size([160, 768])
    """

    def __init__(
        self, rows: int, columns: int, d: int, *, prefix: int = 0, antialias: bool = False, mode: str = "bicubic"
    ) -> None:
        super().__init__()
        self.grid, self.prefix, self.antialias, self.mode = (rows, columns), prefix, antialias, mode
        self.table = nn.Parameter(torch.empty(prefix + rows * columns, d))
        nn.init.trunc_normal_(self.table, std=0.02)

    def forward(self, rows: int, columns: int) -> Float[Tensor, "n d"]:
        """Codes of the prefix and the cells; of the learned grid itself, the table as it is."""
        if (rows, columns) == self.grid:
            return self.table
        cells = self.table[self.prefix :].view(*self.grid, -1).permute(2, 0, 1)[None]
        cells = _interpolate(cells, (rows, columns), mode=self.mode, antialias=self.antialias)
        return torch.cat([self.table[: self.prefix], cells[0].permute(1, 2, 0).flatten(0, 1)])


class LearnedVolume(nn.Module):
    """A learned vector for each cell of a volume, interpolated linearly to any other.

    Args:
        frames: Of the volume that is learned.
        rows: Likewise.
        columns: Likewise.
        d: Width.
    """

    def __init__(self, frames: int, rows: int, columns: int, *, d: int) -> None:
        super().__init__()
        self.volume = (frames, rows, columns)
        self.table = nn.Parameter(torch.empty(frames * rows * columns, d))
        nn.init.trunc_normal_(self.table, std=0.02)

    def forward(self, frames: int, rows: int, columns: int) -> Float[Tensor, "n d"]:
        """Codes of the cells; of the learned volume itself, the table as it is."""
        if (frames, rows, columns) == self.volume:
            return self.table
        cells = self.table.view(*self.volume, -1).permute(3, 0, 1, 2)[None]
        return _interpolate(cells, (frames, rows, columns), mode="trilinear")[0].flatten(1).T


class LearnedRowColumn(nn.Module):
    """A learned vector for each row plus one for each column: ``(rows + columns) d`` weights instead of their product.

    Args:
        rows: Of the grid that is learned; another one is interpolated linearly.
        columns: Likewise.
        d: Width.
    """

    def __init__(self, rows: int, columns: int, d: int) -> None:
        super().__init__()
        self.rows, self.columns = (nn.Parameter(torch.empty(n, d)) for n in (rows, columns))
        for table in (self.rows, self.columns):
            nn.init.trunc_normal_(table, std=0.02)

    def forward(self, rows: int, columns: int) -> Float[Tensor, "n d"]:
        """Codes of the cells."""
        down, right = (
            table if len(table) == n else _interpolate(table.T[None], (n,), mode="linear")[0].T
            for table, n in ((self.rows, rows), (self.columns, columns))
        )
        return (down[:, None] + right[None]).flatten(0, 1)


def _interpolate(x: Tensor, size: tuple[int, ...], *, mode: str, antialias: bool = False) -> Tensor:
    wide = functional.interpolate(x.float(), size=size, mode=mode, align_corners=False, antialias=antialias)
    return wide.to(x.dtype)


class LearnedBox(nn.Module):
    """Where a token stands on a page: learned vectors for its box's edges, width and height, summed (LayoutLM).

    Section 2.3 of https://arxiv.org/abs/1912.13318. Left and right edge share a table, upper and lower another.

    Args:
        cells: A page has so many columns and rows, numbered from 0; LayoutLM has 1,024 and scales pages to 1,000.
        d: Width.

    Example:
        >>> LearnedBox(1024, 8)(torch.tensor([[[10, 20, 110, 40]]])).shape
        torch.Size([1, 1, 8])
    """

    def __init__(self, cells: int, d: int) -> None:
        super().__init__()
        self.x, self.y, self.height, self.width = (nn.Embedding(cells, d) for _ in range(4))
        for table in (self.x, self.y, self.height, self.width):
            nn.init.normal_(table.weight, std=0.02)

    def forward(self, boxes: Int[Tensor, "b t 4"]) -> Float[Tensor, "b t d"]:
        """One vector a box, given as left, upper, right and lower edge.

        Raises:
            DataError: A box lies outside the page, or its right or lower edge comes before the other.
        """
        left, upper, right, lower = boxes.unbind(-1)
        cells = self.x.num_embeddings
        wrong = ((boxes < 0) | (boxes >= cells)).any(-1) | (right < left) | (lower < upper)
        if bool(wrong.any()):
            row, token = (int(i) for i in wrong.nonzero()[0])
            raise DataError(
                f"token {token} of row {row} has the box {boxes[row, token].tolist()}",
                place="boxes",
                remedy=f"give left, upper, right and lower edge, scaled to 0 .. {cells - 1}, left and upper first",
            )
        edges = self.x(left) + self.y(upper) + self.x(right) + self.y(lower)
        return edges + self.height(lower - upper) + self.width(right - left)
