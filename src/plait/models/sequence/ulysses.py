"""Attention over shared rows, heads dealt out: each process gets whole rows of some heads, and gives its results back.

Jacobs et al., DeepSpeed Ulysses, https://arxiv.org/abs/2309.14509, section 3.1. One exchange of all with all brings
queries, keys and values, one the results; each again in the backward pass.
"""

# torch's annotations are partial: its members count as partially unknown.
# pyright: reportUnknownMemberType=false

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.distributed as dist
from jaxtyping import Float
from torch import Tensor
from torch.autograd.function import once_differentiable

from plait.core import mesh
from plait.core.errors import ConfigError

Whole = Callable[
    [Float[Tensor, "b h t d"], Float[Tensor, "b k t d"], Float[Tensor, "b k t e"]], Float[Tensor, "b h t e"]
]
"""Any attention over whole rows."""


def ulysses(
    query: Float[Tensor, "b h p d"],
    key: Float[Tensor, "b k p d"],
    value: Float[Tensor, "b k p e"],
    *,
    attention: Whole,
    group: dist.ProcessGroup | None,
) -> Float[Tensor, "b h p e"]:
    """An attention over rows of which each process of a group has a part. Every process calls it, also backward.

    A process sends ``(n - 1) / n`` of its queries, keys, values and results, and the same of their gradients
    (:func:`ulysses_bytes`).

    Args:
        query: Of all heads, this process's positions.
        key: Of as many heads or fewer (grouped queries). Fewer than processes, or not evenly many for each, are
            repeated before they are sent.
        value: Likewise; may be of another width.
        attention: Gets all positions, those of process 0 first, of ``h / n`` heads and of those keys that they use.
        group: The processes; None: there is only this one.

    Raises:
        ConfigError: The heads cannot be dealt out evenly.
    """
    world = group.size() if group is not None else 1
    if world == 1:
        return attention(query, key, value)
    heads, groups = query.shape[1], key.shape[1]
    repeats = repeats_of(heads, groups, world=world)
    key, value = (x.repeat_interleave(repeats, dim=1) if repeats > 1 else x for x in (key, value))
    q, k, v = _to_rows((query, key, value), group)
    found = attention(q, k, v)
    if query.requires_grad and not found.requires_grad:  # nothing but padding: the exchange goes back all the same
        found = found + (q.sum() + k.sum() + v.sum()) * 0
    return _to_heads(found, group)


def repeats_of(heads: int, groups: int, *, world: int) -> int:
    """How often key heads are repeated, so that each process gets evenly many.

    Raises:
        ConfigError: The query heads cannot be dealt out evenly.

    Example:
        >>> repeats_of(8, 2, world=4), repeats_of(12, 3, world=2), repeats_of(8, 4, world=2)
        (2, 2, 1)
    """
    if heads % world:
        raise ConfigError(
            f"{heads} heads cannot be dealt out evenly to {world} processes",
            place="trainer.parallel.context_attention",
            remedy="set ring, or a context that divides the number of heads",
        )
    return world // math.gcd(groups, world)


def ulysses_bytes(
    shape: Sequence[int], *, heads: int, groups: int, width: int, value_width: int, world: int, size: int
) -> int:
    """Bytes that a process sends for one forward and backward pass of one attention.

    Args:
        shape: Rows, and positions of each that a process has.
        heads: Of queries.
        groups: Heads of keys.
        width: Of a head's queries and keys.
        value_width: Of its values.
        world: Number of processes.
        size: Bytes of a number.
    """
    rows, positions = shape
    sent = groups * repeats_of(heads, groups, world=world)
    numbers = rows * positions * (heads * (width + value_width) + sent * (width + value_width))
    return 2 * numbers * size * (world - 1) // world


class _Exchange(torch.autograd.Function):
    """Row i of what a process has goes to process i; row i of what it gets is from process i."""

    @staticmethod
    def forward(ctx: Any, rows: Tensor, group: dist.ProcessGroup) -> Tensor:
        ctx.group = group
        return _exchanged(rows, group)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *gradients: Any) -> tuple[Tensor, None]:  # pyright: ignore[reportIncompatibleMethodOverride]
        return _exchanged(gradients[0], ctx.group), None


def _exchanged(rows: Tensor, group: dist.ProcessGroup) -> Tensor:
    rows = rows.contiguous()
    found = torch.empty_like(rows)
    with mesh.explained():
        dist.all_to_all_single(found, rows, group=group)
    return found


def _to_rows(parts: Sequence[Tensor], group: dist.ProcessGroup | None) -> list[Tensor]:
    """``b h p d`` of this process's positions to ``b h/n (n p) d`` of all positions, of several tensors in one go."""
    assert group is not None
    world = group.size()
    split = [part.unflatten(1, (world, -1)).transpose(0, 1) for part in parts]  # n b h/n p d
    got = _Exchange.apply(torch.cat([part.flatten(1) for part in split], dim=1), group)
    assert isinstance(got, Tensor)
    sizes = [math.prod(part.shape[1:]) for part in split]
    whole = [one.view(part.shape) for one, part in zip(got.split(sizes, dim=1), split, strict=True)]
    return [one.permute(1, 2, 0, 3, 4).flatten(2, 3) for one in whole]


def _to_heads(found: Tensor, group: dist.ProcessGroup | None) -> Tensor:
    """``b h/n (n p) e`` to ``b h p e``."""
    assert group is not None
    split = found.unflatten(2, (group.size(), -1)).permute(2, 0, 1, 3, 4)  # n b h/n p e
    got = _Exchange.apply(split.flatten(1), group)
    assert isinstance(got, Tensor)
    return got.view(split.shape).transpose(0, 1).flatten(1, 2)
