"""Ctrl-C and SIGTERM as a wish: the work at hand is finished and saved, then it stops."""

from __future__ import annotations

import contextlib
import signal
import threading
from collections.abc import Iterator
from types import FrameType

from plait.core.errors import Stopped


class Woken(KeyboardInterrupt):
    """The first signal came inside :meth:`StopRequest.wake`: what was waited for is given up."""


class StopRequest:
    """Whether somebody asked to stop.

    Attributes:
        signal: Number of the signal that came; 0 while none did.
    """

    def __init__(self) -> None:
        self.signal = 0
        self._wake = False

    def __bool__(self) -> bool:
        return self.signal != 0

    def ask(self, number: int, frame: FrameType | None = None) -> None:
        """Remember the first signal; the second one stops at once.

        Nothing more than a flag is set: a handler runs between any two bytecodes, so it must neither write files nor
        call listeners.

        Raises:
            Stopped: This is the second signal.
            Woken: This is the first one, and :meth:`wake` is entered.
        """
        if self.signal:
            raise Stopped(number, "stopped at once, without saving; the last checkpoint is complete")
        self.signal = number
        if self._wake:
            raise Woken

    @contextlib.contextmanager
    def wake(self) -> Iterator[None]:
        """Let the first signal end the block at once: for work that can be given up, such as waiting for data.

        Raises:
            Woken: A signal came.
        """
        self._wake = True
        try:
            yield
        finally:
            self._wake = False


@contextlib.contextmanager
def stop_requests() -> Iterator[StopRequest]:
    """Turn SIGINT and SIGTERM into a :class:`StopRequest` inside the block.

    Only the main thread can; in others signals stay as they are.
    """
    request = StopRequest()
    if threading.current_thread() is not threading.main_thread():
        yield request
        return
    before = {number: signal.signal(number, request.ask) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield request
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
