"""What an optimizer moves of weights that several data shares have alike: in each the rows of its own (ZeRO stage 1).

FSDP2 cuts a model by hooks around its forward pass, of which a stage of a pipeline runs a part, several micro-batches
at a time. Here weights and gradients stay whole; a process's optimizer has views of its own rows, and its state is as
large. After an update the processes exchange their rows.

Rajbhandari et al., ZeRO: memory optimizations toward training trillion parameter models,
https://arxiv.org/abs/1910.02054, section 5.1.
"""

# torch's annotations are partial: its members count as partially unknown.
# pyright: reportUnknownMemberType=false, reportPrivateUsage=false

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Shard
from torch.distributed.tensor.placement_types import _StridedShard  # what FSDP2 cuts with where tensor has cut before

from plait.core import collectives, dtensors


class RowPieces:
    """Views of this process's rows of weights that all data shares have alike: whole, or the same part (tensor).

    Scalars, and what does not lie row after row (channels-last filters), are moved whole in each process; so is a
    vocabulary's part that cannot be dealt out evenly.

    Args:
        weights: By name; the same in all data shares.
        devices: Has the dimensions ``data`` and, where weights are in parts, ``tensor``.

    Attributes:
        moved: What an optimizer is to move, by the names of the weights: pieces (``DTensor``), or whole.
    """

    def __init__(self, weights: Mapping[str, nn.Parameter], devices: DeviceMesh) -> None:
        self._devices, self._ranks = devices, devices["data"]
        self._cut = {name: weight for name, weight in weights.items() if self._even(weight)}
        self.moved = {**weights, **{name: self._piece(weight) for name, weight in self._cut.items()}}

    def take_gradients(self) -> None:
        """Give each piece its rows of the weight's gradient."""
        for name, weight in self._cut.items():
            grad = weight.grad
            self.moved[name].grad = None if grad is None else self._spread(self._rows(grad), weight)

    @torch.no_grad()
    def exchange(self, *, bucket: int = collectives.BUCKET) -> None:
        """After an update: every process gets the rows of the others.

        Args:
            bucket: Bytes of the weights of one message, at least.
        """
        for name in self._cut:
            self.moved[name].grad = None
        group = self._ranks.get_group()
        for members in self._buckets(bucket):
            own = torch.cat([self._rows(weight).reshape(-1) for weight in members])
            for rank, part in enumerate(collectives.all_gather(own, group)):
                rows = [self._rows(weight, rank) for weight in members]
                for there, found in zip(rows, part.split([one.numel() for one in rows]), strict=True):
                    there.copy_(found.view_as(there))

    def _even(self, weight: nn.Parameter) -> bool:
        """Whether a weight can be dealt out by rows so that torch's placements say which ones."""
        if not (weight.ndim and dtensors.local(weight.detach()).is_contiguous()):
            return False
        parts = weight.device_mesh.size() if isinstance(weight, DTensor) and weight.placements[0].is_shard(0) else 1
        return parts == 1 or len(weight) % (parts * self._ranks.size()) == 0

    def _piece(self, weight: nn.Parameter) -> nn.Parameter:
        return nn.Parameter(self._spread(self._rows(weight), weight))

    def _spread(self, rows: Tensor, like: Tensor) -> DTensor:
        form: dict[str, Any] = {"shape": like.shape, "stride": like.stride()}
        if not isinstance(like, DTensor):
            return DTensor.from_local(rows, self._ranks, [Shard(0)], **form)
        (cut,) = like.placements  # by tensor, before it is cut by rows
        by_rows = _StridedShard(0, split_factor=like.device_mesh.size()) if cut.is_shard(0) else Shard(0)
        return DTensor.from_local(rows, self._devices["data", "tensor"], [by_rows, cut], **form)

    def _rows(self, tensor: Tensor, rank: int | None = None) -> Tensor:
        """Those of a process, by default this one, as torch deals them out: the last ones may have fewer, or none."""
        here = dtensors.local(tensor.detach())
        rank = self._ranks.get_local_rank() if rank is None else rank
        each = -(-len(here) // self._ranks.size())
        first = min(rank * each, len(here))
        return here[first : first + each]

    def _buckets(self, size: int) -> Iterator[list[Tensor]]:
        kinds: dict[torch.dtype, list[Tensor]] = {}
        for weight in self._cut.values():
            kinds.setdefault(weight.dtype, []).append(dtensors.local(weight.detach()))
        for members in kinds.values():
            found: list[Tensor] = []
            for weight in members:
                found.append(weight)
                if sum(one.nbytes for one in found) >= size:
                    yield found
                    found = []
            if found:
                yield found
