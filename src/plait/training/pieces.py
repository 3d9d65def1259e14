"""The training state of a model in pieces, as the tensors of one checkpoint (:mod:`plait.training.sharded`).

Any number of processes reads what any number wrote: in pieces, or each of them the whole.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor

from plait.core import mesh
from plait.training.sharded import forms, load_together
from plait.training.state import Stored, TrainState, optimizer_state

_WEIGHTS, _OPTIMIZER, _AVERAGE = "weights/", "optimizer/", "average/"


def pieces(
    train_state: TrainState, optimizer: torch.optim.Optimizer, *, average: Mapping[str, Tensor]
) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """The tensors of a checkpoint as they lie on this process, and what of the optimizer is no tensor."""
    states, scalars = optimizer_state(optimizer)
    tensors = {f"{_WEIGHTS}{name}": tensor for name, tensor in train_state.tensors().items()}
    tensors |= {f"{_OPTIMIZER}{name}": tensor for name, tensor in states.items()}
    return tensors | {f"{_AVERAGE}{name}": tensor for name, tensor in average.items()}, scalars


def load_pieces(
    checkpoint: Path,
    train_state: TrainState,
    *,
    moved: Mapping[str, Tensor] = MappingProxyType({}),
    elsewhere: frozenset[str] = frozenset(),
) -> Stored:
    """Read a checkpoint as this process needs it: whole tensors, or pieces as its own weights lie.

    Every process calls this.

    Args:
        checkpoint: Its folder.
        train_state: What trains in this process.
        moved: What its optimizer moves, by weight; by default the weights.
        elsewhere: Names of weights of other processes, which are not read.

    Raises:
        CheckpointError: A piece is missing or damaged.
    """
    present = train_state.tensors()
    moved = {**present, **moved}
    into: dict[str, Tensor] = {}
    with mesh.agreed(checkpoint):
        for name, form in forms(checkpoint).items():
            group, _, rest = name.partition("/")
            of_state = f"{group}/" == _OPTIMIZER
            weight = rest.rpartition("/")[0] if of_state else rest
            if weight in elsewhere:
                continue
            like = (moved if of_state else present).get(weight)
            if like is not None and like.shape == form.size:
                into[name] = torch.empty_like(like, dtype=form.properties.dtype)
            else:
                into[name] = torch.empty(form.size, dtype=form.properties.dtype)
    load_together(checkpoint, into, partly=bool(elsewhere))
    return Stored(weights=_of(into, _WEIGHTS), optimizer=_of(into, _OPTIMIZER), average=_of(into, _AVERAGE))


def _of(tensors: Mapping[str, Tensor], prefix: str) -> dict[str, Tensor]:
    return {name.removeprefix(prefix): tensor for name, tensor in tensors.items() if name.startswith(prefix)}
