"""Which positions of a row each process has, where a row is shared among several (context parallelism).

Under a causal mask the last positions see the most. Placed one after the other, the process with the last ones computes
almost twice the mean; zigzag (the first and the last piece together) and striped (Brandon et al., Striped attention,
https://arxiv.org/abs/2311.09431) give all of them nearly the same.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from jaxtyping import Int, Shaped
from torch import Tensor

Order = Literal["contiguous", "zigzag", "striped"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Placement:
    """Positions of each process; those at ``length`` and beyond are padding, so that all have equally many.

    Attributes:
        length: Of the whole rows.
        ranks: Positions of each, in the order in which it has them.
        rank: Which of them this process is.
    """

    length: int
    ranks: tuple[Int[Tensor, " p"], ...]
    rank: int = 0

    @classmethod
    def of(cls, length: int, order: Order = "contiguous", *, world: int = 1, rank: int = 0) -> Placement:
        """Deal out rows of a length.

        Args:
            length: Of the rows, any.
            order: Which process gets which positions.
            world: Number of processes.
            rank: This one.

        Example:
            >>> [places.tolist() for places in Placement.of(7, "zigzag", world=2).ranks]
            [[0, 1, 6, 7], [2, 3, 4, 5]]
            >>> [places.tolist() for places in Placement.of(7, "striped", world=2).ranks]
            [[0, 2, 4, 6], [1, 3, 5, 7]]
        """
        pieces = 2 * world if order == "zigzag" else world
        all_places = torch.arange(-(-length // pieces) * pieces)
        if order == "striped":
            ranks = tuple(all_places[number::world] for number in range(world))
        else:
            parts = all_places.chunk(pieces) if length else (all_places,) * pieces
            if order == "zigzag":
                ranks = tuple(torch.cat([parts[number], parts[-1 - number]]) for number in range(world))
            else:
                ranks = tuple(parts)
        return cls(length=length, ranks=ranks, rank=rank)

    def to(self, device: torch.device) -> Placement:
        """The same on a device."""
        return Placement(length=self.length, ranks=tuple(one.to(device) for one in self.ranks), rank=self.rank)

    @property
    def padded(self) -> int:
        """Positions of all processes together."""
        return sum(map(len, self.ranks))

    def mine(self, length: int | None = None) -> Int[Tensor, " p"]:
        """This process's positions of the rows, without padding."""
        places = self.ranks[self.rank]
        return places[places < (self.length if length is None else length)]

    def cut(self, whole: Shaped[Tensor, "..."], dim: int) -> Shaped[Tensor, "..."]:
        """This process's part of a tensor over all positions; zeros at padding.

        Args:
            whole: Has ``length`` entries along ``dim``.
            dim: Which of its dimensions are the positions.
        """
        return self.pad(whole, dim).index_select(dim, self.ranks[self.rank])

    def pad(self, whole: Shaped[Tensor, "..."], dim: int) -> Shaped[Tensor, "..."]:
        """A tensor over all positions with zeros after them, up to what all processes have together."""
        more = self.padded - self.length
        if not more:
            return whole
        shape = list(whole.shape)
        shape[dim] = more
        return torch.cat([whole, whole.new_zeros(shape)], dim=dim)

    def put(self, part: Shaped[Tensor, "..."], dim: int) -> Shaped[Tensor, "..."]:
        """A part at its positions in a tensor over all of them; zeros elsewhere."""
        shape = list(part.shape)
        shape[dim] = self.padded
        return part.new_zeros(shape).index_copy(dim, self.ranks[self.rank], part).narrow(dim, 0, self.length)
