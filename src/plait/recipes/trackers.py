"""Trackers that a recipe may name, as settings, and how each of their libraries is spoken to. Off by default.

What they are sent is what ``metrics.jsonl`` has; :mod:`plait.recipes.follower` sends it, in a process of its own.
"""

# The libraries' annotations are partial or missing, and most of them are not installed.
# pyright: reportMissingImports=false, reportMissingTypeStubs=false, reportUnknownMemberType=false
# pyright: reportUnknownVariableType=false, reportUnknownArgumentType=false, reportAttributeAccessIssue=false

from __future__ import annotations

import contextlib
import importlib.util
import os
import secrets
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal, Protocol, TypeAlias, runtime_checkable

from pydantic import Field, TypeAdapter

from plait.core.errors import ResourceError
from plait.core.spec import Spec


@dataclass(frozen=True, slots=True, kw_only=True)
class Told:
    """What a tracker is told of a run.

    Attributes:
        run: Its folder.
        id: What the tracker called it when it was first told; empty then.
        config: The recipe.
        keep: Told what the tracker calls the run, as soon as that is known: what fails later goes on with it.
    """

    run: Path
    id: str
    config: Mapping[str, Any]
    keep: Callable[[str], None]


@runtime_checkable
class Tracker(Protocol):
    """A run in a tracker, opened; its methods may raise anything, or never return."""

    id: str

    def log(self, stage: str, step: int, values: Mapping[str, float]) -> None:
        """One record of a stage or phase, such as ``tune/decoder``."""
        ...

    def scores(self, stage: str, values: Mapping[str, float]) -> None:
        """Final scores of a stage."""
        ...

    def flush(self) -> None:
        """See that what was logged is kept."""
        ...

    def finish(self) -> None:
        """No more comes for now."""
        ...


class _Tracker(Spec):
    package: ClassVar[str]
    """Import name of its library."""
    purges: ClassVar[bool] = False
    """Whether what is sent again takes the place of what was sent before."""
    queues: ClassVar[bool] = False
    """Whether its library only queues what it is given, until it is closed."""

    @property
    def name(self) -> str:
        """Its kind, as extras and files are called."""
        return str(getattr(self, "kind", ""))

    def check(self, *, place: str = "trackers") -> None:
        """See that its library is installed.

        Raises:
            ResourceError: It is not.
        """
        if importlib.util.find_spec(self.package) is None:
            raise ResourceError(
                f"the tracker {self.name} needs the package {self.package}, which is not installed",
                place=place,
                remedy=f"pip install 'plait[{self.name}]', or take the tracker out",
            )

    def open(self, told: Told) -> Tracker:
        """Begin a run there, or go on with it."""
        raise NotImplementedError


class TensorBoard(_Tracker):
    """Event files in the run folder's `tensorboard/`: `tensorboard --logdir runs/latest/tensorboard`."""

    package: ClassVar[str] = "tensorboard"
    purges: ClassVar[bool] = True
    kind: Literal["tensorboard"] = "tensorboard"
    """TensorBoard."""

    def open(self, told: Told) -> Tracker:
        """Of the folder."""
        return _Board(told)


class Wandb(_Tracker):
    """Weights & Biases."""

    package: ClassVar[str] = "wandb"
    queues: ClassVar[bool] = True
    kind: Literal["wandb"] = "wandb"
    """Weights & Biases."""
    project: str = "plait"
    """Project that the run is put into."""
    entity: str = ""
    """User or team; empty: the default one of the account."""
    mode: Literal["offline", "online"] = "offline"
    """`offline` writes into the run folder's `wandb/`, which `wandb sync` sends later; `online` sends at once."""

    def open(self, told: Told) -> Tracker:
        """Of the account that is logged in, or offline."""
        return _Wandb(self, told)


class Mlflow(_Tracker):
    """MLflow."""

    package: ClassVar[str] = "mlflow"
    kind: Literal["mlflow"] = "mlflow"
    """MLflow."""
    uri: str = ""
    """Address of a tracking server; empty: a database in the run folder, `mlflow.db`."""
    experiment: str = "plait"
    """Experiment that the run is put into."""

    def open(self, told: Told) -> Tracker:
        """Of a server or a file."""
        return _Mlflow(self, told)


class Trackio(_Tracker):
    """Trackio, Hugging Face's local tracker."""

    package: ClassVar[str] = "trackio"
    queues: ClassVar[bool] = True
    kind: Literal["trackio"] = "trackio"
    """Trackio."""
    project: str = "plait"
    """Project that the run is put into."""

    def open(self, told: Told) -> Tracker:
        """Of this machine."""
        return _Trackio(self, told)


AnyTracker: TypeAlias = Annotated[TensorBoard | Wandb | Mlflow | Trackio, Field(discriminator="kind")]
"""Every tracker that a recipe may name."""

READS: TypeAdapter[TensorBoard | Wandb | Mlflow | Trackio] = TypeAdapter(AnyTracker)
"""A tracker's settings from plain data."""


