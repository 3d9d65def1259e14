"""Trackers beside a run: a process each, started with it and asked to end with it; what was not sent is said."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import time
from collections.abc import Generator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO

from plait.core.errors import PlaitError
from plait.core.events import Events
from plait.recipes.records import FOLDER, Sent, damaged, missing_scores, sent_file, waiting

PATIENCE_S = 20.0
"""How long a run that is done waits for its trackers; one that was told to stop waits a quarter of it."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Beside:
    """A tracker's process.

    Attributes:
        name: Of the tracker.
        command: What it runs.
    """

    name: str
    command: Sequence[str]

    @classmethod
    def of(cls, run: Path, *, name: str, settings: str) -> Beside:
        """A follower with the settings of a tracker as JSON."""
        words = [sys.executable, "-m", "plait.recipes.follower", str(run.absolute()), settings]
        return cls(name=name, command=words)


@contextlib.contextmanager
def tracking(
    run: Path, trackers: Sequence[Beside], *, events: Events, patience_s: float = PATIENCE_S
) -> Generator[None]:
    """Let trackers follow a run while the block works; nothing that they do ends it or holds it up.

    Args:
        run: The run folder.
        trackers: Which.
        events: Told what was sent in the end, and what was not.
        patience_s: Seconds to wait for them in the end.
    """
    started = [(one, _start(run, one, events)) for one in trackers]
    try:
        yield
    except KeyboardInterrupt:
        patience_s /= 4
        raise
    finally:
        _end([process for _, process in started if process is not None], patience_s)
        for one in trackers:
            with contextlib.suppress(PlaitError, OSError):  # a full disk: why the run ended matters more
                _tell(run, one.name, events)


def _start(run: Path, one: Beside, events: Events) -> subprocess.Popen[bytes] | None:
    hidden = {"RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"}
    environment = {name: value for name, value in os.environ.items() if name not in hidden}
    environment |= {"CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1", "WANDB_SILENT": "true"}
    try:
        (run / FOLDER).mkdir(exist_ok=True)
        with (run / FOLDER / f"{one.name}.log").open("ab") as log:
            return subprocess.Popen(
                one.command,
                stdin=subprocess.PIPE,
                stdout=log,
                stderr=log,
                env=environment,
                start_new_session=True,  # Ctrl-C is for the run, which then ends this one
            )
    except OSError as error:
        events.warning(f"the tracker {one.name} was not started: {error}")
        return None


def _end(processes: Sequence[subprocess.Popen[bytes]], patience_s: float) -> None:
    for process in processes:
        inside: IO[bytes] | None = process.stdin
        if inside is not None:
            with contextlib.suppress(OSError):
                inside.close()
    until = time.monotonic() + patience_s
    for process in processes:
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(max(0.0, until - time.monotonic()))
        if process.poll() is None:
            with contextlib.suppress(OSError):
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()


@dataclass(frozen=True, slots=True, kw_only=True)
class Account:
    """What a tracker has of a run.

    Attributes:
        total: Records of the run.
        sent: Those that it surely has.
        missing: Those that it was not given.
        scores: Stages whose scores it may not have.
        damaged: Lines that cannot be read, which nobody can send, as ``file:line``.
        finished: Whether it was closed.
        error: What went wrong last.
    """

    total: int
    sent: int
    missing: int
    scores: tuple[str, ...]
    damaged: tuple[str, ...]
    finished: bool
    error: str

    def fault(self) -> str:
        """What is not as it should be; empty if all is."""
        unsure = self.total - self.sent - self.missing
        parts = [f"{self.missing:,} of {self.total:,} records were not sent"] if self.missing else []
        if unsure:
            parts.append(f"{unsure:,} of {self.total:,} records may not have come there")
        if self.scores:
            parts.append(f"scores of {', '.join(self.scores)} may not have come there")
        if not parts and not self.finished:
            parts.append(f"{self.sent:,} records were sent, but it was not closed")
        if not parts and self.error:
            parts.append(f"{self.sent:,} records were sent, but it failed")
        return f"{', '.join(parts)} ({self.error or 'it did not answer in time'})" if parts else ""


def account(run: Path, name: str) -> Account:
    """What a tracker has of a run, by its note."""
    sent = Sent.read(sent_file(run, name))
    sure = Sent(upto=sent.sure, had=sent.had, scores=sent.sure_scores)

    def count(given: Sent) -> int:
        return sum(len(records) for _, records in waiting(run, given))

    total = count(Sent())
    return Account(
        total=total,
        sent=total - count(sure),
        missing=count(sent),
        scores=tuple(stage for stage, _ in missing_scores(run, sure)),
        damaged=tuple(damaged(run)),
        finished=sent.finished,
        error=sent.error,
    )


def _tell(run: Path, name: str, events: Events) -> None:
    found = account(run, name)
    if lines := len(found.damaged):
        are = "damaged line was" if lines == 1 else "damaged lines were"
        events.warning(
            f"{name}: {lines:,} {are} not sent: {', '.join(found.damaged[:3])}",
            tracker=name,
            damaged=lines,
        )
    if not (fault := found.fault()):
        events.note(f"{name}: {found.sent:,} records sent", tracker=name, sent=found.sent)
        return
    lost = found.sent < found.total or found.scores
    remedy = "metrics.jsonl has all: `plait track {}` sends them later" if lost else "`plait track {}` does it again"
    events.warning(
        f"{name}: {fault}. {remedy.format(run.name)}",
        tracker=name,
        sent=found.sent,
        missing=found.missing,
        unsure=found.total - found.sent - found.missing,
    )
