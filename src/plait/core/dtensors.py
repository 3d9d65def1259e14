"""Tensors that lie in pieces on several processes (torch's ``DTensor``), beside those that each has whole."""

from __future__ import annotations

import math

import torch
from torch.distributed.tensor import DTensor, Replicate, distribute_tensor


def local(tensor: torch.Tensor) -> torch.Tensor:
    """What lies in this process of a tensor that is spread over several; any other tensor is what it is."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def whole(tensor: torch.Tensor) -> torch.Tensor:
    """All of a tensor, gathered from the processes it lies on, one dimension of theirs after the other."""
    if not isinstance(tensor, DTensor):
        return tensor
    for dimension in range(tensor.device_mesh.ndim - 1):
        placements = [*tensor.placements]
        placements[dimension] = Replicate()
        tensor = tensor.redistribute(placements=placements)
    return tensor.full_tensor()


def parts(tensor: DTensor) -> int:
    """How many different parts it lies in; several processes may hold the same one."""
    sizes = zip(tensor.device_mesh.shape, tensor.placements, strict=True)
    return math.prod(size for size, placement in sizes if not placement.is_replicate())


def spread_like(tensor: torch.Tensor, like: torch.Tensor) -> torch.Tensor:
    """This process's part of a tensor that all have whole, cut as another of its shape; itself if that one is whole."""
    if not isinstance(like, DTensor) or tensor.shape != like.shape:
        return tensor
    return distribute_tensor(tensor, like.device_mesh, like.placements, src_data_rank=None)
