"""Ctrl-C and SIGTERM as a wish: the work at hand is finished and saved, then it stops."""

from __future__ import annotations

import contextlib
import signal
import threading
import time
from collections.abc import Callable, Iterator
from types import FrameType
from typing import Any

from plait.core.errors import Stopped

GRACE_S = 10.0
"""Seconds that work in :meth:`StopRequest.patience` may take after a signal; then there is time to save within 30 s."""


_Handler = Callable[[int, FrameType | None], Any] | int | None


class Woken(KeyboardInterrupt):
    """A signal came inside :meth:`StopRequest.wake` or :meth:`StopRequest.patience`: what was done is given up."""


class StopRequest:
    """Whether somebody asked to stop.

    Attributes:
        signal: Number of the signal that came; 0 while none did.
    """

    def __init__(self) -> None:
        self.signal = 0
        self._wake = False
        self._patient = False
        self._asked = 0.0
        self._others: tuple[_Handler, tuple[float, float]] | None = None  # who had the alarm before

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
        self.signal, self._asked = number, time.monotonic()
        if self._wake:
            raise Woken
        if self._patient:
            self._set_alarm()

    @contextlib.contextmanager
    def wake(self) -> Iterator[None]:
        """Let the first signal end the block at once: for work that can be given up, such as waiting for data.

        Raises:
            Woken: A signal came, in the block or before it.
        """
        self._wake = True
        try:
            if self.signal:
                raise Woken
            yield
        finally:
            self._wake = False

    @contextlib.contextmanager
    def patience(self) -> Iterator[None]:
        """Give the block :data:`GRACE_S` seconds from the first signal on: for work that had better be finished.

        Raises:
            Woken: It was not finished by then. In other threads than the main one nothing is raised.
        """
        self._patient = True
        if self.signal:
            self._set_alarm()
        try:
            yield
        finally:
            self._patient = False
            self._give_alarm_back()

    def _set_alarm(self) -> None:
        if _on_main_thread() and self._others is None:
            handler = signal.signal(signal.SIGALRM, self._ring)
            left = self._asked + GRACE_S - time.monotonic()
            self._others = handler, signal.setitimer(signal.ITIMER_REAL, max(left, 1e-3))

    def _give_alarm_back(self) -> None:
        if self._others is not None:
            signal.setitimer(signal.ITIMER_REAL, 0)
            (handler, timer), self._others = self._others, None
            signal.signal(signal.SIGALRM, handler)
            signal.setitimer(signal.ITIMER_REAL, *timer)

    def _ring(self, number: int, frame: FrameType | None = None) -> None:
        """The alarm went off; the work may have been finished just now."""
        if self._patient:
            raise Woken


def _on_main_thread() -> bool:
    return threading.current_thread() is threading.main_thread()


@contextlib.contextmanager
def stop_requests() -> Iterator[StopRequest]:
    """Turn SIGINT and SIGTERM into a :class:`StopRequest` inside the block.

    Only the main thread can; in others signals stay as they are.
    """
    request = StopRequest()
    if not _on_main_thread():
        yield request
        return
    before = {number: signal.signal(number, request.ask) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield request
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
