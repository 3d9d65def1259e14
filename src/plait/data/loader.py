"""Batches made ahead by worker processes: the very batches of the source, in the order of the steps.

A source is a pure function of the step, so that how many workers make its batches changes nothing: not the batches, not
their order, not the random numbers of training. The step alone is the cursor, whatever the number of workers before.
"""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import signal
import sys
import threading
import traceback
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from multiprocessing.context import BaseContext
from types import TracebackType
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from plait.core.errors import ConfigError, DataError, PlaitError
from plait.core.events import Events
from plait.core.protocols import Batches, StatefulBatches, holds_state
from plait.core.tensors import Batch

TIMEOUT_S = 300.0
"""How long the batches of a step may be waited for."""

_LOOK_EVERY_S = 1.0  # while it waits, whether the workers are alive
_GRACE_S = 5.0
_NAMED = 8  # sample ids in a message

# Workers are forked from a server that has imported torch and has one thread ("forkserver"), not from the training
# process ("fork"), and each takes a copy of the source. Measured (torch 2.13, Linux): a child forked after the parent's
# first parallel operation hangs in its own, for the threads of OpenMP are not there; memory that training changes is
# copied for the child, 100 MiB of weights as 100 MiB more. And a forked child has training's handlers of Ctrl-C and
# SIGTERM, which only remember them, and its death would raise an error in training wherever that is: in the middle of
# an update or of a checkpoint.
_START = "forkserver" if "forkserver" in multiprocessing.get_all_start_methods() else "spawn"


class _Flag:
    """An event that nobody waits for: a byte in shared memory, without a lock.

    Workers look at torch's own event between two steps, holding its lock; one that is killed just then keeps the lock
    for ever, and the trainer, which sets the event when it closes, hangs.
    """

    def __init__(self, context: BaseContext) -> None:
        self._byte = context.RawValue("b", 0)

    def set(self) -> None:
        self._byte.value = 1

    def is_set(self) -> bool:
        return bool(self._byte.value)


def _context() -> BaseContext:
    """How processes are started, with events that outlive them."""
    kind = type(multiprocessing.get_context(_START))

    class Context(kind):
        def Event(self) -> _Flag:  # pyright: ignore[reportIncompatibleMethodOverride] - all torch calls
            return _Flag(self)

    return Context()


@dataclass(frozen=True, slots=True)
class _Fault:
    """Why there are no batches of a step.

    Attributes:
        text: What happened.
        trace: Where in a worker; "" where it said nothing.
        error: Kind, cause, place and remedy of an error that the source itself raised.
    """

    text: str
    trace: str = ""
    error: tuple[type[PlaitError], str, str, str] | None = None


