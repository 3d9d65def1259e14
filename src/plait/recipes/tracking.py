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
from plait.recipes.follower import FOLDER, Sent, sent_file, waiting

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


def unsent(run: Path, name: str) -> tuple[int, int, str]:
    """How many records a tracker was sent of a run, how many it was not, and what went wrong last."""
    sent = Sent.read(sent_file(run, name))
    missing = sum(len(records) for _, records in waiting(run, sent))
    everything = sum(len(records) for _, records in waiting(run, Sent()))
    return everything - missing, missing, sent.error


def _tell(run: Path, name: str, events: Events) -> None:
    came, missing, error = unsent(run, name)
    if not missing:
        events.note(f"{name}: {came:,} records sent", tracker=name, sent=came)
        return
    why = error or "it did not answer in time"
    events.warning(
        f"{name}: {missing:,} of {came + missing:,} records were not sent ({why}). metrics.jsonl has all: "
        f"`plait track {run.name}` sends them later",
        tracker=name,
        sent=came,
        missing=missing,
    )
