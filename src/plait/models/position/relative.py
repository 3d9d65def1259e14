"""Relative position codes: what the scores of attention gain from how far a key is from its query.

All are called with the gaps between places (query minus key, one number an axis), the queries and the grid that the
tokens make up, and give what is added to the scores: any of them can stand in any
:class:`~plait.models.attention.Attention`.
"""

import math

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.nn import functional

from plait.core.errors import ConfigError, DataError
from plait.models.fixed import Fixed


def gaps(query_at: Int[Tensor, "q a"], key_at: Int[Tensor, "k a"]) -> Int[Tensor, "q k a"]:
    """How far each query is beyond each key, on each axis.

    Example:
        >>> at = torch.arange(3)[:, None]
        >>> gaps(at, at)[..., 0].tolist()
        [[0, -1, -2], [1, 0, -1], [2, 1, 0]]
    """
    return query_at[:, None] - key_at[None]


class BucketBias(nn.Module):
    """T5's bias (https://arxiv.org/abs/1910.10683): a learned number for each head and bucket of distances.

    Small distances have a bucket each, larger ones share buckets whose width grows like a logarithm, and all beyond
    ``furthest`` are one. Shared by all layers in T5 (``Places.bias``).

    Args:
        heads: Of the attention.
        buckets: In all.
        furthest: Distance from which on all are alike.
        both_ways: Keys after the query have half of the buckets (encoder); else they share bucket 0 (decoder).
    """

    def __init__(self, heads: int, *, buckets: int = 32, furthest: int = 128, both_ways: bool = True) -> None:
        super().__init__()
        self.buckets, self.furthest, self.both_ways = buckets, furthest, both_ways
        self.table = nn.Parameter(torch.empty(buckets, heads))
        nn.init.trunc_normal_(self.table, std=0.02)

    def bucket(self, gap: Int[Tensor, "*n"]) -> Int[Tensor, "*n"]:
        """Number of the bucket of each gap (query minus key)."""
        half = self.buckets // 2 if self.both_ways else self.buckets
        distance = gap.abs() if self.both_ways else gap.clamp(min=0)
        exact = half // 2
        beyond = (distance.clamp(min=1).float() / exact).log() / math.log(self.furthest / exact) * (half - exact)
        found = torch.where(distance < exact, distance, (exact + beyond.long()).clamp(max=half - 1))
        return found + half * (gap < 0) if self.both_ways else found

    def forward(
        self, gap: Int[Tensor, "q k 1"], queries: Tensor | None = None, *, grid: tuple[int, int] | None = None
    ) -> Float[Tensor, "1 h q k"]:
        """Bias of each head."""
        return self.table[self.bucket(gap[..., 0])].permute(2, 0, 1)[None]


