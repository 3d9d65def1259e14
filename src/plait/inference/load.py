"""What a person names to a model that can be asked: a run, a stage, a checkpoint, a folder of Hugging Face's.

Imports nothing heavy by itself.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

from plait.core.errors import CheckpointError, DataError, PlaitError, UsageError
from plait.core.events import Event, Events
from plait.core.files import RUNS, find_model, find_run, find_stage, read_done

if TYPE_CHECKING:
    from plait.assembly.dual import Dual
    from plait.assembly.multimodal import Multimodal
    from plait.assembly.views import ViewModel
    from plait.assembly.vlm import Vlm

_PLAIT, _RECIPE, _HUB = "plait.json", "recipe.yaml", "config.json"


def find_model_folder(name: str, root: Path = RUNS) -> Path:
    """Folder of the model that a name means.

    Args:
        name: A run (``latest``, ``runs/latest``, ``quickstart-0007``: its newest finished stage that made a model), the
            folder of a finished stage, of a checkpoint, or of a vision-language model in Hugging Face's layout.
        root: Where run folders are.

    Raises:
        UsageError: No such run or folder.
        CheckpointError: It holds no multimodal model; says which stages there are.
    """
    given = Path(name)
    if (given / _PLAIT).is_file():
        return given.resolve()
    if (given / "done.json").is_file():
        return _model_of([given.resolve()])
    if (given / _HUB).is_file() and not (given / _RECIPE).is_file():
        return given.resolve()
    if given.is_dir() and not (given / _RECIPE).is_file() and not (root / name / _RECIPE).is_file():
        raise UsageError(
            f"this folder is no run ({_RECIPE}), no finished stage (done.json) and no model ({_PLAIT}, or {_HUB} of "
            "Hugging Face)",
            place=str(given),
            remedy="give a run such as runs/latest, or the folder of a checkpoint",
        )
    run = find_run(name, root)
    try:
        return _model_of(_stages(run))
    except CheckpointError as error:
        if other := _newest_with_model(run):
            error.remedy += f"; {other.name} has a model: name it instead"
        raise


def _newest_with_model(beside: Path) -> Path | None:
    """The run that was made last, in the same folder, of those with a model."""
    runs = {path.parent for path in beside.parent.glob(f"*/{_RECIPE}") if not path.parent.is_symlink()}
    for run in sorted(runs - {beside}, key=lambda path: path.stat().st_mtime, reverse=True):
        with contextlib.suppress(PlaitError):  # what is wrong with a neighbor is not the fault that is told
            _model_of(_stages(run))
            return run
    return None


def _stages(run: Path) -> list[Path]:
    return sorted(folder for folder in run.glob("[0-9][0-9]-*") if folder.is_dir())


def find_dual_folder(name: str, root: Path = RUNS) -> Path:
    """Folder of the dual encoder that a name means.

    Args:
        name: A run (its pretrain stage), the folder of a pretrain stage, or of a checkpoint.
        root: Where run folders are.

    Raises:
        UsageError: No such run or folder.
        CheckpointError: It has no finished pretrain stage.
    """
    given = Path(name)
    if (given / _PLAIT).is_file():
        return given.resolve()
    stages = [given.resolve()] if (given / "done.json").is_file() else _stages(find_run(name, root))
    finished = [folder for folder in stages if read_done(folder) is not None]
    try:
        stage = find_stage(finished[-1] if finished else None, "pretrain")
    except DataError as error:
        raise CheckpointError(
            "there is no finished pretrain stage, which makes a model that embeds pictures and texts",
            place=str(stages[0].parent) if stages else name,
            remedy="run a recipe with a pretrain stage, or give the folder of its checkpoint",
        ) from error
    done = read_done(stage)
    assert done is not None
    return stage / str(done["summary"]["checkpoint"])


def model_name(folder: Path) -> str:
    """What a model is called: the name of its run, or of its folder where it is in none."""
    run = next((parent for parent in folder.parents if (parent / _RECIPE).is_file()), folder)
    return run.name


def load(folder: Path, *, say: Callable[[str], None]) -> Multimodal | Vlm:
    """Load a model in eval mode, with torch's thread count set for this machine.

    A folder with a ``plait.json`` is one of ours, any other a vision-language model of Hugging Face, unchanged.

    Args:
        folder: As :func:`find_model_folder` gives it.
        say: Told in a line what takes long (a one-time conversion).

    Raises:
        CheckpointError: A file is missing or damaged, tower and decoder are not those it was trained with, or a folder
            of Hugging Face's is of no family that is known.
        ResourceError: A package is not fetched.
    """
    from plait.assembly.multimodal import load_multimodal
    from plait.core import device

    device.setup()
    if not (folder / _PLAIT).is_file():
        from plait.assembly.vlm import load_vlm

        return load_vlm(folder)
    return load_multimodal(folder, events=_listening(say))


def load_dual(folder: Path, *, say: Callable[[str], None]) -> Dual | ViewModel:
    """Load a dual encoder, or a tower that learned from views, in eval mode, with torch's threads set for this machine.

    Args:
        folder: As :func:`find_dual_folder` gives it.
        say: Told in a line what takes long (a one-time conversion).

    Raises:
        CheckpointError: It holds another kind of model, is damaged, or its towers are others now.
        ResourceError: A package is not fetched.
    """
    from plait.assembly.dual import load_dual as loaded
    from plait.assembly.views import holds_views, load_views
    from plait.core import device

    device.setup()
    if holds_views(folder):
        return load_views(folder)
    return loaded(folder, events=_listening(say))


def _listening(say: Callable[[str], None]) -> Events:
    def listen(event: Event) -> None:
        if event.kind in ("note", "warning"):
            say(event.text)

    return Events(None, listeners=(listen,))


def _model_of(stages: list[Path]) -> Path:
    """Model of the last finished of these stages, or of the nearest one before it."""
    finished = [folder for folder in stages if read_done(folder) is not None]
    try:
        return find_model(finished[-1] if finished else None)
    except DataError as error:
        states = [f"{folder.name} ({'finished' if folder in finished else 'not finished'})" for folder in stages]
        raise CheckpointError(
            f"no finished stage here made a multimodal model; there is {', '.join(states) or 'no stage'}",
            place=str(stages[0].parent) if stages else "",
            remedy="let the run get past 'tune' (`plait resume`), or give the folder of a checkpoint"
            + ("; `plait embed` takes what 'pretrain' made" if any("pretrain" in f.name for f in finished) else ""),
        ) from error
