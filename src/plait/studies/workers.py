"""Many small trainings, one after another or in processes of one thread each."""

from __future__ import annotations

import contextlib
import multiprocessing
import signal
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from typing import TypeVar

from plait.core.device import usable_cores
from plait.core.events import Events

Work = TypeVar("Work")
Found = TypeVar("Found")


def finished(
    function: Callable[[Work], Found], work: Sequence[Work], *, workers: int, events: Events
) -> Iterator[Found]:
    """What the function makes of each piece, in the order in which they finish; progress is said after each.

    Args:
        function: Picklable, such as a ``functools.partial`` of one of a module; what it returns depends on its piece
            alone.
        work: The pieces.
        workers: Processes; 1 is this one, 0 one for each core.
        events: Told ``trainings`` done.
    """
    workers = min(workers or usable_cores(), len(work))
    if workers <= 1:
        for number, piece in enumerate(work, 1):
            yield function(piece)
            events.progress("trainings", number, len(work))
        return
    pool = ProcessPoolExecutor(workers, multiprocessing.get_context("spawn"), initializer=_begin)
    try:
        waiting = [pool.submit(function, piece) for piece in work]
        for number, done in enumerate(as_completed(waiting), 1):
            yield done.result()
            events.progress("trainings", number, len(work))
    finally:
        pool.shutdown(cancel_futures=True)


@contextlib.contextmanager
def one_thread() -> Iterator[None]:
    """One thread of torch in this block, so that a training gives the same bits in any process."""
    import torch

    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


def _begin() -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C goes to all; the parent alone answers it
