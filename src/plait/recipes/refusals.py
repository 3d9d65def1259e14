"""What can be seen to stop a run before anything is written: `plait run` refuses it, `plait plan` says it."""

from __future__ import annotations

from typing import TYPE_CHECKING

from plait.core.errors import ConfigError, PlaitError
from plait.stages.stage import named_setting

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from plait.core.estimate import Machine
    from plait.recipes.recipe import Recipe


def refusals(recipe: Recipe, machine: Machine) -> Iterator[PlaitError]:
    """Each thing that would stop the run in so many processes as ``machine`` says.

    Args:
        recipe: Of the run.
        machine: Where it would be.
    """
    yield from _caught(lambda: check_shares(recipe, machine.processes))
    for at, tracker in enumerate(recipe.trackers):
        yield from _caught(lambda at=at, tracker=tracker: tracker.check(place=f"trackers.{at}"))
    for stage in (recipe.data, *recipe.stages.values()):
        yield from _caught(lambda stage=stage: stage.check(machine))
    if machine.processes > 1:
        for name, stage in recipe.stages.items():
            yield from _caught(lambda name=name, stage=stage: _check_offload(name, stage, machine))


def check_shares(recipe: Recipe, processes: int) -> None:
    """See that every process gets a share of each batch.

    Args:
        recipe: Of the run.
        processes: That train together.

    Raises:
        ConfigError: A batch is smaller than the number of processes; the place names the setting.
    """
    for name, stage in recipe.stages.items():
        for setting, count in stage.dealt().items():
            with named_setting(f"stages.{name}.trainer.parallel"):
                shares = stage.shares(processes, setting=setting)
            if count < shares:
                raise ConfigError(
                    f"a batch of {count} samples for {shares} {'shares' if shares < processes else 'processes'}",
                    place=f"stages.{name}.{setting}",
                    remedy=f"set it to {shares} or more, or start fewer processes",
                )


def _check_offload(name: str, stage: object, machine: Machine) -> None:
    """Where the device is known."""
    trainer, device = getattr(stage, "trainer", None), getattr(stage, "device", "auto")
    if device == "auto":
        device = machine.device if machine.measured else ""
    if trainer is not None and device:
        with named_setting(f"stages.{name}.trainer.parallel.offload"):
            trainer.parallel.check_device(device)


def _caught(check: Callable[[], None]) -> Iterator[PlaitError]:
    try:
        check()
    except PlaitError as fault:
        yield fault
