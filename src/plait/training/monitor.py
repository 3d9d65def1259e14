"""What each step measured: ``metrics.jsonl`` while training, ``results.csv`` at the end, progress and ETA all along.

A record depends on its own step alone, so that a killed and resumed run writes the same file as one that ran through;
only the fields in :data:`TIMING` differ.
"""

from __future__ import annotations

import csv
import io
import json
import math
import os
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from plait.core.device import rss
from plait.core.events import Events
from plait.core.files import disk_error, fsync_dir, read_jsonl, write_atomic, write_json
from plait.training.alerts import Alerts

METRICS = "metrics.jsonl"
RESULTS = "results.csv"
NOT_FINITE = "not_finite.json"

TIMING = frozenset({"seconds", "samples_per_s", "tokens_per_s", "data_wait", "save_s", "memory_bytes", "mfu"})
"""Fields that tell about the machine; all others are equal in equal runs."""

_UNTIMED = 3
"""First steps of a session that say nothing about the rest: kernels are planned, files are cold."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Cost:
    """What one step took.

    Attributes:
        samples: Samples in it.
        tokens: Positions in it that are not padding.
        flops: Floating-point operations that the model asks for; 0 if unknown.
        wait_s: Seconds in which the model waited for data.
        work_s: Seconds of forward, backward and update.
        save_s: Seconds that checkpoints held up training since the step before; they are in neither of the others.
    """

    samples: int
    tokens: int
    wait_s: float
    work_s: float
    save_s: float = 0.0
    flops: float = 0.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Plan:
    """What the monitor has to know about the run.

    Attributes:
        task: What progress is called, such as ``pretrain``.
        total: Steps of the whole run.
        log_every: A record every so many steps, and at the last one.
        peak_flops: What the devices can do in a second; 0 if unknown. MFU needs it and the operations of steps.
    """

    task: str
    total: int
    log_every: int = 1
    peak_flops: float = 0.0


class Monitor:
    """Writes the metrics of one stage.

    Args:
        folder: The stage's folder.
        plan: What is being done.
        step: Finished steps; records beyond it, left by a killed process, are cut off.
        events: Told the progress.

    Raises:
        ResourceError: The disk is full or not writable.
    """

    def __init__(self, folder: Path, plan: Plan, *, step: int, events: Events) -> None:
        self.folder = folder
        self.plan = plan
        self.events = events
        _cut(folder / METRICS, step=step, log_every=plan.log_every, events=events)
        self._eta = _Eta(plan.total)
        self._alerts = Alerts(plan.total // plan.log_every)
        for record in read_jsonl(folder / METRICS) if (folder / METRICS).is_file() else []:
            self._alerts.record(record)  # what they say was said
        self._open: list[Cost] = []

    def step(self, step: int, values: Mapping[str, float], cost: Cost) -> dict[str, Any]:
        """Take in one finished step; returns ``values`` with rates and memory added, as shown and recorded.

        Args:
            step: Finished steps, this one included.
            values: What it computed; a value that is not finite is recorded as null.
            cost: What it took.

        Raises:
            ResourceError: The disk is full or not writable.
        """
        self._open.append(cost)
        full: dict[str, Any] = {"step": step, **values, "samples": cost.samples, "tokens": cost.tokens, **self._rates()}
        shown = full | {"memory_mb": round(full["memory_bytes"] / 1e6), "eta_s": self._eta.after(step)}
        self.events.progress(self.plan.task, step, self.plan.total, **shown)
        if step % self.plan.log_every == 0 or step == self.plan.total:
            self._append(_line(full))
            self._open.clear()
            for alert in self._alerts.record(full):
                self.events.warning(f"step {step}: {alert.text}", alert=alert.kind, step=step)
        return full

    def amend(self, step: int, found: Mapping[str, float]) -> None:
        """Add to the last record what was found out after it was written; nothing if that step has none.

        Raises:
            ResourceError: The disk is full or not writable; the file is as before.
        """
        path = self.folder / METRICS
        lines = path.read_text(encoding="utf-8").splitlines(keepends=True) if path.is_file() else []
        last: dict[str, Any] = json.loads(lines[-1]) if lines else {}
        if last.get("step") != step:
            return
        measured = [name for name in ("samples", "tokens", *TIMING) if name in last and name not in found]
        first = {name: value for name, value in last.items() if name not in measured}
        rest = {name: value for name, value in last.items() if name in measured}
        write_atomic(path, "".join(lines[:-1]) + _line({**first, **found, **rest}))

    def sync(self) -> None:
        """Make what was recorded durable; call it before a checkpoint, which must never be ahead of its metrics."""
        path = self.folder / METRICS
        try:
            with path.open("ab") as file:
                os.fsync(file.fileno())
            fsync_dir(self.folder)
        except OSError as error:
            raise disk_error(error, path) from error

    def results(self) -> Path:
        """Write ``results.csv``: every record, one column a field."""
        path = self.folder / METRICS
        records = read_jsonl(path) if path.is_file() else []
        columns = list(dict.fromkeys(key for record in records for key in record))
        text = io.StringIO()
        writer = csv.DictWriter(text, columns, lineterminator="\n")
        writer.writeheader()
        writer.writerows(records)
        write_atomic(self.folder / RESULTS, text.getvalue())
        return self.folder / RESULTS

    def _rates(self) -> dict[str, float | int]:
        """Rates since the last record."""
        wait, work = sum(c.wait_s for c in self._open), sum(c.work_s for c in self._open)
        seconds = max(wait + work, 1e-9)
        tokens = sum(c.tokens for c in self._open)
        rates: dict[str, float | int] = {
            "seconds": round(seconds / len(self._open), 6),
            "samples_per_s": round(sum(c.samples for c in self._open) / seconds, 3),
            "tokens_per_s": round(tokens / seconds, 3),
            "data_wait": round(wait / seconds, 4),
            "save_s": round(sum(c.save_s for c in self._open), 6),
            "memory_bytes": rss(),
        }
        flops = sum(c.flops for c in self._open)
        if flops and self.plan.peak_flops:
            rates["mfu"] = round(flops / seconds / self.plan.peak_flops, 4)
        return rates

    def _append(self, line: str) -> None:
        path = self.folder / METRICS
        try:
            with path.open("a", encoding="utf-8") as file:
                file.write(line)
        except OSError as error:
            raise disk_error(error, path) from error


def write_skipped(folder: Path, records: Sequence[Mapping[str, Any]]) -> Path:
    """Write ``not_finite.json``: the steps left out in a row that ended a run, each with the samples to look at."""
    write_json(folder / NOT_FINITE, records)
    return folder / NOT_FINITE


def _line(values: Mapping[str, Any]) -> str:
    record = {k: None if isinstance(v, float) and not math.isfinite(v) else v for k, v in values.items()}
    return json.dumps(record, ensure_ascii=False, allow_nan=False) + "\n"


class _Eta:
    """Seconds to go, from the pace of this session without its first steps; the clock cannot jump backwards."""

    def __init__(self, total: int) -> None:
        self._total = total
        self._seen = 0
        self._since = (0.0, 0)

    def after(self, step: int) -> float | None:
        """Tell that a step is finished; None until there is a pace."""
        self._seen += 1
        now = time.monotonic()
        if self._seen <= _UNTIMED:
            self._since = (now, step)
            return None
        begun, first = self._since
        return round((now - begun) / (step - first) * (self._total - step), 1)


def _cut(path: Path, *, step: int, log_every: int, events: Events) -> None:
    """Cut the file to the records up to ``step``; a line that was being written when the process died goes too."""
    lines = path.read_text(encoding="utf-8", errors="replace").splitlines(keepends=True) if path.is_file() else []
    kept, last = 0, 0
    for line in lines:
        try:
            number = int(json.loads(line)["step"])
        except (ValueError, KeyError, TypeError):
            break
        if number > step or not line.endswith("\n"):
            break
        kept, last = kept + 1, number
    if kept < len(lines):
        write_atomic(path, "".join(lines[:kept]))
    if last < step - step % log_every:
        events.warning(
            f"{path.name} ends at step {last}, the checkpoint is at step {step}: the records between are lost"
        )
