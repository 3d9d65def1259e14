"""How the processes that train together divide the work: a grid of pipeline x data x context x tensor.

Processes are numbered with the tensor dimension innermost: those that talk most sit side by side, on one machine.
Those that differ in the data dimension get other samples; all others get the same ones, and divide the model or the
tokens of a row between them.

Example:
    >>> grid = Grid(pipeline=2, data=2, tensor=2, rank=5)
    >>> grid.place("pipeline"), grid.place("data"), grid.place("tensor")
    (1, 0, 1)
    >>> grid.ranks("data"), grid.ranks("data", "tensor"), grid.share
    ([5, 7], [4, 5, 6, 7], (0, 2))
"""

from __future__ import annotations

import itertools
import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

from plait.core.errors import ConfigError

if TYPE_CHECKING:  # settings are read without torch
    from torch.distributed import ProcessGroup
    from torch.distributed.device_mesh import DeviceMesh

Dimension = Literal["pipeline", "data", "context", "tensor"]
DIMENSIONS: tuple[Dimension, ...] = ("pipeline", "data", "context", "tensor")
"""Outermost first."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Grid:
    """Where this process is in the grid.

    Attributes:
        pipeline: Stages that the model's blocks are cut into.
        data: Shares that batches are dealt to.
        context: Parts that rows are cut into.
        tensor: Parts that matrices are cut into.
        rank: Of this process.
    """

    pipeline: int = 1
    data: int = 1
    context: int = 1
    tensor: int = 1
    rank: int = 0

    @classmethod
    def of(cls, rank: int, world: int, *, pipeline: int = 1, context: int = 1, tensor: int = 1) -> Grid:
        """The grid of so many processes; what the other dimensions leave is data parallel.

        Raises:
            ConfigError: Their number cannot be divided so.
        """
        each = pipeline * context * tensor
        if world % each:
            degrees = {"pipeline": pipeline, "context": context, "tensor": tensor}
            named = " x ".join(f"{name} {degree}" for name, degree in degrees.items() if degree > 1)
            raise ConfigError(
                f"{world} processes cannot be divided into {named}",
                place="trainer.parallel",
                remedy=f"start a multiple of {each} processes, or lower these settings",
            )
        return cls(pipeline=pipeline, data=world // each, context=context, tensor=tensor, rank=rank)

    @property
    def share(self) -> tuple[int, int]:
        """Which share of each batch is for this process, and how many there are."""
        return self.place("data"), self.data

    def size(self, dimension: Dimension) -> int:
        """Processes along a dimension."""
        return getattr(self, dimension)

    def place(self, dimension: Dimension) -> int:
        """This process's number along a dimension."""
        inner = DIMENSIONS[DIMENSIONS.index(dimension) + 1 :]
        return self.rank // math.prod(map(self.size, inner)) % self.size(dimension)

    def ranks(self, *dimensions: Dimension) -> list[int]:
        """Processes that differ from this one in these dimensions only, in order, itself included."""
        return next([*part] for part in self._parts(*dimensions) if self.rank in part)

    def group(self, *dimensions: Dimension, again: bool = False) -> ProcessGroup | None:
        """The group of :meth:`ranks`; all processes must ask for it, in the same order. None in a single process.

        Args:
            dimensions: In which its processes differ.
            again: A second group of the same processes, whose messages do not wait for those of the first.
        """
        from plait.core import mesh

        return mesh.group_among(self._parts(*dimensions), again=again) if mesh.active() else None

    def devices(self, device: str) -> DeviceMesh:
        """All processes as torch's mesh, for tensors that lie in pieces on some of its dimensions.

        Args:
            device: ``cpu`` or ``cuda``.
        """
        from torch.distributed.device_mesh import init_device_mesh

        from plait.core import mesh

        mesh.barrier()  # as where a group is made
        return init_device_mesh(device, tuple(map(self.size, DIMENSIONS)), mesh_dim_names=DIMENSIONS)

    def _parts(self, *dimensions: Dimension) -> tuple[tuple[int, ...], ...]:
        """All processes in groups that differ in these dimensions only."""
        found: dict[tuple[int, ...], list[int]] = {}
        for rank, place in enumerate(itertools.product(*(range(self.size(name)) for name in DIMENSIONS))):
            rest = tuple(at for name, at in zip(DIMENSIONS, place, strict=True) if name not in dimensions)
            found.setdefault(rest, []).append(rank)
        return tuple(map(tuple, found.values()))