class Loader:
    """A source of batches whose steps are made by worker processes while training is at work.

    The source goes to the workers once, so it must be picklable; its tensors lie in memory that all share. A worker
    that dies, hangs or raises is replaced once: the step at hand is made again, alone, in a new process, so that what
    fails twice is certainly this step. An error that the source raises about its data is raised here as it was, at
    once: a pure function would only say it again.

    Use it as a context manager, or call :meth:`close`: no process outlives it, and none outlives a killed trainer. As
    always with processes in Python, a script that uses workers begins its work under ``if __name__ == "__main__":``.

    Args:
        batches: The source.
        steps: How many steps there are in all.
        workers: Processes; 0 makes each step's batches when they are asked for, in this process.
        ahead: Steps that each worker makes in advance, at most.
        timeout_s: Longest wait for the batches of a step.
        events: Told when a worker had to be replaced.

    Raises:
        ConfigError: A number is out of range; or workers are to make the batches of a source that holds a state, which
            may not be asked ahead of the model.
    """

    def __init__(
        self,
        batches: Batches,
        *,
        steps: int,
        workers: int = 0,
        ahead: int = 2,
        timeout_s: float = TIMEOUT_S,
        events: Events | None = None,
    ) -> None:
        for name, value, least in (("workers", workers, 0), ("ahead", ahead, 1)):
            if value < least:
                raise ConfigError(f"{name} is {value}", place=name, remedy=f"set it to {least} or more")
        if not timeout_s > 0:
            raise ConfigError(f"timeout_s is {timeout_s}", place="timeout_s", remedy="set it above 0")
        if workers and holds_state(batches):
            raise ConfigError(
                f"workers is {workers}, but {type(batches).__name__} holds a state, which is of the step at hand",
                place="workers",
                remedy="set workers to 0",
            )
        self.batches, self.steps, self.workers, self.ahead = batches, steps, workers, ahead
        self.timeout_s = timeout_s
        self._events = events or Events()
        self._stream: _Stream | None = None
        self._next = 0

    def __enter__(self) -> Loader:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def step_batches(self, step: int) -> Sequence[Batch]:
        """The source's batches of a step; steps in a row are ready sooner than others.

        Raises:
            DataError: A worker died, hung or raised at this step twice; or the source's own error.
            ConfigError: The source cannot be handed to another process.
        """
        if not self.workers:
            return self.batches.step_batches(step)
        if step >= self.steps:
            raise DataError(
                f"step {step} of {self.steps} was asked for", place="loader", remedy="give the loader all steps"
            )
        try:
            if self._stream is None or step != self._next:
                self.close()
                self._stream = self._open(range(step, self.steps), self.workers)
            found = self._stream.take()
            if isinstance(found, _Fault):
                self.close()
                found = self._again(step, found)
        except BaseException:  # a signal too: nobody waits for the workers any more
            self.close()
            raise
        self._next = step + 1
        if self._next == self.steps and self._stream is not None:
            self._stream.end()
        return found

    @property
    def holds_state(self) -> bool:
        """Whether the source does."""
        return holds_state(self.batches)

    def state(self) -> Mapping[str, Tensor]:
        """The source's state; nothing if it has none."""
        return self.batches.state() if isinstance(self.batches, StatefulBatches) else {}

    def restore(self, tensors: Mapping[str, Tensor]) -> None:
        """Give the source its state back."""
        if isinstance(self.batches, StatefulBatches):
            self.batches.restore(tensors)

    def close(self) -> None:
        """End the workers; a step that is asked for later starts new ones."""
        stream, self._stream = self._stream, None
        if stream is not None:
            stream.close()

    # --- inside ----------------------------------------------------------------------------------------------------

    def _open(self, steps: range, workers: int) -> _Stream:
        return _Stream(self.batches, steps, workers=workers, ahead=self.ahead, timeout_s=self.timeout_s)

    def _again(self, step: int, first: _Fault) -> Sequence[Batch]:
        """The batches of a step that failed once, from one new process that makes nothing else."""
        _raise_own(first)
        self._events.warning(
            f"step {step}: {first.text}; the batches are made once more, in a new process", step=step, trace=first.trace
        )
        alone = self._open(range(step, step + 1), 1)
        try:
            second = alone.take()
        finally:
            alone.close()
        if not isinstance(second, _Fault):
            return second
        _raise_own(second)
        error = DataError(
            f"no batches: {first.text}; once more, in a new process: {second.text}",
            place=f"step {step}{self._samples(step)}",
            remedy="look at these samples; without workers (workers=0) the fault shows where it is, and nothing is too "
            "slow. If the machine ran out of memory (also /dev/shm), use fewer workers",
        )
        if second.trace:
            error.add_note(second.trace)
        raise error

    def _samples(self, step: int) -> str:
        """The samples of a step as far as the source tells without making its batches."""
        tell = getattr(self.batches, "sample_ids", None)
        if tell is None:
            return ""
        ids: Sequence[str] = tell(step)
        more = f" and {len(ids) - _NAMED} more" if len(ids) > _NAMED else ""
        return f", samples {', '.join(ids[:_NAMED])}{more}"


