"""Pieces of work in this process and in others, and tables."""

import os

import pytest

from plait.core.events import Event, Events
from plait.studies.text import percent, table
from plait.studies.workers import finished


def squared(x: int) -> tuple[int, int]:
    return x * x, os.getpid()


def test_one_worker_is_this_process_and_keeps_the_order() -> None:
    seen: list[Event] = []
    found = list(finished(squared, [3, 1, 2], workers=1, events=Events(None, listeners=(seen.append,))))
    assert found == [(9, os.getpid()), (1, os.getpid()), (4, os.getpid())]
    assert [(e.fields["done"], e.fields["total"]) for e in seen] == [(1, 3), (2, 3), (3, 3)]


def test_nothing_to_do_is_no_fault() -> None:
    assert list(finished(squared, [], workers=0, events=Events())) == []


def inverse(x: int) -> float:
    return 1 / x


def test_a_fault_in_a_piece_comes_out() -> None:
    with pytest.raises(ZeroDivisionError):
        list(finished(inverse, [1, 0], workers=1, events=Events()))


def test_tables_line_up() -> None:
    lines = table([["a", "bcd"], ["long", "e"]]).splitlines()
    assert lines == ["| a    | bcd |", "|------|-----|", "| long | e   |"]
    assert percent({"value": 0.123, "low": 0.0, "high": 1.0}) == "12 (0-100)"
