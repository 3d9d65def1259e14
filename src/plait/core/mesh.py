"""The processes that train together: rank, world, sums and gathers over ranks, barrier. No-ops in a single process.

Launch with ``torchrun`` (or anything that sets its environment); without it ``torch.distributed`` is never initialized.

Example:
    >>> import torch
    >>> with joined():
    ...     world(), all_reduce_sum(torch.tensor([3.0])).item()
    (1, 3.0)
"""

# torch's annotations are partial: its members count as partially unknown.
# pyright: reportUnknownMemberType=false

from __future__ import annotations

import os
from collections.abc import Generator
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed as dist

from plait.core.errors import ConfigError

_VARIABLES = ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")


def active() -> bool:
    """Whether this process has joined others."""
    return dist.is_available() and dist.is_initialized()


def rank() -> int:
    """This process's number, from 0."""
    return dist.get_rank() if active() else 0


def world() -> int:
    """How many processes train together."""
    return dist.get_world_size() if active() else 1


def all_reduce_sum(value: torch.Tensor) -> torch.Tensor:
    """Sum ``value`` over ranks, in place, and return it; counts as integers or float64, for float32 stops at 2**24."""
    if active():
        dist.all_reduce(value, op=dist.ReduceOp.SUM)
    return value


def all_gather(value: torch.Tensor) -> list[torch.Tensor]:
    """Every rank's tensor, in the order of ranks; their first sizes may differ, the others and the dtype must agree."""
    if not active():
        return [value]
    sizes = [torch.zeros(1, dtype=torch.int64, device=value.device) for _ in range(world())]
    dist.all_gather(sizes, torch.tensor([len(value)], device=value.device))
    counts = [int(size) for size in sizes]
    if not any(counts):
        return [value for _ in counts]
    padded = value.new_zeros(max(counts), *value.shape[1:])
    padded[: len(value)] = value
    parts = [torch.empty_like(padded) for _ in counts]
    dist.all_gather(parts, padded)
    return [part[:count] for part, count in zip(parts, counts, strict=True)]


def all_gather_text(text: str) -> list[str]:
    """Every rank's text, in the order of ranks."""
    if not active():
        return [text]
    device = "cuda" if dist.get_backend() == "nccl" else "cpu"
    parts = all_gather(torch.tensor(list(text.encode()), dtype=torch.uint8, device=device))
    return [part.cpu().numpy().tobytes().decode() for part in parts]


def barrier() -> None:
    """Wait until every rank is here."""
    if active():
        dist.barrier()


def gather(value: Any) -> list[Any]:
    """Small plain data of every rank, in their order; on all ranks."""
    if not active():
        return [value]
    found: list[Any] = [None] * world()
    dist.all_gather_object(found, value)
    return found


@contextmanager
def joined(device: str = "cpu") -> Generator[None]:
    """Join the processes that ``torchrun`` started, for the length of the block; does nothing in a single process.

    Args:
        device: ``cuda`` talks over NCCL and takes the GPU of this process's local rank; all else talks over gloo.

    Raises:
        ConfigError: ``WORLD_SIZE`` is above 1, but the rest of torchrun's variables is missing.
    """
    if active() or int(os.environ.get("WORLD_SIZE", "1")) <= 1:
        yield
        return
    missing = [name for name in _VARIABLES if name not in os.environ]
    if missing:
        raise ConfigError(
            f"WORLD_SIZE is {os.environ['WORLD_SIZE']}, but {', '.join(missing)} is not set",
            place="environment",
            remedy="start with `torchrun`, or unset WORLD_SIZE to use one process",
        )
    if device == "cuda":
        torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", "0")))
    dist.init_process_group("nccl" if device == "cuda" else "gloo")
    try:
        yield
    finally:
        dist.destroy_process_group()
