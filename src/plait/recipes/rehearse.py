"""A recipe rehearsed in a folder: on a small part of its data, each phase of training stopped at for somebody to look.

``plait doctor gradients`` looks at what is about to train. Every phase is then trained for one step, so that the next
one begins from a model as it would be.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from plait.core.errors import ConfigError, ResourceError
from plait.core.events import Events
from plait.core.files import read_json, write_json
from plait.core.launch import free_port
from plait.core.spec import to_yaml
from plait.models.specs import Words
from plait.recipes.recipe import Recipe
from plait.recipes.run import stages
from plait.stages.align import Align
from plait.stages.data import Data
from plait.stages.pretrain import Pretrain
from plait.stages.stage import Stage
from plait.stages.tune import Tune

if TYPE_CHECKING:
    from plait.training.finding import Reference
    from plait.training.rehearsal import Asked
    from plait.training.settings import FitResult

TRAINS = (Pretrain, Tune, Align)
"""Kinds of stages that train."""

PICTURES = 96
"""Pictures of the rehearsal's data, at most."""

_TEST, _CANVASES, _PAIRS = 8, 8, 32
_PATIENCE_S = 1200.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Phase:
    """What is about to train.

    Attributes:
        stage: Name of the stage in the recipe.
        spec: Its settings, made small.
        name: Of the phase; "" where the stage has one alone.
        asked: Model, objective, batches.
        data: Folder of the data stage.
        folder: Where something may be kept about this phase.
    """

    stage: str
    spec: Stage
    name: str
    asked: Asked
    data: Path
    folder: Path

    @property
    def title(self) -> str:
        """For a person: ``tune: decoder``."""
        return f"{self.stage}: {self.name}" if self.name else self.stage


def small(recipe: Recipe, *, samples: int) -> Recipe:
    """The recipe with little data and small batches; everything that makes a step what it is stays.

    Args:
        recipe: As it would be run.
        samples: Of a batch of conversations; pairs of pictures and names are cheap, and are some more.
    """
    found = {name: _small_stage(stage, samples) for name, stage in recipe.stages.items() if isinstance(stage, TRAINS)}
    return recipe.model_copy(update={"data": _small_data(recipe.data), "stages": found})


def _small_data(data: Data) -> Data:
    source = data.source
    most = {"max_train": min(source.max_train or PICTURES, PICTURES), "max_test": min(source.max_test or _TEST, _TEST)}
    questions = data.questions.model_copy(
        update={
            "canvases": min(data.questions.canvases, _CANVASES),
            "test_canvases": min(data.questions.test_canvases, _CANVASES),
        }
    )
    return data.model_copy(update={"source": source.model_copy(update=most), "questions": questions})


