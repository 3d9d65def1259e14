"""A connection over which nothing is sent ends with the process at its other end."""

from __future__ import annotations

import pytest

from plait.core.lifeline import Lifeline

pytestmark = pytest.mark.light


def test_it_holds_until_the_first_one_lets_go() -> None:
    first, port = Lifeline.offer(3)
    others = [Lifeline.hold(("nowhere.invalid", "127.0.0.1"), port, patience_s=5.0) for _ in range(3)]
    assert all(others)
    assert [other.broken() for other in others] == [False] * 3
    others[0].close()
    assert not others[1].broken()
    first.close()
    assert [other.broken() for other in others[1:]] == [True] * 2
    for other in others:
        other.close()


def test_where_there_is_no_way_nothing_is_said_to_be_broken() -> None:
    first, port = Lifeline.offer(1)
    first.close()
    other = Lifeline.hold(("127.0.0.1",), port, patience_s=1.0)
    assert not other
    assert not other.broken()
    other.close()
