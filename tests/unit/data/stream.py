"""Sources of batches for the tests of the loader, in a module that a worker imports without the tests."""

from __future__ import annotations

import inspect
import os
import signal
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch

from plait.core.errors import DataError
from plait.core.tensors import IGNORE, Batch, Patches


class Stream:
    """Two micro-batches of unequal size a step, one with pictures, a pure function of the step."""

    def step_batches(self, step: int) -> list[Batch]:
        generator = torch.Generator().manual_seed(step)
        return [self._batch(step, size, generator) for size in (3, 2)]

    def sample_ids(self, step: int) -> list[str]:
        return [f"{step}-{size}-{place}" for size in (3, 2) for place in range(size)]

    def _batch(self, step: int, size: int, generator: torch.Generator) -> Batch:
        token_ids = torch.randint(17, (size, 4), generator=generator)
        labels = token_ids.roll(1, dims=1)
        labels[0, : 1 + step % 3] = IGNORE
        picture = Patches(values=torch.rand(2, 5, generator=generator).half(), grid=torch.tensor([[1, 1, 2]]))
        return Batch(
            token_ids=token_ids,
            labels=labels,
            segment_ids=torch.ones_like(labels),
            media={"image": picture} if size == 3 else {},
            item_row={"image": torch.tensor([1])} if size == 3 else {},
            sample_ids=tuple(f"{step}-{size}-{place}" for place in range(size)),
        )


class Faulty(Stream):
    """Goes wrong at one step, the first time or every time; files in a folder say what was tried, and by whom."""

    def __init__(self, folder: Path, fault: Callable[[], None], *, step: int = 3, once: bool = False) -> None:
        self.folder, self.fault, self.step, self.once = folder, fault, step, once

    def step_batches(self, step: int) -> list[Batch]:
        (self.folder / f"pid-{os.getpid()}").touch()
        if step == self.step:
            tried = len(list(self.folder.glob("try-*")))
            (self.folder / f"try-{tried}-{os.getpid()}").touch()
            if not (self.once and tried):
                self.fault()
        return super().step_batches(step)


def killed() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def killed_at_the_event() -> None:
    """As killed, while it looks whether it is to end: with the event's lock in its hands, if the event has one."""
    frame = inspect.currentframe()
    while frame is not None and "done_event" not in frame.f_locals:
        frame = frame.f_back
    assert frame is not None, "torch's worker keeps its event under another name"
    lock = getattr(frame.f_locals["done_event"], "_cond", None)
    if lock is not None:
        lock.acquire()
    killed()


def stopped() -> None:
    os.kill(os.getpid(), signal.SIGSTOP)


def ended() -> None:
    sys.exit(7)


def hang() -> None:
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    time.sleep(600)


def crash() -> None:
    raise ValueError("a negative number of pictures")


def refuse() -> None:
    raise DataError("the picture is cut off", place="sample 3-3-1", remedy="take it out")


class Slow(Stream):
    """Takes its time."""

    def step_batches(self, step: int) -> list[Batch]:
        time.sleep(0.2)
        return super().step_batches(step)