def _small_stage(stage: Stage, samples: int) -> Stage:
    if isinstance(stage, Pretrain):
        learns = stage.qformer is not None or not isinstance(stage.image_tower, str)
        return stage.model_copy(
            update={"batch_size": min(stage.batch_size, samples if learns else _PAIRS), "save_every": 0}
        )
    if isinstance(stage, Tune):
        words = stage.words  # no setting of another connector
        if isinstance(stage.connector, Words):
            words = words.model_copy(update={"batch_size": min(words.batch_size, _PAIRS)})
        return stage.model_copy(update={"batch_size": min(stage.batch_size, samples), "words": words, "save_every": 0})
    assert isinstance(stage, Align)
    pairs = min(stage.batch_size, max(3, samples // 2))
    return stage.model_copy(
        update={"batch_size": pairs, "steps": min(stage.steps, 4), "test_pairs": 2, "save_every": 0}
    )


def rehearse(
    recipe: Recipe,
    run: Path,
    *,
    only: str = "",
    visit: Callable[[Phase], None],
    after: Callable[[str], None],
    events: Events,
) -> None:
    """Run the stages of a recipe up to the last one that trains, and look at each phase of training.

    Args:
        recipe: From :func:`small`.
        run: An empty folder.
        only: The one stage to look at; those before it are run without.
        visit: Called at each phase, before its one step.
        after: Called when a stage is done, with its name.
        events: Told what happens.

    Raises:
        ConfigError: There is no such stage, or none that trains.
        PlaitError: As the stages.
    """
    names = check_stage(recipe, only)
    (run / "recipe.yaml").write_text(to_yaml(recipe), encoding="utf-8")
    previous: Path | None = None
    data = Path()
    for name, stage, folder in stages(recipe, run):
        folder.mkdir()
        data = folder if previous is None else data
        if isinstance(stage, TRAINS):
            looked_at = visit if name in names else None
            _train(name, stage, previous, folder=folder, data=data, visit=looked_at, events=events)
            if name in names:
                after(name)
        else:
            stage.run(previous, folder, events=events)
        previous = folder
        if name == names[-1]:
            return


def check_stage(recipe: Recipe, only: str) -> list[str]:
    """Names of the stages to look at.

    Raises:
        ConfigError: There is none of that name that trains.
    """
    names = [name for name, stage in recipe.stages.items() if isinstance(stage, TRAINS)]
    if only and only not in names:
        raise ConfigError(
            f"no stage called {only!r} that trains", place="--stage", remedy=f"one of: {', '.join(names) or 'none'}"
        )
    if not names:
        raise ConfigError("no stage of this recipe trains", place=recipe.name, remedy="give it pretrain, tune or align")
    return [only] if only else names


def _train(
    name: str,
    stage: Stage,
    previous: Path | None,
    *,
    folder: Path,
    data: Path,
    visit: Callable[[Phase], None] | None,
    events: Events,
) -> None:
    from plait.training.loop import fit
    from plait.training.rehearsal import rehearsing

    def instead(asked: Asked) -> FitResult:
        phase = _phase(name, stage, asked, folder=folder, data=data)
        if visit is not None:
            phase.folder.mkdir(parents=True)
            _keep(phase, "before")
            visit(phase)
        result = fit(
            asked.model,
            asked.objective,
            asked.batches,
            settings=replace(asked.settings, steps=1, save_every=0, stopping=None),
            folder=asked.folder,
            events=asked.events,
            hooks=replace(asked.hooks, on_step=None, evaluate=None),
        )
        if visit is not None:
            _keep(phase, "after")
        return result

    with rehearsing(instead):
        stage.run(previous, folder, events=events)


def _phase(name: str, stage: Stage, asked: Asked, *, folder: Path, data: Path) -> Phase:
    phase = "" if asked.folder == folder else asked.folder.name
    kept = reference_folder(data.parent, name, phase)
    return Phase(stage=name, spec=stage, name=phase, asked=asked, data=data, folder=kept)


def reference_folder(run: Path, stage: str, phase: str) -> Path:
    """Where a rehearsal keeps what is known of one phase; stage and phase apart, since names of both may have dashes.

    Args:
        run: The rehearsal.
        stage: Name of the stage.
        phase: Of the phase; "" where the stage has one alone.
    """
    return run / "reference" / stage / (phase or "training")


def _keep(phase: Phase, when: str) -> None:
    """Write what trains, for processes that compute the same."""
    from plait.core.snapshot import save_tensors
    from plait.training.state import TrainState

    save_tensors(TrainState(phase.asked.model, phase.asked.objective).tensors(), phase.folder / f"{when}.safetensors")


def keep_reference(phase: Phase, reference: Reference) -> None:
    """Write the gradient that several processes are compared with."""
    from plait.core.snapshot import save_tensors

    found = {name: grad.contiguous() for name, grad in reference.gradient.of.items() if grad is not None}
    save_tensors(found, phase.folder / "gradient.safetensors")
    sums = reference.gradient.sums
    record = {
        "bounds": dict(reference.bounds),
        "dtype": str(reference.dtype).removeprefix("torch.") if reference.dtype is not None else None,
        "without": [name for name, grad in reference.gradient.of.items() if grad is None],
        "counts": dict(sums.counts),
    }
    write_json(phase.folder / "reference.json", record)


def expected_rate(phase: Phase) -> Callable[[str], float] | None:
    """The peak rate that the recipe gives each weight, by its name."""
    from plait.assembly.multimodal import holds_media

    spec = phase.spec
    if isinstance(spec, Pretrain | Align):
        return lambda _: spec.lr
    assert isinstance(spec, Tune)
    if phase.name == "words":
        return lambda _: spec.words.lr
    plain = spec.frozen.lr if phase.name == "connector" else spec.adapt.lr
    media = spec.frozen.lr if phase.name == "connector" else spec.adapt.lr_connector

    def rate(name: str) -> float:
        if spec.lr_gates and ".reads." in name and name.endswith("gate"):
            return spec.lr_gates
        return media if holds_media(name) else plain

    return rate


# --- several processes ---------------------------------------------------------------------------------------------


def in_processes(run: Path, stage: str, count: int, *, cores: int, events: Events) -> dict[str, Any]:
    """Let several processes that train together compute the same steps of one stage, and compare.

    Each is a new process, as `torchrun` would start it, which runs the stage again up to each phase.

    Args:
        run: Of :func:`rehearse`, where that stage is done.
        stage: Name of it.
        count: How many.
        cores: For all of them together.
        events: Told that they are at work.

    Returns:
        Phase → what :mod:`plait.recipes.rehearsed.rank` found.

    Raises:
        ResourceError: A process failed and said nothing that can be passed on, or took too long.
    """
    port = free_port()
    out = run / f"ranks-{stage}-{count}"
    out.mkdir()
    common = {"WORLD_SIZE": str(count), "LOCAL_WORLD_SIZE": str(count), "MASTER_ADDR": "127.0.0.1"}
    common |= {"MASTER_PORT": str(port), "OMP_NUM_THREADS": str(cores), "TORCH_CPP_LOG_LEVEL": "ERROR"}
    command = [sys.executable, "-m", "plait.recipes.rehearsed.rank", str(run), stage, str(out)]
    command.append(str(max(1, cores // count)))
    started: list[subprocess.Popen[bytes]] = []
    try:
        for rank in range(count):
            own = {"RANK": str(rank), "LOCAL_RANK": str(rank)}
            with (out / f"{rank}.log").open("wb") as log:
                path = os.pathsep.join(filter(None, [_SOURCE, os.environ.get("PYTHONPATH", "")]))
                environment = os.environ | common | own | {"PYTHONPATH": path}
                started.append(subprocess.Popen(command, stdout=log, stderr=log, env=environment))
        events.progress(f"{stage}: {count} processes", 0, 0)
        for process in started:
            process.wait(timeout=_PATIENCE_S)
    except subprocess.TimeoutExpired as error:
        raise ResourceError(
            f"{count} processes were not done after {_PATIENCE_S / 60:.0f} minutes",
            place=stage,
            remedy="choose fewer with --processes, or one stage with --stage",
        ) from error
    finally:
        for process in started:
            if process.poll() is None:
                process.kill()
                process.wait()
    result = out / "found.json"
    if not result.is_file():
        said = [(out / f"{rank}.log").read_text(errors="replace").strip() for rank in range(count)]
        last = next((text.splitlines()[-1] for text in said if text), "nothing")
        raise ResourceError(f"the processes ended without a result: {last}", place=stage, remedy="see docs/training.md")
    found: Mapping[str, Any] = read_json(result)
    return dict(found)


_SOURCE = str(Path(__file__).parents[2])


def read_reference(folder: Path) -> dict[str, Any]:
    """What :func:`keep_reference` wrote, without its tensors."""
    return json.loads((folder / "reference.json").read_text(encoding="utf-8"))
