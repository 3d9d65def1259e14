"""Runs beside each other, read from their folders alone: settings, machine, data, scores, curves, costs."""

from __future__ import annotations

import contextlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from plait.core.errors import PlaitError
from plait.core.yamltext import is_mapping, leaves, read_file
from plait.report.charts import Metrics, read_metrics
from plait.report.folder import RunFolder, StageFolder, number_of, records
from plait.report.scores import Score, read_scores

PHASES = ("words", "connector", "decoder")
"""Of a tune stage, in order."""

_MACHINE = ("plait", "python", "platform", "cores", "threads", "processes")


@dataclass(frozen=True, slots=True, kw_only=True)
class Cost:
    """What a stage took, as far as it came.

    Attributes:
        seconds: Work of all its attempts.
        steps: Updates of all its phases; 0 where nothing trains.
        tokens: That went through it; 0 if nobody counted.
        memory: Most bytes that were seen in use; 0 if nobody looked.
        disk: Bytes of its files.
    """

    seconds: float
    steps: int = 0
    tokens: int = 0
    memory: int = 0
    disk: int = 0


@dataclass(slots=True)
class Side:
    """One run in a comparison.

    Attributes:
        name: Of its folder; with as many folders above as it takes, where two are called alike.
        run: Everything of it.
        settings: Of its recipe, by dotted path; empty where it cannot be read.
        machine: Versions, threads and processes.
        data: Digest of the shards of each data stage, by stage.
        scores: By stage and name of the score.
        curves: Of each stage or phase that trained, by name: ``tune/decoder``.
        costs: By stage.
    """

    name: str
    run: RunFolder
    settings: dict[str, Any] = field(default_factory=dict[str, Any])
    machine: dict[str, str] = field(default_factory=dict[str, str])
    data: dict[str, str] = field(default_factory=dict[str, str])
    scores: dict[tuple[str, str], Score] = field(default_factory=dict[tuple[str, str], Score])
    curves: dict[str, Metrics] = field(default_factory=dict[str, Metrics])
    costs: dict[str, Cost] = field(default_factory=dict[str, Cost])


def read_sides(paths: Sequence[Path]) -> list[Side]:
    """Read runs; what cannot be read of one is a fault of its folder, and the rest takes part."""
    return [read_side(path, name=name) for path, name in zip(paths, _names(paths), strict=True)]


def _names(paths: Sequence[Path]) -> list[str]:
    """Each by the end of its path, as long as it takes to tell it from all others."""
    parts = [path.resolve().parts for path in paths]
    lengths = [1] * len(parts)
    while True:
        names = ["/".join(part[-length:]) for part, length in zip(parts, lengths, strict=True)]
        alike = [at for at, name in enumerate(names) if names.count(name) > 1 and lengths[at] < len(parts[at])]
        if not alike:
            return names
        for at in alike:
            lengths[at] += 1


def read_side(path: Path, *, name: str = "") -> Side:
    """Read one run."""
    run = RunFolder(path)
    side = Side(name or path.name, run)
    with contextlib.suppress(PlaitError):  # a fault of the folder already
        side.settings = {".".join(keys): value for keys, value in leaves(read_file(path / "recipe.yaml").plain())}
    side.machine = {key: str(run.env[key]) for key in _MACHINE if key in run.env}
    versions = run.env.get("versions")
    side.machine |= {str(k): str(v) for k, v in versions.items()} if is_mapping(versions) else {}
    for stage in run.stages:
        if isinstance(digest := stage.summary.get("shards_sha256"), str):
            side.data[stage.name] = digest
        for score in read_scores(run, stage.path / "scores.json"):
            side.scores[stage.name, score.name] = score
        found = curves_of(run, stage)
        side.curves |= found
        side.costs[stage.name] = _cost(run, stage, found)
    return side


def curves_of(run: RunFolder, stage: StageFolder) -> dict[str, Metrics]:
    """What each phase of a stage measured: ``tune/decoder``, or ``pretrain`` where it has no phases."""
    places = {stage.name: stage.path / "metrics.jsonl"}
    below = sorted(stage.path.glob("*/metrics.jsonl"), key=lambda path: _order(path.parent.name))
    places |= {f"{stage.name}/{path.parent.name}": path for path in below}
    found = {name: read_metrics(run, path) for name, path in places.items()}
    return {name: metrics for name, metrics in found.items() if metrics.records}


def predictions(side: Side, stage: str) -> list[dict[str, Any]]:
    """What a stage answered, record by record."""
    at = next((s for s in side.run.stages if s.name == stage), None)
    return [] if at is None else records(list(side.run.lines(at.path / "predictions.jsonl")))


def differing(sides: Sequence[Mapping[str, Any]]) -> dict[str, list[Any]]:
    """What is not the same in all: key → value in each; None where one has no such key."""
    keys = dict.fromkeys(key for side in sides for key in side)
    rows = {key: [side.get(key) for side in sides] for key in keys}
    return {key: values for key, values in rows.items() if any(value != values[0] for value in values)}


def last(metrics: Metrics, name: str) -> float | None:
    """The last value of a curve; None where there is none."""
    curve = metrics.curves.get(name)
    return curve.values[-1] if curve is not None and curve.values else None


def _order(phase: str) -> tuple[int, str]:
    return (PHASES.index(phase) if phase in PHASES else len(PHASES), phase)


def _cost(run: RunFolder, stage: StageFolder, curves: Mapping[str, Metrics]) -> Cost:
    values = [metrics.curves for metrics in curves.values()]
    memory = [max(found["memory_bytes"].values) for found in values if "memory_bytes" in found]
    return Cost(
        seconds=number_of(stage.seconds) or 0.0,
        steps=sum(int(max(found["loss"].steps)) for found in values if "loss" in found),
        tokens=sum(int(sum(found["tokens"].values)) for found in values if "tokens" in found),
        memory=int(max(memory, default=0)),
        disk=run.size(stage) if stage.path.is_dir() else 0,
    )
