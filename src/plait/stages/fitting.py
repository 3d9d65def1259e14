"""How a stage trains: batches made ahead by the recipe's workers, moved to the device, into the loop."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from plait.core.events import Events

if TYPE_CHECKING:
    from torch import nn

    from plait.core.protocols import Batches, Objective
    from plait.training.settings import FitResult, Hooks, Settings


def fit_ahead(
    model: nn.Module,
    objective: Objective,
    batches: Batches,
    *,
    workers: int,
    settings: Settings,
    folder: Path,
    events: Events,
    hooks: Hooks,
) -> FitResult:
    """Train as :func:`plait.training.loop.fit` does, on batches that worker processes make ahead; none outlives it.

    Several processes begin when the first one does, which may have had more to do until here.

    Args:
        model: As there.
        objective: As there.
        batches: Where data come from; on any device, with workers on the CPU.
        workers: How many (:class:`plait.data.loader.Loader`).
        settings: Also say the device.
        folder: As there.
        events: As there.
        hooks: As there.

    Raises:
        PlaitError: As there, and as the loader.
    """
    from plait.core import mesh
    from plait.data.loader import Loader
    from plait.training.loop import fit
    from plait.training.settings import OnDevice

    mesh.first(lambda: None)
    with Loader(batches, steps=settings.steps, workers=workers, events=events) as loader:
        ahead = OnDevice(loader, settings.compute.device)
        return fit(model, objective, ahead, settings=settings, folder=folder, events=events, hooks=hooks)
