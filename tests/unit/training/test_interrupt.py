"""Patience after a signal, and whose alarm it was before."""

from __future__ import annotations

import os
import signal
import threading
import time
from collections.abc import Iterator

import pytest

from plait.core.errors import Stopped
from plait.training import interrupt
from plait.training.interrupt import Woken, stop_requests


@pytest.fixture(autouse=True)
def short(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(interrupt, "GRACE_S", 0.1)


@pytest.fixture
def anothers() -> Iterator[list[int]]:
    """An alarm of somebody else, as pytest-timeout has one."""
    rung: list[int] = []
    handler = signal.signal(signal.SIGALRM, lambda number, _: rung.append(number))
    timer = signal.setitimer(signal.ITIMER_REAL, 1.5)
    yield rung
    signal.signal(signal.SIGALRM, handler)
    signal.setitimer(signal.ITIMER_REAL, *timer)


def ask() -> None:
    os.kill(os.getpid(), signal.SIGTERM)


def asked(times: int) -> None:
    """Work that never ends of itself, and gets signals."""
    for _ in range(times):
        ask()
    until(20)


def until(seconds: float) -> None:
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        time.sleep(0.01)


def test_work_that_takes_too_long_after_a_signal_is_given_up_and_anothers_alarm_still_rings(
    anothers: list[int],
) -> None:
    handler = signal.getsignal(signal.SIGALRM)
    with stop_requests() as stop:
        began = time.monotonic()
        with pytest.raises(Woken), stop.patience():
            asked(1)
        assert time.monotonic() - began < 10
        assert signal.getsignal(signal.SIGALRM) is handler
        assert stop.signal == signal.SIGTERM
    until(2.0)
    assert anothers == [signal.SIGALRM]


def test_work_that_is_finished_in_time_is_not_disturbed() -> None:
    with stop_requests() as stop:
        with stop.patience():
            ask()
        until(0.3)
        assert stop


def test_without_a_signal_it_may_take_as_long_as_it_likes_and_the_alarm_is_not_touched(anothers: list[int]) -> None:
    handler = signal.getsignal(signal.SIGALRM)
    with stop_requests() as stop, stop.patience():
        until(0.3)
        assert signal.getsignal(signal.SIGALRM) is handler
        assert signal.getitimer(signal.ITIMER_REAL)[0] > 0


def test_time_runs_from_the_signal_not_from_the_block() -> None:
    with stop_requests() as stop:
        ask()
        until(0.2)
        began = time.monotonic()
        with pytest.raises(Woken), stop.patience():
            until(20)
        assert time.monotonic() - began < 10


def test_a_signal_that_came_before_ends_a_wait_at_once() -> None:
    with stop_requests() as stop:
        ask()
        with pytest.raises(Woken), stop.wake():
            until(20)
        until(0.01)  # and nothing is raised afterwards


def test_a_second_signal_ends_it_at_once() -> None:
    with stop_requests() as stop, pytest.raises(Stopped, match="at once"), stop.patience():
        asked(2)


def test_other_threads_are_left_alone() -> None:
    entered: list[bool] = []

    def work() -> None:
        with stop_requests() as stop, stop.patience():
            entered.append(bool(stop))

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert entered == [False]