class _Stream:
    """The batches of some steps, one after the other, from processes of their own."""

    def __init__(self, batches: Batches, steps: range, *, workers: int, ahead: int, timeout_s: float) -> None:
        self._timeout_s = timeout_s
        context = _context()
        context.set_forkserver_preload([__name__, type(batches).__module__])
        before = set(multiprocessing.active_children())
        try:
            with warnings.catch_warnings():  # more workers than cores may be right where they wait for a disk
                warnings.filterwarnings("ignore", "This DataLoader will create", UserWarning)
                warnings.filterwarnings("ignore", "Got pickle error", UserWarning)
                loader: DataLoader[Any] = DataLoader(
                    _Steps(batches),
                    batch_size=None,
                    sampler=steps,
                    num_workers=workers,
                    collate_fn=_as_it_is,
                    timeout=_LOOK_EVERY_S,
                    worker_init_fn=_begin,
                    multiprocessing_context=context,
                    generator=torch.Generator(),  # it draws a seed: not from training's numbers
                    prefetch_factor=ahead,
                )
                self._batches = iter(loader)
        except BaseException as error:  # a signal too
            self._workers = list(set(multiprocessing.active_children()) - before)
            self.close()
            if isinstance(error, (AttributeError, TypeError, ValueError)):  # so says pickling
                raise ConfigError(
                    f"{type(batches).__name__} cannot be handed to another process: {error}",
                    place="workers",
                    remedy="set workers to 0, or let the source hold nothing but data, and functions of modules",
                ) from error
            raise
        self._workers = list(set(multiprocessing.active_children()) - before)

    def take(self) -> Sequence[Batch] | _Fault:
        """The next step's."""
        late = threading.Event()

        def give_up() -> None:
            late.set()
            self.end()  # also ends a wait inside a hand-over, which no time limit of a queue does

        timer = threading.Timer(self._timeout_s, give_up)
        timer.daemon = True
        timer.start()
        try:
            while True:
                try:
                    return next(self._batches)
                except (RuntimeError, OSError, EOFError) as error:
                    if not isinstance(error, RuntimeError) or "timed out" not in str(error):
                        return _Fault(self._why(error, late=late.is_set()))
        finally:
            timer.cancel()

    def end(self) -> None:
        """End all processes without waiting. They only read: there is nothing that they would have to finish."""
        for worker in self._workers:
            worker.kill()

    def close(self) -> None:
        """End all processes, and wait until they have ended."""
        self.end()
        for worker in self._workers:
            worker.join(_GRACE_S)  # who waits for a dead disk does not even end by SIGKILL
        with contextlib.suppress(AttributeError):
            del self._batches

    def _why(self, error: Exception, *, late: bool) -> str:
        if late:
            return f"nothing came for {self._timeout_s:g} s"
        for worker in self._workers:
            code = worker.exitcode
            if code is not None and code < 0:
                return f"worker process {worker.pid} was killed by {signal.Signals(-code).name}"
            if code is not None:
                return f"worker process {worker.pid} ended with exit code {code}"
        return f"{type(error).__name__}: {error}"


class _Steps(Dataset[Any]):
    """The source as torch's loader reads it; what goes wrong in a worker comes back as a value."""

    def __init__(self, batches: Batches) -> None:
        self.batches = batches

    def __getitem__(self, step: int) -> Sequence[Batch] | _Fault:
        try:
            return list(self.batches.step_batches(step))
        except PlaitError as error:
            return _Fault(str(error), error=(type(error), error.cause, error.place, error.remedy))
        except Exception as error:
            return _Fault(f"{type(error).__name__}: {error}", trace=traceback.format_exc())


def _as_it_is(found: Any) -> Any:
    return found


def _begin(_: int) -> None:
    """First thing in a worker: Ctrl-C is for the trainer to answer, and without it there is no work."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    trainer = multiprocessing.parent_process()
    if trainer is not None and sys.platform == "linux":
        import fcntl

        # A pipe whose other end the trainer holds: when that is closed, the kernel kills this process, even one that
        # hangs or is stopped. (Python's server only ends after its children, torch's workers wait for its end.)
        fcntl.fcntl(trainer.sentinel, fcntl.F_SETOWN, os.getpid())
        fcntl.fcntl(trainer.sentinel, fcntl.F_SETSIG, signal.SIGKILL)
        fcntl.fcntl(trainer.sentinel, fcntl.F_SETFL, fcntl.fcntl(trainer.sentinel, fcntl.F_GETFL) | os.O_ASYNC)
        if not trainer.is_alive():
            os._exit(1)


def _raise_own(fault: _Fault) -> None:
    """Raise the source's own error, if it is one."""
    if fault.error is not None:
        kind, cause, place, remedy = fault.error
        raise kind(cause, place=place, remedy=remedy)
