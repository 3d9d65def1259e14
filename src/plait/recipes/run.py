"""Run a recipe: each stage into its folder, in order; a sealed stage is never run twice."""

from __future__ import annotations

import os
import platform
import sys
import time
import traceback
from collections.abc import Callable, Sequence
from importlib import metadata
from pathlib import Path
from typing import Any

from plait import __version__
from plait.core import device
from plait.core.errors import PlaitError
from plait.core.events import Event, Events
from plait.core.files import RUNS, lock, new_run, point_latest, read_done, read_json, stage_folder, write_json
from plait.recipes.recipe import Recipe, load_recipe, save_recipe
from plait.report.page import write_report
from plait.stages.stage import Stage
from plait.training import plan

Listeners = tuple[Callable[[Event], None], ...]

_DISTRIBUTIONS = (
    "torch",
    "transformers",
    "tokenizers",
    "safetensors",
    "peft",
    "numpy",
    "pillow",
    "pydantic",
    "emoji",
    "resvg-py",
    "gguf",
)


def start(recipe: str, overrides: Sequence[str] = (), *, root: Path = RUNS, listeners: Listeners = ()) -> Path:
    """Load a recipe, create its run folder and run all stages.

    Args:
        recipe: Name of a shipped recipe or path of a YAML file.
        overrides: ``key=value`` settings.
        root: Where run folders go.
        listeners: Told of every event.

    Returns:
        The run folder.

    Raises:
        ConfigError: The recipe or an override is wrong; nothing was created.
        ResourceError: The plan needs more disk than there is; nothing was created.
    """
    resolved = load_recipe(recipe, overrides)
    _check_disk(resolved.spec, root)
    run = new_run(resolved.spec.name, root)
    compute = _set_up(0)
    write_json(run / "env.json", environment() | {"threads": compute.threads})
    save_recipe(resolved, run / "recipe.yaml")  # last: with it the folder is a run that can be resumed
    _execute(resolved.spec, run, compute=compute, listeners=listeners)
    return run


def resume(run: Path, *, listeners: Listeners = ()) -> Path:
    """Go on with an interrupted run; does nothing when all stages are sealed."""
    recipe = load_recipe(str(run / "recipe.yaml")).spec
    point_latest(run)
    compute = _set_up(read_json(run / "env.json")["threads"])
    _execute(recipe, run, compute=compute, listeners=listeners)
    return run


def stages(recipe: Recipe, run: Path) -> list[tuple[str, Stage, Path]]:
    """Name, spec and folder of every stage, in order."""
    named: list[tuple[str, Stage]] = [("data", recipe.data), *recipe.stages.items()]
    return [(name, stage, stage_folder(run, number, name)) for number, (name, stage) in enumerate(named, 1)]


def summary(run: Path) -> dict[str, Any]:
    """What a run holds, read from its folder alone."""
    recipe = load_recipe(str(run / "recipe.yaml")).spec
    rows: list[dict[str, Any]] = []
    for name, stage, folder in stages(recipe, run):
        done = read_done(folder)
        state = "done" if done else "started" if folder.is_dir() else "waiting"
        found: dict[str, Any] = dict(done["summary"]) if done else {}
        lines = found.pop("lines", [])
        rows.append(
            {"stage": name, "kind": stage.kind, "folder": folder.name, "state": state, "lines": lines, "summary": found}
        )
    return {"run": os.path.relpath(run), "name": run.name, "recipe": recipe.name, "stages": rows}


def environment() -> dict[str, Any]:
    """Versions and machine, as ``env.json`` keeps them."""
    versions: dict[str, str] = {}
    for name in _DISTRIBUTIONS:
        try:
            versions[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return {
        "plait": __version__,
        "python": platform.python_version(),
        "platform": platform.platform(),
        "cores": os.cpu_count(),
        "versions": versions,
        "command": sys.argv,
    }


def _set_up(threads: int) -> device.Compute:
    """Choose the thread count once for all stages, or take that of the run's beginning: bits depend on it.

    Stages find it where a person would set it, and what a person set goes first.
    """
    compute = device.setup(threads=0 if "OMP_NUM_THREADS" in os.environ else threads)
    os.environ["OMP_NUM_THREADS"] = str(compute.threads)
    return compute


def _check_disk(recipe: Recipe, root: Path) -> None:
    """Refuse before anything is created if the plan does not fit."""
    machine = plan.survey(root, probe=False)
    named = [(name, stage) for name, stage, _ in stages(recipe, root)]
    plan.require(plan.total(plan.estimate_all(named, machine), machine), machine, place=root)


def _execute(recipe: Recipe, run: Path, *, compute: device.Compute, listeners: Listeners) -> None:
    events = Events(run / "events.jsonl", listeners=listeners)
    with lock(run):
        events.note(f"{compute.device}; {'; '.join(compute.why)}", threads=compute.threads, dtype=compute.dtype)
        previous: Path | None = None
        for name, stage, folder in stages(recipe, run):
            if read_done(folder) is None:
                try:
                    _execute_stage(name, stage, previous, folder=folder, events=events)
                finally:
                    _report(run, events)
            previous = folder


def _report(run: Path, events: Events) -> None:
    """Write the page anew, also of a stage that failed; a page that cannot be written never costs the run."""
    try:
        write_report(run)
    except (PlaitError, OSError, ValueError) as fault:
        events.warning(f"report.html was not written: {fault}", place=str(run / "report.html"))


def _execute_stage(name: str, stage: Stage, previous: Path | None, *, folder: Path, events: Events) -> None:
    again = folder.is_dir()
    folder.mkdir(exist_ok=True)
    write_json(folder / "spec.json", stage.model_dump(mode="json"))
    begun = time.monotonic()
    events.emit("stage", f"{folder.name}: {'continuing' if again else 'started'}", stage=name, state="started")
    try:
        stage.run(previous, folder, events=events)
    except BaseException as fault:
        record = fault.as_dict() if isinstance(fault, PlaitError) else {"cause": repr(fault)}
        events.emit(
            "error", f"{folder.name}: stopped by {type(fault).__name__}", trace=traceback.format_exc(), **record
        )
        raise
    seconds = time.monotonic() - begun
    events.emit("stage", f"{folder.name}: done in {seconds:.1f} s", stage=name, state="done", seconds=round(seconds, 2))
