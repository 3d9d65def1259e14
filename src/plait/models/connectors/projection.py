"""Projection connectors: every token to the decoder's width, neighbors joined before or split after, ends of rows."""

from collections.abc import Sequence

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from plait.core.protocols import Encoder
from plait.core.tensors import Patches


class PixelShuffle(nn.Module):
    """Join ``factor x factor`` neighboring cells into one, their features side by side: fewer, wider tokens.

    The order inside a joined cell is raster; a grid that ``factor`` does not divide is padded with zeros below and to
    the right. Idea: space-to-depth (arXiv 1609.05158, read backwards).

    Example:
        A 4 x 4 grid of 1,280 features with factor 2 becomes 2 x 2 of 5,120.
    """

    def __init__(self, d_in: int, factor: int) -> None:
        super().__init__()
        self.factor, self.d_in = factor, d_in
        self.d_out = d_in * factor * factor

    def grid_out(self, grid: Int[Tensor, "item 3"]) -> Int[Tensor, "item 3"]:
        """Rows and columns divided by the factor, rounded up."""
        return torch.stack([grid[:, 0], -(-grid[:, 1] // self.factor), -(-grid[:, 2] // self.factor)], dim=1)

    def forward(self, media: Patches) -> Patches:
        """Join cells."""
        sizes = media.grid.prod(1).tolist()
        items = [
            self._join(values.view(*grid, self.d_in))
            for values, grid in zip(media.values.split(sizes), media.grid.tolist(), strict=True)
        ]
        values = torch.cat(items) if items else media.values.new_zeros(0, self.d_out)
        return Patches(values=values, grid=self.grid_out(media.grid))

    def _join(self, cells: Float[Tensor, "frames rows columns d"]) -> Float[Tensor, "m e"]:
        f = self.factor
        _, rows, columns, d = cells.shape
        cells = nn.functional.pad(cells, (0, 0, 0, -columns % f, 0, -rows % f))
        cells = cells.unflatten(2, (-1, f)).unflatten(1, (-1, f))  # frames rows f columns f d
        return cells.permute(0, 1, 3, 2, 4, 5).reshape(-1, f * f * d)


class Linear(nn.Module):
    """One linear layer, the connector of LLaVA (arXiv 2304.08485).

    Example:
        >>> sum(p.numel() for p in Linear(1024, 4096).parameters())
        4198400
    """

    def __init__(self, d_in: int, d_out: int) -> None:
        super().__init__()
        self.d_in, self.d_out = d_in, d_out
        self.linear = nn.Linear(d_in, d_out)

    def grid_out(self, grid: Int[Tensor, "item 3"]) -> Int[Tensor, "item 3"]:
        """Unchanged: one token a cell."""
        return grid

    def forward(self, media: Patches) -> Patches:
        """Project every cell."""
        return Patches(values=self.linear(media.values), grid=media.grid)


class Mlp(nn.Module):
    """Two layers with GELU between, the connector of LLaVA-1.5 (arXiv 2310.03744), with a norm in front and dropout.

    The norm is ours: features of a convolutional tower are not normalized, and their scale differs between towers.
    Without it this is LLaVA-1.5's.

    Example:
        >>> sum(p.numel() for p in Mlp(1024, 4096, 4096, norm=False).parameters())
        20979712
    """

    def __init__(self, d_in: int, d_hidden: int, d_out: int, *, dropout: float = 0.0, norm: bool = True) -> None:
        super().__init__()
        self.d_in, self.d_out = d_in, d_out
        self.norm = nn.LayerNorm(d_in) if norm else nn.Identity()
        self.up = nn.Linear(d_in, d_hidden)
        self.down = nn.Linear(d_hidden, d_out)
        self.dropout = nn.Dropout(dropout)

    def grid_out(self, grid: Int[Tensor, "item 3"]) -> Int[Tensor, "item 3"]:
        """Unchanged: one token a cell."""
        return grid

    def forward(self, media: Patches) -> Patches:
        """Project every cell."""
        hidden = nn.functional.gelu(self.up(self.dropout(self.norm(media.values))))
        return Patches(values=self.down(self.dropout(hidden)), grid=media.grid)


class Unchanged(nn.Module):
    """Tokens as the tower gives them, for layers that read them inside the decoder."""

    def __init__(self, d: int) -> None:
        super().__init__()
        self.d_in = self.d_out = d

    def grid_out(self, grid: Int[Tensor, "item 3"]) -> Int[Tensor, "item 3"]:
        """Unchanged."""
        return grid

    def forward(self, media: Patches) -> Patches:
        """Nothing."""
        return media


class Split(nn.Module):
    """One wide token into ``count`` narrow ones, in order: the inverse of joining."""

    def __init__(self, d_in: int, count: int) -> None:
        super().__init__()
        self.count, self.d_in = count, d_in
        self.d_out = d_in // count

    def grid_out(self, grid: Int[Tensor, "item 3"]) -> Int[Tensor, "item 3"]:
        """``count`` times as many columns."""
        return grid * grid.new_tensor([1, 1, self.count])

    def forward(self, media: Patches) -> Patches:
        """Split."""
        return Patches(values=media.values.reshape(-1, self.d_out), grid=self.grid_out(media.grid))


class RowEnds(nn.Module):
    """A learned token after each row of an item, so that a decoder sees where rows end: LLaVA-NeXT's ``image_newline``.

    It belongs behind what projects to the decoder's width. Each frame's rows end for themselves.

    Args:
        d: Width.
        above: Items with at most so many rows and columns are left as they are: LLaVA-NeXT's overview has no row ends.

    Example:
        >>> RowEnds(8).grid_out(torch.tensor([[1, 24, 36]])).tolist()
        [[1, 24, 37]]
    """

    def __init__(self, d: int, *, above: int = 0) -> None:
        super().__init__()
        self.d_in = self.d_out = d
        self.above = above
        self.token = nn.Parameter(torch.randn(d) / d**0.5)  # as LLaVA-NeXT draws it: of length 1, about

    def grid_out(self, grid: Int[Tensor, "item 3"]) -> Int[Tensor, "item 3"]:
        """One more column."""
        ended = (grid[:, 1:] > self.above).any(1).to(grid)
        return torch.stack([grid[:, 0], grid[:, 1], grid[:, 2] + ended], dim=1)

    def forward(self, media: Patches) -> Patches:
        """Put the ends in."""
        out = self.grid_out(media.grid)
        sizes = media.grid.prod(1).tolist()
        items: list[Tensor] = []
        for values, before, after in zip(media.values.split(sizes), media.grid.tolist(), out.tolist(), strict=True):
            rows = values.view(before[0] * before[1], before[2], self.d_in)
            ends = self.token.to(values).expand(len(rows), after[2] - before[2], -1)
            items.append(torch.cat([rows, ends], dim=1).flatten(0, 1))
        return Patches(values=torch.cat(items) if items else media.values, grid=out)


class Chain(nn.Module):
    """Connectors one after the other; has the same face."""

    def __init__(self, *parts: Encoder) -> None:
        super().__init__()
        self.parts: Sequence[Encoder] = nn.ModuleList(parts)  # pyright: ignore[reportAttributeAccessIssue, reportArgumentType]
        self.d_in: int | None = getattr(parts[0], "d_in", None)
        self.d_out = parts[-1].d_out

    def grid_out(self, grid: Int[Tensor, "item 3"]) -> Int[Tensor, "item 3"]:
        """Through all parts."""
        for part in self.parts:
            grid = part.grid_out(grid)
        return grid

    def forward(self, media: Patches) -> Patches:
        """Through all parts."""
        for part in self.parts:
            media = part(media)
        return media
