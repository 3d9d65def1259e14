"""Experts over processes: tokens go to the process that holds their expert, and come back.

Each process of a group holds as many experts of every layer as the others, those of the first one first. Tokens are
sorted by expert, so that one message to each process (all-to-all, with the true number of tokens) brings them there and
one back; the backward pass goes the same ways. Lepikhin et al., GShard, https://arxiv.org/abs/2006.16668; He et al.,
FastMoE, https://arxiv.org/abs/2103.13262.
"""

# torch's annotations are partial: its members count as partially unknown.
# pyright: reportUnknownMemberType=false

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from jaxtyping import Float
from torch import Tensor

from plait.core import mesh
from plait.core.errors import ConfigError
from plait.models.moe import Experts


class Dispatch:
    """What a :class:`plait.models.moe.MixtureOfExperts` sends its tokens through, where other processes hold experts.

    All processes of the group call it equally often, with any number of tokens, and go backward through it equally
    often.

    Args:
        group: The processes; the first one holds the first experts.
        experts: How many there are in all processes.

    Attributes:
        sent: Bytes that this process has given to others.

    Raises:
        ConfigError: The processes cannot hold equally many.
    """

    def __init__(self, group: dist.ProcessGroup, *, experts: int) -> None:
        self.group, self.world = group, dist.get_world_size(group)
        if experts % self.world:
            raise ConfigError(
                f"{experts} experts over {self.world} processes",
                place="trainer.parallel.expert",
                remedy=f"choose a number of processes that divides {experts}",
            )
        self.sent = 0
        self._here = dist.get_rank(group)

    def __call__(self, experts: Experts, tokens: Float[Tensor, "n d"], counts: Sequence[int]) -> Float[Tensor, "n d"]:
        """Bring tokens through experts that lie anywhere.

        Args:
            experts: Those that lie here.
            tokens: Sorted by expert.
            counts: How many each expert of all processes has.
        """
        if torch.is_grad_enabled() and not tokens.requires_grad:
            tokens = tokens.detach().requires_grad_()  # all go backward, also who has nothing that learns before this
        asked = torch.tensor(counts, device=tokens.device).view(self.world, -1)
        wanted = torch.empty_like(asked)  # of each process for each expert here
        self._exchange(asked, into=wanted)
        way = _Way(self, asked.sum(1).tolist(), wanted.sum(1).tolist())
        came = _AllToAll.apply(tokens, way)
        numbers = torch.arange(wanted.shape[1], device=tokens.device).repeat(self.world)
        order = numbers.repeat_interleave(wanted.flatten()).argsort(stable=True)
        found = experts(came[order], wanted.sum(0).tolist())
        back = torch.empty_like(order)
        back[order] = torch.arange(len(order), device=order.device)
        return _AllToAll.apply(found[back], way.back())

    def _exchange(self, tensor: Tensor, *, into: Tensor, way: _Way | None = None) -> None:
        own = len(tensor) // self.world if way is None else way.there[self._here]
        self.sent += (len(tensor) - own) * (tensor[:1].nbytes if len(tensor) else 0)
        sizes = () if way is None else (way.here, way.there)
        with mesh.explained():
            dist.all_to_all_single(into, tensor, *sizes, group=self.group)


class _Way(NamedTuple):
    """How many rows go to each process, and how many come from it."""

    dispatch: Dispatch
    there: list[int]
    here: list[int]

    def back(self) -> _Way:
        return _Way(self.dispatch, self.here, self.there)


class _AllToAll(torch.autograd.Function):
    """Parts of a tensor to each process, in their order; what they sent, in theirs."""

    @staticmethod
    def forward(ctx: Any, tensor: Tensor, way: _Way) -> Tensor:
        ctx.way = way
        return _AllToAll._moved(tensor, way)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Any, ...]:
        return _AllToAll._moved(grads[0], ctx.way.back()), None

    @staticmethod
    def _moved(tensor: Tensor, way: _Way) -> Tensor:
        into = tensor.new_empty(sum(way.here), *tensor.shape[1:])
        way.dispatch._exchange(tensor.contiguous(), into=into, way=way)
        return into