class _Board:
    """One folder for each stage and phase, as TensorBoard compares runs."""

    def __init__(self, told: Told) -> None:
        from torch.utils.tensorboard import SummaryWriter

        self.id = "tensorboard"
        self._new: Callable[..., Any] = SummaryWriter
        self._root = told.run / "tensorboard"
        self._writers: dict[str, Any] = {}
        self._steps: dict[str, int] = {}
        if not told.id:
            writer = SummaryWriter(str(self._root))
            writer.add_text("recipe", "\n".join(f"    {k}: {v}" for k, v in flat(told.config).items()))
            writer.close()

    def log(self, stage: str, step: int, values: Mapping[str, float]) -> None:
        """Records of these steps that are there already are hidden by those that come."""
        if step <= self._steps.get(stage, 0):
            self._writers.pop(stage).close()
        if stage not in self._writers:
            self._writers[stage] = self._new(str(self._root / stage), purge_step=step)
        self._steps[stage] = step
        for name, value in values.items():
            self._writers[stage].add_scalar(name, value, step)

    def scores(self, stage: str, values: Mapping[str, float]) -> None:
        """Each a point at step 0."""
        writer = self._new(str(self._root / stage / "scores"), purge_step=0)
        for name, value in values.items():
            writer.add_scalar(name, value, 0)
        writer.close()

    def flush(self) -> None:
        """Onto the disk."""
        for writer in self._writers.values():
            writer.flush()

    def finish(self) -> None:
        """Close the files, each, whatever becomes of the others."""
        with contextlib.ExitStack() as stack:
            for writer in self._writers.values():
                stack.callback(writer.close)


class _Wandb:
    def __init__(self, spec: Wandb, told: Told) -> None:
        import wandb

        self.id = told.id or secrets.token_hex(4)
        told.keep(self.id)
        self._stages: set[str] = set()
        self._run = wandb.init(
            project=spec.project,
            entity=spec.entity or None,
            name=told.run.name,
            id=self.id,
            resume="allow",
            mode=spec.mode,
            dir=str(told.run),
            config=dict(told.config),
        )

    def log(self, stage: str, step: int, values: Mapping[str, float]) -> None:
        if stage not in self._stages:
            self._run.define_metric(f"{stage}/step")
            self._run.define_metric(f"{stage}/*", step_metric=f"{stage}/step")
            self._stages.add(stage)
        self._run.log({f"{stage}/{name}": value for name, value in values.items()} | {f"{stage}/step": step})

    def scores(self, stage: str, values: Mapping[str, float]) -> None:
        for name, value in values.items():
            self._run.summary[f"scores/{stage}/{name}"] = value

    def flush(self) -> None:
        """Its own process writes."""

    def finish(self) -> None:
        self._run.finish()


_PARAMS = 100
"""As many a server of MLflow takes at once."""


class _Mlflow:
    def __init__(self, spec: Mlflow, told: Told) -> None:
        os.environ.setdefault("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "1")  # the follower tries again
        os.environ.setdefault("MLFLOW_HTTP_REQUEST_TIMEOUT", "10")
        from mlflow import MlflowClient
        from mlflow.entities import Param

        where = spec.uri or f"sqlite:///{told.run / 'mlflow.db'}"
        self._client = MlflowClient(tracking_uri=where)
        self.id = told.id or self._begin(spec, told)
        self._client.update_run(self.id, status="RUNNING")
        there = self._client.get_run(self.id).data.params
        values = {name: str(value)[:500] for name, value in flat(told.config).items() if name not in there}
        params = [Param(name, value) for name, value in values.items()]
        for at in range(0, len(params), _PARAMS):
            self._client.log_batch(self.id, params=params[at : at + _PARAMS])

    def _begin(self, spec: Mlflow, told: Told) -> str:
        found = self._client.get_experiment_by_name(spec.experiment)
        folder = None if spec.uri else (told.run / "mlflow").as_uri()
        experiment = found.experiment_id if found else self._client.create_experiment(spec.experiment, folder)
        name = str(self._client.create_run(experiment, run_name=told.run.name).info.run_id)
        told.keep(name)
        return name

    def log(self, stage: str, step: int, values: Mapping[str, float]) -> None:
        from mlflow.entities import Metric

        now = int(time.time() * 1000)
        self._client.log_batch(self.id, metrics=[Metric(f"{stage}/{k}", v, now, step) for k, v in values.items()])

    def scores(self, stage: str, values: Mapping[str, float]) -> None:
        self.log(f"scores/{stage}", 0, values)

    def flush(self) -> None:
        """Each call is kept."""

    def finish(self) -> None:
        self._client.set_terminated(self.id)


class _Trackio:
    def __init__(self, spec: Trackio, told: Told) -> None:
        import trackio

        self.id = told.id or f"{told.run.name}-{secrets.token_hex(3)}"  # names are all that tells its runs apart
        told.keep(self.id)
        config = {name: value for name, value in flat(told.config).items() if not name.startswith("_")}
        self._run = trackio.init(project=spec.project, name=self.id, config=config, resume="allow", embed=False)

    def log(self, stage: str, step: int, values: Mapping[str, float]) -> None:
        self._run.log({f"{stage}/{name}": value for name, value in values.items()} | {f"{stage}/step": step}, step=step)

    def scores(self, stage: str, values: Mapping[str, float]) -> None:
        self._run.log({f"scores/{stage}/{name}": value for name, value in values.items()})

    def flush(self) -> None:
        """Its own thread writes."""

    def finish(self) -> None:
        self._run.finish()


def flat(value: Mapping[str, Any], before: str = "") -> dict[str, Any]:
    """Nested settings under dotted names."""
    found: dict[str, Any] = {}
    for key, inner in value.items():
        found |= flat(inner, f"{before}{key}.") if isinstance(inner, Mapping) and inner else {f"{before}{key}": inner}
    return found
