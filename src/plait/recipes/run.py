"""Run a recipe: each stage into its folder, in order; a sealed stage is never run twice."""

from __future__ import annotations

import contextlib
import json
import os
import platform
import signal
import sys
import time
import traceback
from collections.abc import Callable, Generator, Mapping, Sequence
from importlib import metadata
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from plait import __version__
from plait.core import device
from plait.core.errors import ConfigError, PlaitError, ResourceError, Stopped
from plait.core.events import Event, Events
from plait.core.files import RUNS, lock, new_run, point_latest, read_done, read_json, seal, stage_folder, write_json
from plait.recipes.recipe import Recipe, load_recipe
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
        ResourceError: Disk, a package or a device is missing; nothing was created.
        Stopped: Ctrl-C or SIGTERM; what is finished is kept.
    """
    resolved = load_recipe(recipe, overrides)
    needs = _preflight(resolved.spec, root)
    compute = device.setup()
    env = environment() | {"threads": compute.threads}
    contents = {"recipe.yaml": resolved.to_yaml(), "env.json": json.dumps(env, indent=2) + "\n"}
    run = new_run(resolved.spec.name, root, contents=contents)
    _execute(resolved.spec, run, compute=compute, listeners=listeners, needs=needs)
    return run


def resume(run: Path, *, accept: Sequence[str] = (), listeners: Listeners = ()) -> Path:
    """Go on with an interrupted run; finished stages are checked and not run again.

    Args:
        run: The run folder.
        accept: Settings, as a refusal names them, that may differ from those of the checkpoint gone on from.
        listeners: Told of every event.

    Raises:
        ConfigError: The recipe in the folder was changed after stages were made by it, or after a checkpoint without
            being accepted.
        Stopped: Ctrl-C or SIGTERM; what is finished is kept.
    """
    from plait.training.checkpoint import accepting  # imports torch

    recipe = load_recipe(str(run / "recipe.yaml")).spec
    point_latest(run)
    # Bits depend on the thread count, so that of the beginning is taken, unless a person sets another.
    threads = 0 if "OMP_NUM_THREADS" in os.environ else read_json(run / "env.json")["threads"]
    with accepting(accept):
        _execute(recipe, run, compute=device.setup(threads=threads), listeners=listeners)
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


def _preflight(recipe: Recipe, root: Path) -> str:
    """Refuse before anything is created what can be seen to fail; returns what the run will need, in a line."""
    machine = plan.survey(root, probe=False)
    named = [(name, stage) for name, stage, _ in stages(recipe, root)]
    for _, stage in named:
        stage.check(machine)
    sums = plan.total(plan.estimate_all(named, machine), machine)
    plan.require(sums, machine, place=root)
    low, high = (seconds / 60 for seconds in sums.seconds)
    return (
        f"will take {low:.1f} to {high:.1f} min, {plan.size(sums.peak_bytes)} of memory, "
        f"{plan.size(sums.disk_bytes)} of disk (`plait plan` says more)"
    )


@contextlib.contextmanager
def _threads(count: int) -> Generator[None]:
    """Let every stage find the run's thread count where a person would set it."""
    before = os.environ.get("OMP_NUM_THREADS")
    os.environ["OMP_NUM_THREADS"] = str(count)
    try:
        yield
    finally:
        if before is None:
            del os.environ["OMP_NUM_THREADS"]
        else:
            os.environ["OMP_NUM_THREADS"] = before


def _execute(
    recipe: Recipe, run: Path, *, compute: device.Compute, listeners: Listeners, needs: str | None = None
) -> None:
    events = Events(run / "events.jsonl", listeners=listeners)
    with lock(run), _threads(compute.threads):
        if needs:
            events.note(f"{run.name} {needs}")
        events.note(f"{compute.device}; {'; '.join(compute.why)}", threads=compute.threads, dtype=compute.dtype)
        previous: Path | None = None
        for name, stage, folder in stages(recipe, run):
            if read_done(folder) is not None:
                _check_sealed(stage, previous, folder)
                events.emit("stage", f"{folder.name}: finished before", stage=name, state="skipped")
            else:
                try:
                    _execute_stage(name, stage, previous, folder=folder, events=events)
                finally:
                    _report(run, events)
            previous = folder


def _check_sealed(stage: Stage, previous: Path | None, folder: Path) -> None:
    """Refuse to build on a finished stage that other settings, or another stage before it, would have made.

    Raises:
        ConfigError: Says what differs.
    """
    remedy = f"put it back, or remove {folder.name} and what follows it, so that `plait resume` makes it again"
    made, wanted = _with_defaults(read_json(folder / "spec.json"), stage), stage.model_dump(mode="json")
    changed = [f"{k}: {made.get(k)} → {wanted.get(k)}" for k in sorted(made | wanted) if made.get(k) != wanted.get(k)]
    if changed:
        raise ConfigError(
            f"{folder.name} was made with other settings: {'; '.join(changed)}",
            place=str(folder.parent / "recipe.yaml"),
            remedy=remedy,
        )
    if previous is not None and (read_done(folder) or {}).get("made_from") != seal(previous):
        raise ConfigError(f"{folder.name} was made from another {previous.name}", place=str(folder), remedy=remedy)


def _with_defaults(made: dict[str, Any], stage: Stage) -> dict[str, Any]:
    """Settings of a finished stage; those that there were not yet when it was made are at their defaults."""
    try:
        return type(stage).model_validate(made).model_dump(mode="json")
    except ValidationError:  # a setting was taken away since, or means something else
        return made


def _report(run: Path, events: Events) -> None:
    """Write the page anew, also of a stage that failed; a page that cannot be written never costs the run."""
    try:
        write_report(run)
    except (PlaitError, OSError, ValueError) as fault:
        _log(events, "warning", f"report.html was not written: {fault}", record={"place": str(run / "report.html")})


def _execute_stage(name: str, stage: Stage, previous: Path | None, *, folder: Path, events: Events) -> None:
    again = folder.is_dir()
    folder.mkdir(exist_ok=True)
    write_json(folder / "spec.json", stage.model_dump(mode="json"))
    begun = time.monotonic()
    events.emit("stage", f"{folder.name}: {'continuing' if again else 'started'}", stage=name, state="started")
    try:
        stage.run(previous, folder, events=events)
    except KeyboardInterrupt as stop:
        number = stop.signal if isinstance(stop, Stopped) else signal.SIGINT
        text = (
            f"{folder.name}: stopped{f' ({stop})' if str(stop) else ''}; go on with `plait resume {folder.parent.name}`"
        )
        _log(events, "stopped", text, record={})
        raise Stopped(number, text) from stop
    except Exception as fault:
        record = fault.as_dict() if isinstance(fault, PlaitError) else {"cause": repr(fault)}
        trace = {"trace": traceback.format_exc()}
        _log(events, "error", f"{folder.name}: stopped by {type(fault).__name__}", record=record | trace)
        raise
    seconds = time.monotonic() - begun
    events.emit("stage", f"{folder.name}: done in {seconds:.1f} s", stage=name, state="done", seconds=round(seconds, 2))


def _log(events: Events, kind: str, text: str, *, record: Mapping[str, Any]) -> None:
    """Record why a stage ended; if even that cannot be written, the reason it ended matters more."""
    with contextlib.suppress(ResourceError):
        events.emit(kind, text, **record)
