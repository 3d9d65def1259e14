"""One model, one answer at a time: a bounded number of requests wait, and work ends when nobody listens."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Awaitable, Callable, Generator
from concurrent.futures import ThreadPoolExecutor

from plait.core.types import Completion
from plait.inference.converse import next_piece

Pieces = Generator[str, None, Completion]


class BusyError(Exception):
    """Too many requests wait already."""


class GoneError(Exception):
    """Whoever asked has left."""


class Worker:
    """The model's thread, and the order in which requests get it.

    Args:
        waiting: Most requests that wait while one is answered.
    """

    def __init__(self, waiting: int = 16) -> None:
        self.limit = waiting
        self.waiting = 0
        self._turn = asyncio.Lock()  # first come, first served
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="plait-model")

    async def begin(self, prepare: Callable[[], Pieces], *, gone: Callable[[], Awaitable[bool]]) -> Job:
        """Wait for the model, then prepare an answer; the job must be closed.

        Args:
            prepare: Checks the request and gives the pieces of its answer; runs in the model's thread.
            gone: Whether the client has left meanwhile.

        Raises:
            BusyError: Too many wait.
            GoneError: The client left while it waited.
        """
        if self._turn.locked() and self.waiting >= self.limit:
            raise BusyError
        self.waiting += 1
        try:
            await self._turn.acquire()
        finally:
            self.waiting -= 1
        try:
            if await gone():
                raise GoneError
            pieces = await asyncio.get_running_loop().run_in_executor(self._thread, prepare)
        except BaseException:
            self._turn.release()
            raise
        return Job(pieces, thread=self._thread, release=self._turn.release)

    def shut(self) -> None:
        """End the thread after the token at hand."""
        self._thread.shutdown(wait=False, cancel_futures=True)


class Job:
    """An answer at work; holds the model until it is closed.

    Args:
        pieces: Of the answer.
        thread: Where they are made.
        release: Lets the next request have the model.
    """

    def __init__(self, pieces: Pieces, *, thread: ThreadPoolExecutor, release: Callable[[], None]) -> None:
        self._pieces = pieces
        self._thread = thread
        self._release = release
        self._closed = False

    async def next(self) -> str | Completion:
        """The next piece, or in the end the completion. The event loop is free meanwhile."""
        return await asyncio.get_running_loop().run_in_executor(self._thread, next_piece, self._pieces)

    def close(self) -> None:
        """Stop after the token at hand, and let the next request have the model; twice does no harm."""
        if self._closed:
            return
        self._closed = True
        with contextlib.suppress(RuntimeError):  # the thread was shut, and the pieces end with it
            # Behind the token at hand in the queue of the only thread, so never beside it.
            self._thread.submit(self._pieces.close)
        self._release()
