"""One stage of a run in a process of its own, measured: ``python -m plait.recipes.probe_stage RUN NUMBER STEPS``.

:mod:`plait.recipes.probe` starts it and reads what it says: one JSON object a line, ``event``, then ``result`` or
``error``. Its memory is the stage's alone, since no stage before it ran in this process. Started as torchrun starts
processes, it is one of several.
"""

from __future__ import annotations

import contextlib
import itertools
import json
import sys
import time
from collections.abc import Callable, Generator, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from plait.core.device import peak_rss, reset_peak, rss
from plait.core.errors import PlaitError, ResourceError
from plait.core.events import Event, Events
from plait.core.files import write_json
from plait.core.launch import place, together
from plait.recipes.recipe import load_recipe
from plait.recipes.run import stages

if TYPE_CHECKING:
    from plait.training.rehearsal import Asked
    from plait.training.settings import FitResult

BEFORE, AFTER, SHOWN = "before", "after", "shown"
"""Sections of a stage beside its phases: what comes before the first step and after the last one, and what is shown or
scored while it trains."""

_NO_MEMORY = ("allocate memory", "out of memory", "OutOfMemory")


@dataclass(slots=True)
class _Meter:
    """Highest memory of each section of a stage."""

    peaks: dict[str, int] = field(default_factory=dict[str, int])
    section: str = BEFORE

    def enter(self, section: str) -> str:
        """Begin another section; returns the one that ends."""
        before = self.section
        self.peaks[before] = max(self.peaks.get(before, 0), peak_rss(), rss())
        self.section = section
        reset_peak()
        return before


class Rehearsal:
    """Takes the place of training in a stage: trains, measures, and ends after some steps.

    Args:
        folder: Of the stage; a phase is called after its own folder in there, or ``training``.
        steps: At most, in each phase; 0 takes all.
    """

    def __init__(self, folder: Path, steps: int) -> None:
        self.folder, self.steps = folder, steps
        self.meter = _Meter()
        self.phases: list[dict[str, Any]] = []

    def __call__(self, asked: Asked) -> FitResult:
        """See :data:`plait.training.rehearsal.Instead`."""
        from plait.training.loop import fit

        name = asked.folder.name if asked.folder != self.folder else "training"
        settings = asked.settings
        if self.steps:
            settings = replace(settings, steps=min(self.steps, settings.steps), stopping=None)
        before = self.meter.enter(name)
        began, ends = time.perf_counter(), list[float]()
        paused = 0.0

        def on_step(step: int, values: Mapping[str, Any]) -> None:
            nonlocal paused
            now = time.perf_counter()
            ends.append(now - paused)
            if asked.hooks.on_step is not None and asked.hooks.tells(step):
                inside = self.meter.enter(SHOWN)
                asked.hooks.on_step(step, values)
                self.meter.enter(inside)
            paused += time.perf_counter() - now

        result = fit(
            asked.model,
            asked.objective,
            asked.batches,
            settings=settings,
            folder=asked.folder,
            events=asked.events,
            hooks=replace(asked.hooks, on_step=on_step, tells=bool),
        )
        taken = time.perf_counter() - began
        each = [later - earlier for earlier, later in itertools.pairwise(ends)]
        self.meter.enter(AFTER if before != AFTER else before)
        self.phases.append(
            {
                "phase": name,
                "steps": asked.settings.steps,
                "done": len(ends),
                "step_s": sum(each) / len(each) if each else ends[0] - began if ends else 0.0,
                "taken_s": taken,
            }
        )
        return result


def measure(run: Path, number: int, *, steps: int, events: Events) -> dict[str, Any]:
    """Run a stage in its folder, and say what it took.

    Args:
        run: Run folder with ``recipe.yaml``; of the stages before, those that this one needs are finished.
        number: Which stage, from 1 on.
        steps: At most, in each phase; 0 takes all.
        events: Told what the stage says.
    """
    from plait.training.rehearsal import rehearsing

    recipe = load_recipe(str(run / "recipe.yaml")).spec
    named = stages(recipe, run)
    name, stage, folder = named[number - 1]
    before = [at for _, _, at in named[: number - 1] if at.is_dir()]  # what scores or compresses was left out
    if place():  # of several processes, each but the first has a folder of its own
        folder = run / "ranks" / str(place()) / folder.name
    folder.mkdir(parents=True, exist_ok=True)
    write_json(folder / "spec.json", stage.model_dump(mode="json"))
    rehearsal = Rehearsal(folder, steps)
    began = time.perf_counter()
    with rehearsing(rehearsal):
        stage.run(before[-1] if before else None, folder, events=events)
    rehearsal.meter.enter("")
    return {
        "stage": name,
        "kind": stage.kind,
        "peaks": rehearsal.meter.peaks,
        "phases": rehearsal.phases,
        "seconds": time.perf_counter() - began,
        "disk_bytes": sum(file.stat().st_size for file in folder.rglob("*") if file.is_file()),
    }


def main(arguments: list[str]) -> int:
    """Measure, and print what came of it."""
    say = _printer()

    def listen(event: Event) -> None:
        say({"event": event.kind, "text": event.text, "fields": dict(event.fields)})

    try:
        with no_memory(), contextlib.redirect_stdout(sys.stderr), together():  # nothing else may speak in between
            events = Events(None, listeners=(listen,))
            found = measure(Path(arguments[0]), int(arguments[1]), steps=int(arguments[2]), events=events)
    except PlaitError as error:
        say({"error": error.as_dict()})
        return error.exit_code
    say({"result": found})
    return 0


def _printer() -> Callable[[Mapping[str, Any]], None]:
    own = sys.stdout

    def say(record: Mapping[str, Any]) -> None:
        own.write(json.dumps(record, ensure_ascii=False, default=str) + "\n")
        own.flush()

    return say


@contextlib.contextmanager
def no_memory() -> Generator[None]:
    """Say in Plait's words that memory does not suffice.

    Raises:
        ResourceError: It does not.
    """
    try:
        yield
    except (MemoryError, RuntimeError) as error:
        if isinstance(error, RuntimeError) and not any(said in str(error) for said in _NO_MEMORY):
            raise
        raise ResourceError(
            f"memory does not suffice: {str(error).splitlines()[0] if str(error) else type(error).__name__}",
            remedy="a smaller trainer.micro_batch, batch_size or model",
        ) from error


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
