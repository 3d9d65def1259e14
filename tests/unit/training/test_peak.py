"""What a run is said to leave on disk, beside the folders of tiny real runs."""

from __future__ import annotations

from collections.abc import Callable
from itertools import count
from pathlib import Path

import pytest
from tests.tiny_run import names, train

from plait.training.guard import Guard
from plait.training.peak import checkpoints_left
from plait.training.settings import Stopping


def left(folder: Path, *, steps: int, every: int, judged: int, sign: int, guard: Guard | None = None) -> int:
    """Train, with evaluations that fall (each is the best) or rise (the first one is)."""
    values = count(1)
    evaluate: Callable[[], float] | None = (lambda: float(sign * next(values))) if judged else None
    stopping = Stopping(every=judged) if judged else None
    train(folder, steps=steps, save_every=every, stopping=stopping, evaluate=evaluate, guard=guard or Guard())
    return len(names(folder))


@pytest.mark.row("S4-58")
@pytest.mark.parametrize("steps", [1, 2, 6])
@pytest.mark.parametrize("every", [0, 2, 5])
@pytest.mark.parametrize("judged", [0, 1, 4, 9])
def test_as_many_checkpoints_are_left_as_are_said(tmp_path: Path, steps: int, every: int, judged: int) -> None:
    asked = {"steps": steps, "every": every, "judged": judged}
    found = [left(tmp_path / str(sign), **asked, sign=sign) for sign in ((-1, 1) if judged else (1,))]
    assert max(found) == checkpoints_left(steps, every, judged=judged)


def test_going_back_leaves_no_more(tmp_path: Path) -> None:
    guard = Guard(spike="rewind", not_finite="rewind")
    assert left(tmp_path / "plain", steps=7, every=2, judged=0, sign=1, guard=guard) == checkpoints_left(7, 2) == 2
    found = left(tmp_path / "judged", steps=7, every=2, judged=1, sign=1, guard=guard)
    assert found == checkpoints_left(7, 2, judged=1) == 3
