"""The norm of the whole gradient and of its parts, wherever they lie, and clipping to it."""

# torch's annotations are partial: its members count as partially unknown.
# pyright: reportUnknownMemberType=false

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor

from plait.core import collectives, dtensors, mesh


@dataclass(frozen=True, slots=True)
class Norm:
    """Euclidean norms of a gradient.

    Attributes:
        total: Of all of it.
        parts: Of each part of the model; their squares add up to that of the total.
    """

    total: float
    parts: Mapping[str, float] = field(default_factory=dict[str, float])


def parts_of(names: Iterable[str]) -> list[str]:
    """The parts that weights of these names are in, in order: what stands before the first dot.

    Example:
        >>> parts_of(["connectors.image.0.weight", "connectors.image.0.bias", "decoder.layers.0.weight", "mark"])
        ['connectors', 'decoder', 'mark']
    """
    return list(dict.fromkeys(name.partition(".")[0] for name in names))


@torch.no_grad()
def clip(
    grads: Mapping[str, Tensor],
    largest: float | None,
    *,
    parts: Sequence[str] = (),
    copies: Sequence[Tensor] = (),
    stages: int = 1,
) -> Norm:
    """Scale a gradient to a norm if it is longer; returns its norm before.

    Where it lies in pieces, all processes call this; total and parts take one message.

    Args:
        grads: Of all weights, by name, or of those of this process's stage; pieces are the same in each data share.
        largest: None never clips; nor is anything scaled by a norm that is not finite.
        parts: Of the model (:func:`parts_of`), the same in all processes; by default those of ``grads``.
        copies: Gradients of weights that another stage counts, too; only scaled here.
        stages: How many there are, each with weights of its own, in equally many processes.
    """
    parts = parts or parts_of(grads)
    here = [(name, grad) for name, grad in grads.items() if not isinstance(grad, DTensor)]
    norm, squares = _measured(here, parts)
    whole = mesh.world() // stages  # processes that have, together, all of a weight of this stage
    pieces: dict[int, list[tuple[str, Tensor]]] = {}  # by the number of processes that hold the same one
    for name, grad in grads.items():
        if isinstance(grad, DTensor):  # of a weight with fewer rows than processes some have an empty piece
            pieces.setdefault(whole // dtensors.parts(grad), []).append((name, grad.to_local()))
    found = [(_measured(its, parts), same) for same, its in sorted(pieces.items())]
    if stages > 1:  # what is whole in these processes is not in those of other stages
        found.append(((norm, squares), whole))
        norm, squares = torch.zeros(()), torch.zeros_like(squares)
    if found:
        # As wide, and on the CPU, in all: that of a stage that counts nothing is a float32 zero there.
        told = [torch.cat([own.cpu().double().reshape(1) ** 2, apart]) / same for (own, apart), same in found]
        both = collectives.all_reduce_sum(torch.stack(told).sum(0))
        norm, squares = (both[0] + norm.cpu().double() ** 2).sqrt(), squares + both[1:]
    if largest is not None and bool(norm.isfinite()):
        factor = torch.clamp(largest / (norm + 1e-6), max=1.0)
        for members in _by_device([*grads.values(), *copies]):
            torch._foreach_mul_(members, factor.to(members[0].device))
    return Norm(float(norm), dict(zip(parts, map(math.sqrt, squares.tolist()), strict=True)))


def _measured(grads: Sequence[tuple[str, Tensor]], parts: Sequence[str]) -> tuple[Tensor, Tensor]:
    """The norm of some gradients, in the very bits of :func:`torch.nn.utils.get_total_norm`; the square of each part's.

    Every gradient is read once. Squares are float64, on the CPU.
    """
    kinds: dict[tuple[torch.device, torch.dtype], list[tuple[str, Tensor]]] = {}
    for name, grad in grads:
        kinds.setdefault((grad.device, grad.dtype), []).append((name, grad))
    names = [name for its in kinds.values() for name, _ in its]
    norms = [norm for its in kinds.values() for norm in torch._foreach_norm([grad for _, grad in its])]
    squares = torch.zeros(len(parts), dtype=torch.float64)
    if not norms:
        return torch.tensor(0.0), squares
    each = torch.stack([norm.to(norms[0].device) for norm in norms])
    place = {part: at for at, part in enumerate(parts)}
    squares.index_add_(0, torch.tensor([place[name.partition(".")[0]] for name in names]), each.cpu().double() ** 2)
    return torch.linalg.vector_norm(each), squares


def _by_device(grads: Sequence[Tensor]) -> list[list[Tensor]]:
    """What lies in this process: on a GPU, or, kept there, in the host's memory."""
    found: dict[torch.device, list[Tensor]] = {}
    for grad in map(dtensors.local, grads):
        found.setdefault(grad.device, []).append(grad)
    return list(found.values())
