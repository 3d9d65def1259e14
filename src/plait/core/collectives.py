"""Sums and gathers of tensors over the processes that train together, or over some of them (:mod:`plait.core.grid`).

In a single process each of these is nothing.

Example:
    >>> import torch
    >>> all_reduce_sum(torch.tensor([3.0])).item()
    3.0
"""

# torch's annotations are partial: its members count as partially unknown.
# pyright: reportUnknownMemberType=false

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import torch
import torch.distributed as dist

from plait.core import mesh

Group = dist.ProcessGroup | None
"""Which processes; None: all."""

# torch 2.13 gave them other names.
_gather: Any = getattr(dist, "all_gather_single" if hasattr(dist, "all_gather_single") else "all_gather_into_tensor")
_reduce_scatter: Any = getattr(
    dist, "reduce_scatter_single" if hasattr(dist, "reduce_scatter_single") else "reduce_scatter_tensor"
)

BUCKET = 25 * 2**20
"""Bytes that are summed in one message."""


def all_reduce_sum(value: torch.Tensor, group: Group = None) -> torch.Tensor:
    """Sum ``value`` over ranks, in place, and return it; counts as integers or float64, for float32 stops at 2**24."""
    if mesh.active():
        with mesh.explained():
            dist.all_reduce(value, op=dist.ReduceOp.SUM, group=group)
    return value


def all_reduce_many(tensors: Sequence[torch.Tensor], group: Group = None, *, bucket: int = BUCKET) -> int:
    """Sum tensors over ranks, in place: small ones together, in messages of a size that networks are good at.

    Args:
        tensors: The same shapes, dtypes and order on every rank.
        group: Over which ranks.
        bucket: Bytes of a message, at least.

    Returns:
        Bytes that this rank gave into the sums.
    """
    if not mesh.active():
        return 0
    sent = 0
    for members in _buckets(tensors, bucket):
        sent += sum(tensor.nbytes for tensor in members)
        if len(members) == 1 and members[0].is_contiguous():
            all_reduce_sum(members[0], group)
            continue
        flat = all_reduce_sum(torch.cat([tensor.reshape(-1) for tensor in members]), group)
        for tensor, part in zip(members, torch.split(flat, [tensor.numel() for tensor in members]), strict=True):
            tensor.copy_(part.view_as(tensor))
    return sent


def all_gather(value: torch.Tensor, group: Group = None) -> list[torch.Tensor]:
    """Every rank's tensor, in the order of ranks; their first sizes may differ, the others and the dtype must agree."""
    if not mesh.active():
        return [value]
    with mesh.explained():
        sizes = [torch.zeros(1, dtype=torch.int64, device=value.device) for _ in range(dist.get_world_size(group))]
        dist.all_gather(sizes, torch.tensor([len(value)], device=value.device), group=group)
        counts = [int(size) for size in sizes]
        if not any(counts):
            return [value for _ in counts]
        padded = value.new_zeros(max(counts), *value.shape[1:])
        padded[: len(value)] = value
        parts = [torch.empty_like(padded) for _ in counts]
        dist.all_gather(parts, padded, group=group)
    return [part[:count] for part, count in zip(parts, counts, strict=True)]


def gather_equal(value: torch.Tensor, group: Group = None) -> torch.Tensor:
    """Every rank's tensor of one shape, along a new first dimension, in the order of ranks."""
    if not mesh.active():
        return value[None]
    found = value.new_empty(dist.get_world_size(group) * len(value), *value.shape[1:])
    with mesh.explained():
        _gather(found, value.contiguous(), group=group)
    return found.view(-1, *value.shape)


def sum_scattered(values: torch.Tensor, group: Group = None) -> torch.Tensor:
    """This rank's entry of the first dimension, summed over ranks: a reduce-scatter.

    gloo makes one of a whole sum, which sends twice as much; on the CPU, entries go to their ranks, and each sums.

    Args:
        values: An entry for each rank, of one shape.
        group: The ranks.
    """
    if not mesh.active():
        return values[0]
    values = values.contiguous()
    with mesh.explained():
        if values.device.type == "cpu":
            theirs = torch.empty_like(values)
            dist.all_to_all_single(theirs, values, group=group)
            return theirs.sum(0)
        found = values.new_empty(values.shape[1:])
        _reduce_scatter(found, values.view(-1, *values.shape[2:]), group=group)
    return found


def copy_from_first(tensors: Iterable[torch.Tensor]) -> None:
    """Give every rank the values of rank 0, in place."""
    if mesh.active():
        with mesh.explained():
            for tensor in tensors:
                whole = tensor.contiguous()
                dist.broadcast(whole, src=0)
                tensor.copy_(whole)


def _buckets(tensors: Sequence[torch.Tensor], size: int) -> Iterator[list[torch.Tensor]]:
    """In order, for each dtype and device apart."""
    kinds: dict[tuple[torch.dtype, torch.device], list[torch.Tensor]] = {}
    for tensor in tensors:
        kinds.setdefault((tensor.dtype, tensor.device), []).append(tensor)
    for members in kinds.values():
        found: list[torch.Tensor] = []
        held = 0
        for tensor in members:
            found.append(tensor)
            held += tensor.nbytes
            if held >= size:
                yield found
                found, held = [], 0
        if found:
            yield found


def all_gather_text(text: str, group: Group = None) -> list[str]:
    """Every rank's text, in the order of ranks."""
    if not mesh.active():
        return [text]
    parts = all_gather(torch.tensor(list(text.encode()), dtype=torch.uint8), group)
    return [part.numpy().tobytes().decode() for part in parts]
