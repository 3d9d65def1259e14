"""The norm of the whole gradient, wherever its parts lie, and clipping to it."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor

from plait.core import collectives, dtensors, mesh
from plait.core.collectives import Group


@torch.no_grad()
def clip(
    grads: Sequence[Tensor], largest: float | None, *, copies: Sequence[Tensor] = (), stages: Group = None
) -> float:
    """Scale a gradient to a norm if it is longer; returns its Euclidean norm before.

    Args:
        grads: Of all weights; those in pieces are so over all processes.
        largest: None never clips; nor is anything scaled by a norm that is not finite.
        copies: Gradients of weights that another stage counts, too; only scaled here.
        stages: Processes that hold other weights; None: none do.
    """
    norm = torch.nn.utils.get_total_norm([grad for grad in grads if not isinstance(grad, DTensor)])
    if stages is not None:
        # As wide, and on the CPU, in all: that of a stage that counts nothing is a float32 zero there.
        norm = collectives.all_reduce_sum(norm.cpu().double() ** 2, stages).sqrt()
    pieces: dict[int, list[Tensor]] = {}  # by the number of processes that hold the same one
    for grad in grads:
        if isinstance(grad, DTensor):  # of a weight with fewer rows than processes some have an empty piece
            pieces.setdefault(mesh.world() // dtensors.parts(grad), []).append(grad.to_local())
    if pieces:
        squares = [torch.nn.utils.get_total_norm(p).double() ** 2 / copies for copies, p in sorted(pieces.items())]
        square = collectives.all_reduce_sum(torch.stack(squares).sum())
        norm = (square + norm.to(square.device).double() ** 2).sqrt().to(next(iter(pieces.values()))[0].dtype)
    if largest is not None and bool(norm.isfinite()):
        factor = torch.clamp(largest / (norm + 1e-6), max=1.0)
        for members in _by_device([*grads, *copies]):
            torch._foreach_mul_(members, factor.to(members[0].device))
    return float(norm)


def _by_device(grads: Sequence[Tensor]) -> list[list[Tensor]]:
    """What lies in this process: on a GPU, or, kept there, in the host's memory."""
    found: dict[torch.device, list[Tensor]] = {}
    for grad in map(dtensors.local, grads):
        found.setdefault(grad.device, []).append(grad)
    return list(found.values())
