"""A sweep's folder: trials as run folders that share the stages before what is searched, their results, the table."""

from __future__ import annotations

import csv
import io
import json
import os
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from plait.core import held_out
from plait.core.errors import DataError
from plait.core.files import fsync_dir, read_done, read_json, seal, stage_folder, write_atomic, write_json
from plait.core.spec import Resolved
from plait.recipes.jobs import ENV
from plait.recipes.recipe import Recipe
from plait.recipes.search.draw import Trial
from plait.recipes.search.sweep import Sweep

SWEEP = "sweep.yaml"
BASE = "base.yaml"
BEST = "best.yaml"
TABLE = "sweep.csv"
ACCESS = "test_access.json"
"""The test splits that the last run reads, and for which trial; written before it reads them."""

_VALUES = "trial.json"
_RESULT = "result.json"
_WHY = "a trial of a sweep: test splits are read once, by the run of the best settings"


def trial_folder(sweep: Path, number: int) -> Path:
    """``sweeps/x-0001/trials/trial-0003``."""
    return sweep / "trials" / f"trial-{number:04d}"


def make_run(
    folder: Path,
    recipe: Resolved[Recipe],
    env: Mapping[str, Any],
    *,
    files: Mapping[str, Any],
    shared: Sequence[Path] = (),
    begun: Sequence[Path] = (),
    shut: bool = True,
) -> Path:
    """Create a run folder with everything it is born with, or leave the one that is there.

    Only whoever has the sweep's lock makes runs, so that what another process began to make is left over from a kill.

    Args:
        folder: Of the run.
        recipe: Its recipe.
        env: Versions, threads and processes.
        files: JSON files beside the recipe.
        shared: Finished stages of another run; hard links, since nobody writes to a finished stage.
        begun: Stages of another run that go on: copied without their seals, so that they are judged again.
        shut: Keep test splits shut.
    """
    for left in folder.parent.glob(f".{folder.name}.*.tmp"):
        shutil.rmtree(left, ignore_errors=True)
    if folder.is_dir():
        return folder
    temp = folder.with_name(f".{folder.name}.{os.getpid()}.tmp")
    temp.mkdir(parents=True)
    write_atomic(temp / "recipe.yaml", recipe.to_yaml())
    write_json(temp / ENV, env)
    for name, content in (dict(files) | ({held_out.MARK: {"why": _WHY}} if shut else {})).items():
        write_json(temp / name, content)
    for stage in shared:
        _link(stage, temp / stage.name)
    for stage in begun:
        shutil.copytree(stage, temp / stage.name, ignore=shutil.ignore_patterns("done.json"))
    temp.rename(folder)
    fsync_dir(folder.parent)
    return folder


def _link(stage: Path, target: Path) -> None:
    """A finished stage in another run; copied where the file system has no hard links.

    Raises:
        DataError: It is not finished, or a file went missing on the way.
    """
    before = seal(stage)

    def copy(source: str, to: str) -> None:
        try:
            os.link(source, to)
        except OSError:
            shutil.copy2(source, to)

    shutil.copytree(stage, target, copy_function=copy)
    sizes = [
        {p.relative_to(at).as_posix(): p.stat().st_size for p in at.rglob("*") if p.is_file()} for at in (stage, target)
    ]
    if sizes[0] != sizes[1] or seal(target) != before:
        raise DataError(
            "the stage changed while it was shared", place=str(stage), remedy="let nobody write to it, and resume"
        )


def stage_folders(run: Path, names: Sequence[str]) -> list[Path]:
    """Folders of a run's first stages, the data stage first."""
    return [stage_folder(run, at, name) for at, name in enumerate(names, 1)]


def drawn(run: Path) -> dict[str, Any] | None:
    """Settings of a trial that was begun; None where there is none."""
    return read_json(run / _VALUES)["values"] if (run / _VALUES).is_file() else None


def drawn_file(number: int, values: Mapping[str, Any]) -> dict[str, Any]:
    """What a trial is born with."""
    return {_VALUES: {"number": number, "values": dict(values)}}


def keep(sweep: Path, trial: Trial) -> None:
    """Write down how a trial ended."""
    names = ("number", "values", "state", "value", "step", "reached", "rungs", "error")
    folder = trial_folder(sweep, trial.number)
    folder.mkdir(parents=True, exist_ok=True)
    write_json(folder / _RESULT, {name: getattr(trial, name) for name in names})


def read_trials(sweep: Path) -> list[Trial]:
    """All trials that ended, in order; up to the first that did not."""
    found: list[Trial] = []
    while (path := trial_folder(sweep, len(found)) / _RESULT).is_file():
        found.append(Trial(**read_json(path)))
    return found


def write_table(path: Path, sweep: Sweep, trials: Sequence[Trial]) -> None:
    """``sweep.csv``: a row for each trial; nothing in it depends on time."""
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(["trial", "state", "value", "step", *sweep.search, "error"])
    for trial in trials:
        values = [json.dumps(trial.values.get(key), ensure_ascii=False) for key in sweep.search]
        value = "" if trial.value is None else repr(trial.value)
        writer.writerow([trial.number, trial.state, value, trial.step or "", *values, trial.error])
    write_atomic(path, text.getvalue())


def test_splits(run: Path) -> list[str]:
    """Test splits that the data stage of a run made."""
    done = read_done(stage_folder(run, 1, "data"))
    splits = (done or {}).get("summary", {}).get("splits", {})
    return [split for split in splits if held_out.is_test(split)]
