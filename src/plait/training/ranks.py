"""What several processes that train one model have to agree on; in a single process each of these is nothing.

Every process has the whole model (or its part of it) and its share of each batch. Gradients are sums over all of them
(:mod:`plait.training.gradient`), so that all make the same update. What is left: they begin alike, stop after the same
step, and draw random numbers that are not each other's.
"""

from __future__ import annotations

import contextlib
import signal

import torch

from plait.core import collectives, mesh
from plait.core.device import seed_everything
from plait.core.errors import CheckpointError, ConfigError
from plait.core.events import Events
from plait.core.grid import Grid
from plait.core.protocols import Batches, holds_state
from plait.training.interrupt import StopRequest
from plait.training.state import Origin, TrainState, digest_json


def start_alike(state: TrainState, origin: Origin, batches: Batches, *, events: Events) -> None:
    """See that all processes begin with the same settings and weights.

    Trained weights that differ are set to those of process 0, and that is said: two machines may compute a start with
    other roundings.

    Raises:
        ConfigError: Settings differ; or the source of the batches holds a state, of which each process has another.
        CheckpointError: What does not train differs.
    """
    if not mesh.active():
        return
    if holds_state(batches):
        raise ConfigError(
            f"{type(batches).__name__} holds a state, and each of {mesh.world()} processes has another",
            place="batches",
            remedy="train it in one process",
        )
    told = mesh.gather([digest_json(origin.settings), origin.frozen, state.digest()])
    for rank, (settings, frozen, _) in enumerate(told):
        if settings != told[0][0]:
            raise ConfigError(
                f"process {rank} has other settings than process 0",
                place="fit",
                remedy="start all with the same recipe and the same version of plait",
            )
        if frozen != told[0][1]:
            raise CheckpointError(
                f"process {rank} has other frozen weights than process 0",
                place="fit",
                remedy="give all the same model folders; see that their caches (PLAIT_HOME) hold the same files",
            )
    if others := [rank for rank, one in enumerate(told) if one[2] != told[0][2]]:
        events.warning(
            f"process {', '.join(map(str, others))} began with other trained weights than process 0, and takes those"
        )
        collectives.copy_from_first(state.tensors().values())


def asked(stop: StopRequest) -> bool:
    """Whether anybody asked any process to stop; all get the same answer, so that all stop after the same step."""
    if not mesh.active():
        return bool(stop)
    interrupted, stopped = collectives.all_reduce_sum(
        torch.tensor([stop.signal == signal.SIGINT, stop.signal != 0], dtype=torch.int64)
    ).tolist()
    if stopped and not stop.signal:
        stop.signal = signal.SIGINT if interrupted else signal.SIGTERM
    return bool(stopped)


def patience(stop: StopRequest) -> contextlib.AbstractContextManager[None]:
    """Work that is given up some seconds after a signal; among several processes it is finished.

    Who gives up in the middle of a step would leave the others waiting for its gradient.
    """
    return contextlib.nullcontext() if mesh.active() else stop.patience()


def seed_step(seed: int, step: int, grid: Grid) -> None:
    """Among several processes, draw the random numbers of a step from its number and the process's.

    So they are not the same in each (dropout would drop alike), and no process has to keep them: any number of
    processes goes on from a checkpoint. A single process draws on where it is. Processes that compute the same draw the
    same.
    """
    if mesh.active():
        own = (grid.place("pipeline") * grid.data + grid.place("data")) * grid.context + grid.place("context")
        keys = torch.Generator().manual_seed(seed * 1_000_003 + step * 4_096 + own)
        seed_everything(int(torch.randint(2**31 - 1, (), generator=keys)))
