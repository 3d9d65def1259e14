"""When a checkpoint is written: within the step, or beside training from a copy in host memory.

Beside training a step waits only while the state is copied (:mod:`plait.core.snapshot`); a thread writes, hashes,
syncs, renames, verifies and rotates. At most one is on its way: the next save waits for it. What a thread meets is
raised by the next call from the loop. The bits are those of a checkpoint written within the step.
"""

from __future__ import annotations

import contextlib
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType

from plait.core.errors import ResourceError
from plait.core.events import Events
from plait.core.snapshot import Snapshot
from plait.training.checkpoint import Checkpoints


@dataclass(slots=True)
class _Job:
    """One checkpoint on its way."""

    step: int
    began: float
    stalled: float = 0.0
    seconds: float = 0.0
    fault: BaseException | None = None


class Saver:
    """Saves one stage's checkpoints. As a context, it ends by waiting for what is on its way, if no signal forbids.

    Args:
        checkpoints: Where they go.
        events: Told of every finished one, by the thread that trains.
        beside: Write beside training rather than within the step.

    Attributes:
        saved: The newest finished checkpoint that this run knows of.
        asked: Step of the newest one that was asked for, finished or not; 0 for none.
    """

    def __init__(self, checkpoints: Checkpoints, *, events: Events, beside: bool) -> None:
        self.saved: Path | None = None
        self.asked = 0
        self._checkpoints = checkpoints
        self._events = events
        self._beside = beside
        self._snapshot = Snapshot()
        self._job: _Job | None = None
        self._done = threading.Event()
        self._stalled = 0.0

    def __enter__(self) -> "Saver":
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, _: TracebackType | None) -> None:
        if self._job is None or (error is not None and not isinstance(error, Exception)):
            return  # stopped at once: the folder on its way stays partial, and the next run puts it aside
        if error is None:
            self.wait()
            return
        self._done.wait()  # training met a fault of its own: the checkpoint on its way may be the last good one
        try:
            self.check()
        except BaseException as second:
            error.add_note(f"the checkpoint that was on its way was not saved either: {second}")

    def found(self, checkpoint: Path, *, step: int) -> None:
        """The run goes on from a finished checkpoint."""
        self.saved, self.asked = checkpoint, step

    def save(self, step: int, write: Callable[[Path], None], *, before: Callable[[], None]) -> None:
        """Save a step.

        Args:
            step: Finished steps.
            write: Fills the folder; its tensors go through :func:`plait.core.snapshot.save_tensors`.
            before: Makes durable what a checkpoint must never be ahead of.

        Raises:
            ResourceError: The disk is full or not writable, or the system gives no thread; earlier checkpoints are
                untouched.
            CheckpointError: What was written does not read back; earlier checkpoints are untouched.
        """
        self.wait()
        self.asked = step
        began = time.perf_counter()
        job = _Job(step=step, began=began)
        with contextlib.ExitStack() as folder:
            temp = folder.enter_context(self._checkpoints.writing(step))
            if not self._beside:
                before()
                write(temp)
            else:
                with self._snapshot.taking():
                    write(temp)
                self._start(job, folder, before)
        job.stalled = time.perf_counter() - began
        self._stalled += job.stalled
        if not self._beside:
            job.seconds = job.stalled
            self._tell(job)

    def within(self, step: int, write: Callable[[], None]) -> None:
        """Save a step in another way, within it; its checkpoint is finished when ``write`` ends."""
        self.wait()
        self.asked = step
        job = _Job(step=step, began=time.perf_counter())
        write()
        job.stalled = job.seconds = time.perf_counter() - job.began
        self._stalled += job.stalled
        self._tell(job)

    def check(self) -> None:
        """Say that a checkpoint is finished, or raise what its thread met; at once, whether there is one or not."""
        if self._job is None or not self._done.is_set():
            return
        job, self._job = self._job, None
        if job.fault is not None:
            raise job.fault
        self._tell(job)

    def wait(self) -> None:
        """Wait for what is on its way; as :meth:`check` then."""
        if self._job is not None:
            began = time.perf_counter()
            self._done.wait()
            self._job.stalled += time.perf_counter() - began
            self._stalled += time.perf_counter() - began
            self.check()

    def last_good(self) -> str:
        """The newest checkpoint that is or becomes whole, for a message; waits for one on its way."""
        if self._job is not None:
            self._done.wait()
            if self._job.fault is None:
                return str(self._checkpoints.path(self._job.step))
        return str(self.saved or "the start")

    def take_stalled(self) -> float:
        """Seconds for which training waited since this was last asked."""
        seconds, self._stalled = self._stalled, 0.0
        return seconds

    def _start(self, job: _Job, folder: contextlib.ExitStack, before: Callable[[], None]) -> None:
        """Hand the folder over to a thread; it is on its way only once that runs."""
        rest = folder.pop_all()
        self._done.clear()
        # A daemon: a second signal ends the process without it.
        thread = threading.Thread(target=self._finish, args=(job, rest, before), name="checkpoint", daemon=True)
        try:
            thread.start()
        except RuntimeError as error:
            folder.push(rest)  # which clears it away
            raise ResourceError(
                f"cannot write beside training: {error}",
                place=str(self._checkpoints.path(job.step)),
                remedy="end other programs, raise the limit of threads (ulimit -u) or set async_save to false, "
                "then `plait resume` the run",
            ) from error
        self._job = job

    def _finish(self, job: _Job, folder: contextlib.ExitStack, before: Callable[[], None]) -> None:
        try:
            with folder:
                before()
                self._snapshot.write()
        except BaseException as fault:  # nothing may be lost in a thread: the loop raises it
            job.fault = fault
        job.seconds = time.perf_counter() - job.began
        self._done.set()

    def _tell(self, job: _Job) -> None:
        self.saved = self._checkpoints.path(job.step)
        size = sum(p.stat().st_size for p in self.saved.rglob("*") if p.is_file())
        beside = f" beside training, which waited {job.stalled:.2f} s" if self._beside else ""
        self._events.note(
            f"checkpoint {self.saved.name} saved: {size / 2**20:,.1f} MiB in {job.seconds:.1f} s{beside}",
            checkpoint=str(self.saved),
        )
