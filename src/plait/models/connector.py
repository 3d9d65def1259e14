"""Connectors: a tower's features to the decoder's width, as patches again, so that connectors chain like layers."""

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
        self.factor = factor
        self.d_out = d_in * factor * factor

    def grid_out(self, grid: Int[Tensor, "item 3"]) -> Int[Tensor, "item 3"]:
        """Rows and columns divided by the factor, rounded up."""
        return torch.stack([grid[:, 0], -(-grid[:, 1] // self.factor), -(-grid[:, 2] // self.factor)], dim=1)

    def forward(self, media: Patches) -> Patches:
        """Join cells."""
        sizes = media.grid.prod(1).tolist()
        items = [
            self._join(values.view(*grid, -1))
            for values, grid in zip(media.values.split(sizes), media.grid.tolist(), strict=True)
        ]
        return Patches(values=torch.cat(items), grid=self.grid_out(media.grid))

    def _join(self, cells: Float[Tensor, "frames rows columns d"]) -> Float[Tensor, "m e"]:
        f = self.factor
        _, rows, columns, d = cells.shape
        cells = nn.functional.pad(cells, (0, 0, 0, -columns % f, 0, -rows % f))
        cells = cells.unflatten(2, (-1, f)).unflatten(1, (-1, f))  # frames rows f columns f d
        return cells.permute(0, 1, 3, 2, 4, 5).reshape(-1, f * f * d)


class Mlp(nn.Module):
    """The two-layer connector of LLaVA-1.5 (arXiv 2310.03744), with a norm in front and dropout.

    The norm is ours: features of a convolutional tower are not normalized, and their scale differs between towers.
    """

    def __init__(self, d_in: int, d_hidden: int, d_out: int, *, dropout: float = 0.0) -> None:
        super().__init__()
        self.d_out = d_out
        self.norm = nn.LayerNorm(d_in)
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


class ToWords(nn.Module):
    """Put tokens where the decoder's word embeddings are: a unit vector times a learned length, from their center.

    ``center + scale * x / |x|``. A decoder reads what lies among its words; the bare output of a new projection does
    not, whatever its direction.

    Args:
        center: Mean of the word embeddings that answers use; a buffer.
        scale: Length at the start: the mean distance of those embeddings from their center.
    """

    center: Tensor

    def __init__(self, center: Float[Tensor, " d"], *, scale: float) -> None:
        super().__init__()
        self.d_out = len(center)
        self.register_buffer("center", center)
        self.scale = nn.Parameter(torch.tensor(scale))

    def grid_out(self, grid: Int[Tensor, "item 3"]) -> Int[Tensor, "item 3"]:
        """Unchanged."""
        return grid

    def forward(self, media: Patches) -> Patches:
        """Move every token."""
        return Patches(values=self.center + self.scale * nn.functional.normalize(media.values, dim=-1), grid=media.grid)


class Chain(nn.Module):
    """Connectors one after the other; has the same face."""

    def __init__(self, *parts: Encoder) -> None:
        super().__init__()
        self.parts: Sequence[Encoder] = nn.ModuleList(parts)  # pyright: ignore[reportAttributeAccessIssue, reportArgumentType]
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