class GridBias(nn.Module):
    """A learned number for each head and each offset of row and column: Swin's (https://arxiv.org/abs/2103.14030).

    With a class token it is BEiT's (https://arxiv.org/abs/2106.08254): three more numbers for attention from it, to it
    and to itself; the class token comes first. For another grid offsets are interpolated bilinearly, as BEiT's are.

    Args:
        heads: Of the attention.
        rows: Of the window or grid that is learned.
        columns: Likewise.
        class_token: Whether the first token is no cell.
    """

    def __init__(self, heads: int, rows: int, columns: int, *, class_token: bool = False) -> None:
        super().__init__()
        self.grid, self.class_token = (rows, columns), class_token
        self.table = nn.Parameter(torch.empty((2 * rows - 1) * (2 * columns - 1) + 3 * class_token, heads))
        nn.init.trunc_normal_(self.table, std=0.02)

    def index(self, gap: Int[Tensor, "q k 2"], grid: tuple[int, int]) -> Int[Tensor, "q k"]:
        """Row of the table of a grid for each pair of tokens; the length of the table where it has no such gap."""
        rows, columns = grid
        found = (gap[..., 0] + rows - 1) * (2 * columns - 1) + gap[..., 1] + columns - 1
        inside = (gap[..., 0].abs() < rows) & (gap[..., 1].abs() < columns)
        offsets = (2 * rows - 1) * (2 * columns - 1)
        found = torch.where(inside, found, offsets + 3 * self.class_token)  # else a long row would read as a step down
        if self.class_token:
            found[0, :], found[:, 0], found[0, 0] = offsets, offsets + 1, offsets + 2
        return found

    def forward(
        self, gap: Int[Tensor, "q k 2"], queries: Tensor | None = None, *, grid: tuple[int, int] | None = None
    ) -> Float[Tensor, "1 h q k"]:
        """Bias of each head; ``grid`` is the learned one unless given.

        Raises:
            DataError: A gap is wider than the grid (on a GPU: torch's assertion, later).
        """
        grid = grid or self.grid
        index = self.index(gap, grid)
        try:
            found = self.table_of(*grid)[index.flatten()]
        except IndexError as error:
            side = " x ".join(str(1 + int(n)) for n in gap.abs().amax((0, 1)))
            raise DataError(
                f"tokens of a grid of {side}, a bias for {grid[0]} x {grid[1]}",
                place="relative bias",
                remedy="say the tokens' grid (Places.grid), or make the bias of that grid with resized()",
            ) from error
        # Laid out as scores are: every row of a batch reads it.
        return found.view(*index.shape, -1).permute(2, 0, 1).contiguous()[None]

    def table_of(self, rows: int, columns: int) -> Float[Tensor, "n h"]:
        """The table of a grid, interpolated unless it is the learned one."""
        if (rows, columns) == self.grid:
            return self.table
        old = [2 * side - 1 for side in self.grid]
        offsets, rest = self.table[: old[0] * old[1]], self.table[old[0] * old[1] :]
        cells = offsets.view(*old, -1).permute(2, 0, 1)[None].float()
        cells = functional.interpolate(cells, size=(2 * rows - 1, 2 * columns - 1), mode="bilinear").to(self.table)
        return torch.cat([cells[0].permute(1, 2, 0).flatten(0, 1), rest])

    def resized(self, rows: int, columns: int) -> "GridBias":
        """A bias whose learned grid is another one."""
        new = GridBias(self.table.shape[1], rows, columns, class_token=self.class_token).to(self.table)
        with torch.no_grad():
            new.table.copy_(self.table_of(rows, columns))
        return new


class LinearBias(nn.Module):
    """ALiBi (https://arxiv.org/abs/2108.12409): scores fall with the distance, each head at its own fixed rate.

    Rates are ``2 ** (-8 i / heads)``, for any number of heads; the paper's rule for powers of two. Both ways in an
    encoder; on a grid, the distance is the sum over axes.

    Args:
        heads: Of the attention.
    """

    def __init__(self, heads: int) -> None:
        super().__init__()
        slope = 2.0 ** (-8 * torch.arange(1, heads + 1, dtype=torch.float64, device="cpu") / heads)
        self._slope = Fixed(slope.float())

    @property
    def slope(self) -> Float[Tensor, " h"]:
        """How fast scores of each head fall."""
        return self._slope.values

    def forward(
        self, gap: Int[Tensor, "q k a"], queries: Tensor | None = None, *, grid: tuple[int, int] | None = None
    ) -> Float[Tensor, "1 h q k"]:
        """Bias of each head."""
        return -self._slope.on(gap.device)[None, :, None, None] * gap.abs().sum(-1)


class KeyOffsets(nn.Module):
    """Shaw's code (https://arxiv.org/abs/1803.02155, equation 5): a learned vector for each clipped offset.

    ``(q . r[clip(gap)]) / sqrt(d_head)`` is added to the scores; vectors are shared by the heads, as in the paper, and
    the paper's second table, added to the values, is left out (its table 3 sees no gain from it).

    Args:
        d_head: Width of a head.
        furthest: Offsets beyond it are clipped.
    """

    def __init__(self, d_head: int, *, furthest: int = 16) -> None:
        super().__init__()
        if furthest < 1:
            raise ConfigError(f"furthest is {furthest}", remedy="give 1 or more")
        self.furthest = furthest
        self.table = nn.Parameter(torch.empty(2 * furthest + 1, d_head))
        nn.init.trunc_normal_(self.table, std=0.02)

    def forward(
        self, gap: Int[Tensor, "q k 1"], queries: Float[Tensor, "b h q e"], *, grid: tuple[int, int] | None = None
    ) -> Float[Tensor, "b h q k"]:
        """Bias of each head; depends on the queries."""
        row = gap[..., 0].clamp(-self.furthest, self.furthest) + self.furthest
        scores = queries @ self.table.T / math.sqrt(self.table.shape[1])
        return scores.gather(-1, row.expand(*scores.shape[:-1], -1))
