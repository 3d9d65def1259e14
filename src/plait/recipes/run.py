"""Run a recipe: each stage into its folder, in order; a sealed stage is never run twice.

Several processes (``torchrun``) run it together. The first one has the run folder; another one keeps what it writes in
``ranks/<number>/``, and reads the first one's finished stages.
"""

from __future__ import annotations

import contextlib
import functools
import json
import os
import platform
import signal
import sys
import threading
import time
import traceback
from collections.abc import Callable, Generator, Mapping, Sequence
from importlib import metadata
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from plait import __version__
from plait.core import device, held_out
from plait.core.errors import ConfigError, PlaitError, ResourceError, Stopped
from plait.core.events import Event, Events
from plait.core.files import (
    RUNS,
    disk_error,
    lock,
    new_run,
    point_latest,
    read_done,
    read_json,
    seal,
    stage_folder,
    write_json,
)
from plait.core.launch import Launch, first, launched, launches, own_share, place, processes, together
from plait.recipes.jobs import ENV, begun, job
from plait.recipes.recipe import Recipe, load_recipe
from plait.recipes.refusals import check_shares, refusals
from plait.recipes.tracking import Beside, tracking
from plait.report.page import write_report
from plait.stages.stage import Stage
from plait.training import plan
from plait.training.peak_rate import keeping_rates

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
        The run folder. Processes that torchrun starts again go on with the one they had begun.

    Raises:
        ConfigError: The recipe or an override is wrong; nothing was created.
        ResourceError: Disk, a package or a device is missing; nothing was created.
        Stopped: Ctrl-C or SIGTERM; what is finished is kept.
    """
    with together():
        made: list[device.Compute] = []
        told = first(functools.partial(_begin, recipe, overrides, root, started=launches(), made=made))
        run = Path(told["run"])
        if told["again"]:
            _go_on(run, listeners=listeners, said=told["said"])
        else:
            compute = made[0] if made else _setup(run)
            spec = load_recipe(str(run / "recipe.yaml")).spec
            _execute(spec, run, compute=compute, listeners=listeners, said=told["said"])
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
    with together():
        run = Path(first(lambda: str(run.absolute()))) if launched() else run
        _go_on(run, accept=accept, listeners=listeners)
    return run


def stages(recipe: Recipe, run: Path) -> list[tuple[str, Stage, Path]]:
    """Name, spec and folder of every stage, in order."""
    named: list[tuple[str, Stage]] = [("data", recipe.data), *recipe.stages.items()]
    return [(name, stage, stage_folder(run, number, name)) for number, (name, stage) in enumerate(named, 1)]


def check_first(recipe: Recipe, root: Path) -> str:
    """Refuse, before anything is created, a run that can be seen to fail; returns what it will need, in a line.

    Args:
        recipe: Of the run.
        root: Where it is to be.

    Raises:
        PlaitError: A setting cannot work, or disk, memory, a package or a device is missing.
    """
    return _preflight(recipe, root)


def usual_threads() -> int:
    """Threads that a run begun now works with."""
    return _setup().threads


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


def _begin(
    recipe: str, overrides: Sequence[str], root: Path, *, started: Sequence[Launch], made: list[device.Compute]
) -> dict[str, Any]:
    """Create the run folder, or find the one that this command created before it was started again.

    Args:
        recipe: As given.
        overrides: As given.
        root: Where runs go.
        started: Who started the processes.
        made: Takes what a new run is worked on with.

    Returns:
        The folder as ``run``; whether it was begun before as ``again``; and what to say of it as ``said``.
    """
    run = begun(root, started, recipe=recipe, overrides=overrides)
    if run is not None:
        said = f"started again by torchrun: going on with {run.name}"
        if not _same_recipe(recipe, overrides, run):
            said += f", by the recipe in its folder; {recipe} has changed since"
        return {"run": str(run.absolute()), "again": True, "said": said}
    resolved = load_recipe(recipe, overrides)
    needs = _preflight(resolved.spec, root)
    compute = _setup()
    env = environment() | {"threads": compute.threads, "processes": processes()}
    env |= job(started, recipe=recipe, overrides=overrides)
    contents = {"recipe.yaml": resolved.to_yaml(), ENV: json.dumps(env, indent=2) + "\n"}
    run = new_run(resolved.spec.name, root, contents=contents)
    made.append(compute)
    return {"run": str(run.absolute() if launched() else run), "again": False, "said": f"{run.name} {needs}"}


def _same_recipe(recipe: str, overrides: Sequence[str], run: Path) -> bool:
    try:
        return load_recipe(recipe, overrides).to_yaml() == (run / "recipe.yaml").read_text(encoding="utf-8")
    except (PlaitError, OSError):
        return False


def _go_on(run: Path, *, accept: Sequence[str] = (), listeners: Listeners, said: str = "") -> None:
    from plait.training.checkpoint import accepting  # imports torch

    recipe = load_recipe(str(run / "recipe.yaml")).spec
    check_shares(recipe, processes())
    if not place():
        point_latest(run)
    with accepting(accept):
        _execute(recipe, run, compute=_setup(run), listeners=listeners, said=said)


def _setup(run: Path | None = None) -> device.Compute:
    """Device, number format and threads.

    Bits depend on the thread count, so that of the beginning is taken, unless a person sets another.
    """
    threads = 0
    if "OMP_NUM_THREADS" not in os.environ:
        if run is not None:
            threads = read_json(run / ENV)["threads"]
        elif launched():
            threads = own_share(device.usable_cores())
    return device.setup(threads=threads)


def _preflight(recipe: Recipe, root: Path) -> str:
    """Refuse before anything is created what can be seen to fail; returns what the run will need, in a line."""
    machine = plan.survey(root, probe=False, processes=processes())
    for fault in refusals(recipe, machine):
        raise fault
    named = [(name, stage) for name, stage, _ in stages(recipe, root)]
    sums = plan.total(plan.estimate_all(named, machine), machine)
    plan.require(sums, machine, place=root)
    low, high = (seconds / 60 for seconds in sums.seconds)
    each = f" in each of {processes()} processes at most" if launched() else ""
    alone = "; times are for one process" if launched() else ""
    return (
        f"will take {low:.1f} to {high:.1f} min, {plan.size(sums.peak_bytes)} of memory{each}, "
        f"{plan.size(sums.disk_bytes + sums.spare_bytes)} of disk (`plait plan` says more{alone})"
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


def _execute(recipe: Recipe, run: Path, *, compute: device.Compute, listeners: Listeners, said: str = "") -> None:
    own = run / "ranks" / str(place()) if place() else run
    try:
        own.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise disk_error(error, own) from error
    events = Events(own / "events.jsonl", listeners=listeners)
    trackers = [] if place() else [Beside.of(run, name=t.name, settings=t.model_dump_json()) for t in recipe.trackers]
    with (
        contextlib.nullcontext() if place() else lock(run),
        _threads(compute.threads),
        keeping_rates(run),
        tracking(run, trackers, events=events),
    ):
        if said:
            events.note(said)
        who = f"process {place()} of {processes()}; " if place() else f"{processes()} processes; " if launched() else ""
        events.note(
            f"{who}{compute.device}; {'; '.join(compute.why)}",
            threads=compute.threads,
            dtype=compute.dtype,
            processes=processes(),
        )
        if held_out.shut_in(run):
            events.note("test splits stay shut: this is a trial of a sweep, nothing is scored or shown of them")
        previous: Path | None = None
        for name, stage, folder in stages(recipe, run):
            if not first(functools.partial(_finished, name, stage, previous, folder=folder, events=events)):
                work = functools.partial(
                    _execute_stage, name, stage, previous, folder=own / folder.name, run=run, events=events
                )
                if stage.together:
                    work()
                else:
                    first(work)
            previous = folder
        first(lambda: None)  # who is done sooner waits


def _finished(name: str, stage: Stage, previous: Path | None, *, folder: Path, events: Events) -> bool:
    """Whether a stage is sealed, and made as the recipe says."""
    if read_done(folder) is None:
        return False
    _check_sealed(stage, previous, folder)
    events.emit("stage", f"{folder.name}: finished before", stage=name, state="skipped")
    return True


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


def _execute_stage(name: str, stage: Stage, previous: Path | None, *, folder: Path, run: Path, events: Events) -> None:
    again = folder.is_dir()
    folder.mkdir(exist_ok=True)
    write_json(folder / "spec.json", stage.model_dump(mode="json"))
    begun = time.monotonic()
    alone = " by process 0 alone, the others wait" if launched() and not stage.together else ""
    events.emit("stage", f"{folder.name}: {'continuing' if again else 'started'}{alone}", stage=name, state="started")
    try:
        with held_out.shut(when=previous is not None and held_out.shut_in(run)):
            stage.run(previous, folder, events=events)
    except KeyboardInterrupt as stop:
        if (fault := _cause(stop)) is not None:
            _failed(fault, folder, events)
            raise fault from stop
        number = stop.signal if isinstance(stop, Stopped) else signal.SIGINT
        text = f"{folder.name}: stopped{f' ({stop})' if str(stop) else ''}; go on with `plait resume {run.name}`"
        _log(events, "stopped", text, record={})
        raise Stopped(number, text) from stop
    except Exception as fault:
        _failed(fault, folder, events)
        raise
    else:
        seconds = time.monotonic() - begun
        text = f"{folder.name}: done in {seconds:.1f} s"
        events.emit("stage", text, stage=name, state="done", seconds=round(seconds, 2))
    finally:
        if not place():
            _report(run, events)


def _cause(stop: KeyboardInterrupt) -> PlaitError | None:
    """The fault of another process, if it is why this one was stopped."""
    if not launched():
        return None
    from plait.core import mesh

    fault = mesh.cause_of(stop)
    return fault if isinstance(fault, PlaitError) else None


def _failed(fault: Exception, folder: Path, events: Events) -> None:
    if launched() and threading.current_thread() is threading.main_thread():
        # The launcher stops all processes once one has failed: let this one say why before it ends.
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
    record = fault.as_dict() if isinstance(fault, PlaitError) else {"cause": repr(fault)}
    trace = {"trace": "".join(traceback.format_exception(fault))}
    _log(events, "error", f"{folder.name}: stopped by {type(fault).__name__}", record=record | trace)


def _log(events: Events, kind: str, text: str, *, record: Mapping[str, Any]) -> None:
    """Record why a stage ended; if even that cannot be written, the reason it ended matters more."""
    with contextlib.suppress(ResourceError):
        events.emit(kind, text, **record)
