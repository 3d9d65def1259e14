"""Runs as lines of a terminal and as plain data: one in depth, or several beside each other."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from plait.report.compare_page import Comparison, Difference
    from plait.report.scores import Score
    from plait.report.sides import Side

_LOUD = 10  # warnings shown one by one; the rest are counted
_CELL = 44  # letters of a setting in a table
_LAST = ("loss", "evaluation", "lr", "grad_norm", "samples_per_s")


def aligned(rows: Sequence[Sequence[str]]) -> list[str]:
    """Rows as columns, the first to the left; nothing for no rows."""
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))] if rows else []
    lines = ("  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)) for row in rows)
    return [line.rstrip() for line in lines]


def show_run(side: Side) -> tuple[list[str], dict[str, Any]]:
    """One run in depth: lines, and the same as plain data."""
    from plait.report.markup import duration, mebibytes
    from plait.report.sides import last

    run = side.run
    lines = [f"{side.name}: {run.state}; recipe {run.recipe}, seed {run.seed}", f"  {run.path}", ""]
    stages = [["stage", "state", "starts", "time", "steps", "tokens", "memory", "disk"]]
    for stage in run.stages:
        cost = side.costs[stage.name]
        begun = stage.state != "waiting"
        counts = [f"{cost.steps:,}" if cost.steps else "-", f"{cost.tokens:,}" if cost.tokens else "-"]
        sizes = [mebibytes(size) if size else "-" for size in (cost.memory, cost.disk)]
        spent = [str(stage.attempts), duration(cost.seconds)] if begun else ["-", "-"]
        stages.append([stage.path.name, stage.state, *spent, *counts, *sizes])
    total = [duration(sum(c.seconds for c in side.costs.values())), mebibytes(sum(c.disk for c in side.costs.values()))]
    lines += [*aligned(stages), f"in all {total[0]}, {total[1]} on disk"]
    lines += [f"{stage.path.name} ended: {stage.stop}" for stage in run.stages if stage.state != "done" and stage.stop]
    metrics = [["last of", "step", *_LAST]]
    for name, found in side.curves.items():
        steps = found.curves["loss"].steps[-1:] if "loss" in found.curves else []
        values = [last(found, what) for what in _LAST]
        shown = ["-" if value is None else f"{value:.4g}" for value in values]
        metrics.append([name, f"{int(steps[0]):,}" if len(steps) else "-", *shown])
    lines += ["", *aligned(metrics)] if len(metrics) > 1 else []
    scores = [[stage, name, score_text(score), f"{score.n:,}"] for (stage, name), score in side.scores.items()]
    lines += ["", *aligned([["stage", "score", "value, 95 % interval", "n"], *scores])] if scores else []
    kept = _checkpoints(side)
    lines += ["", *(f"checkpoints  {name}: {', '.join(steps)}" for name, steps in kept.items())] if kept else []
    loud = [event for event in run.events if event.get("kind") in ("warning", "error")]
    said = [str(event.get("text", "")) for event in loud]
    if len(said) > _LOUD:
        lines += ["", f"{len(said) - _LOUD:,} earlier warnings and errors are in events.jsonl"]
    lines += [f"{event['kind']:<8} {text}" for event, text in zip(loud[-_LOUD:], said[-_LOUD:], strict=True)]
    lines += [f"damaged  {text}" for text in run.faults]
    plain = {
        "state": run.state,
        "seed": run.seed,
        "costs": {name: _cost(side, name) for name in side.costs},
        "last": {name: {w: v for w in _LAST if (v := last(m, w)) is not None} for name, m in side.curves.items()},
        "scores": [_score(stage, score) for (stage, _), score in side.scores.items()],
        "checkpoints": kept,
        "warnings": said,
        "faults": list(run.faults),
        "settings": side.settings,
    }
    return lines, plain


def compared(found: Comparison) -> list[str]:
    """A comparison as lines."""
    from plait.report.compare_page import COSTS, value_text
    from plait.report.sides import last

    names = [side.name for side in found.sides]
    lines: list[str] = []
    for side in found.sides:
        lines.append(f"{side.name}: {side.run.state}")
        lines += [f"  {s.path.name}: {s.stop}" for s in side.run.stages if s.state != "done" and s.stop]
        lines += [f"  damaged: {text}" for text in side.run.faults]
    lines += ["", f"WARNING  {found.data}" if found.data else "data: the same samples in all (shards_sha256)"]
    for title, rows in (("recipes", found.settings), ("machine", found.machine)):
        cells = [[key, *(_short(value_text(value)) for value in values)] for key, values in rows.items()]
        lines += ["", *aligned([[f"{title} differ in", *names], *cells])] if cells else ["", f"{title}: no difference"]
    cells = [[stage, name, *_score_cells(found, (stage, name))] for stage, name in found.scores]
    head = [names[0], *(cell for name in names[1:] for cell in (name, "difference"))]
    lines += ["", *aligned([["stage", "score", *head], *cells])] if cells else ["", "no run has been scored so far"]
    ends: list[list[str]] = []
    for place in dict.fromkeys(name for side in found.sides for name in side.curves):
        for what in ("loss", "evaluation"):
            values = [last(side.curves[place], what) if place in side.curves else None for side in found.sides]
            if any(value is not None for value in values):
                ends.append([f"{place} {what}", *("-" if v is None else f"{v:.5g}" for v in values)])
    lines += ["", *aligned([["last of", *names], *ends])] if ends else []
    cells = []
    for stage in dict.fromkeys(name for side in found.sides for name in side.costs):
        for what, show in COSTS.items():
            values = [getattr(s.costs[stage], what) if stage in s.costs else 0 for s in found.sides]
            if any(values):
                cells.append([f"{stage} {what}", *(show(value) if value else "-" for value in values)])
    lines += ["", *aligned([["cost", *names], *cells])] if cells else []
    return lines


def plain(found: Comparison) -> dict[str, Any]:
    """A comparison as plain data."""
    from plait.report.sides import last

    return {
        "runs": [
            {
                "name": side.name,
                "run": str(side.run.path),
                "state": side.run.state,
                "faults": list(side.run.faults),
                "data": side.data,
                "costs": {name: _cost(side, name) for name in side.costs},
                "last": {n: {w: v for w in _LAST if (v := last(m, w)) is not None} for n, m in side.curves.items()},
            }
            for side in found.sides
        ],
        "settings": found.settings,
        "machine": found.machine,
        "data": found.data,
        "scores": [
            {
                "stage": stage,
                "name": name,
                "values": [_score(stage, s) if (s := side.scores.get((stage, name))) else None for side in found.sides],
                "differences": [
                    _difference(found.differences.get((at, (stage, name)))) for at in range(1, len(found.sides))
                ],
            }
            for stage, name in found.scores
        ],
    }


def score_text(score: Score) -> str:
    """Value and interval in a cell."""
    one = (lambda v: f"{v * 100:.1f}") if score.is_share else (lambda v: f"{v:.4g}")
    unit = " %" if score.is_share else ""
    span = "" if score.low == score.high else f" ({one(score.low)} to {one(score.high)})"
    return f"{one(score.value)}{unit}{span}"


def _score_cells(found: Comparison, key: tuple[str, str]) -> list[str]:
    cells: list[str] = []
    for at, side in enumerate(found.sides):
        score = side.scores.get(key)
        cells.append("-" if score is None else score_text(score))
        if at:
            difference = found.differences.get((at, key))
            cells.append("-" if difference is None or score is None else _difference_text(difference, score))
    return cells


def _difference_text(found: Difference, score: Score) -> str:
    one = (lambda v: f"{v * 100:+.1f}") if score.is_share else (lambda v: f"{v:+.3g}")
    if found.low is None or found.high is None:
        return f"{one(found.value)}, not paired"
    word = "" if found.sign == "~" else " *"
    return f"{one(found.value)} ({one(found.low)} to {one(found.high)}){word}"


def _difference(found: Difference | None) -> dict[str, Any] | None:
    if found is None:
        return None
    return {"value": found.value, "low": found.low, "high": found.high, "n": found.n, "paired": found.low is not None}


def _score(stage: str, score: Score) -> dict[str, Any]:
    ends = {"value": score.value, "low": score.low, "high": score.high}
    return {"stage": stage, "name": score.name, **ends, "n": score.n, "rule": score.rule}


def _cost(side: Side, stage: str) -> dict[str, Any]:
    from dataclasses import asdict

    return asdict(side.costs[stage])


def _checkpoints(side: Side) -> dict[str, list[str]]:
    found: dict[str, list[str]] = {}
    for stage in side.run.stages:
        for place in sorted((stage.path, *stage.path.glob("*/"))):
            steps = sorted(path.name for path in Path(place, "checkpoints").glob("[0-9]*") if path.is_dir())
            if steps:
                found[place.relative_to(side.run.path).as_posix()] = steps
    return found


def _short(text: str) -> str:
    return text if len(text) <= _CELL else f"{text[: _CELL - 1]}…"
