"""Which run a command had begun before it was started again."""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from pathlib import Path

import pytest

from plait.core.launch import Launch
from plait.recipes.jobs import begun, job

pytestmark = pytest.mark.light

AGENT = Launch(id="7d05", agent="process 7 on a, begun at 5", restarts=0)
AGAIN = Launch(id="7d05", agent="process 7 on a, begun at 5", restarts=1)


def made(
    root: Path,
    name: str,
    *started: Launch,
    recipe: str = "mine.yaml",
    overrides: Sequence[str] = (),
    at: int = 0,
) -> Path:
    folder = root / name
    folder.mkdir(parents=True)
    (folder / "env.json").write_text(json.dumps({"threads": 1} | job(started, recipe=recipe, overrides=overrides)))
    os.utime(folder / "env.json", (at, at))
    return folder


def test_nothing_is_gone_on_with_that_a_person_starts(tmp_path: Path) -> None:
    made(tmp_path, "mine-0001", AGENT)
    assert begun(tmp_path, [], recipe="mine.yaml", overrides=[]) is None
    assert job([], recipe="mine.yaml", overrides=[]) == {}


def test_started_again_it_is_the_newest_run_of_this_command(tmp_path: Path) -> None:
    other = Launch(id="8e", agent="process 9 on a, begun at 6", restarts=0)
    made(tmp_path, "mine-0001", AGENT, at=1)
    mine = made(tmp_path, "mine-0002", AGENT, at=2)
    made(tmp_path, "mine-0003", other, at=3)
    made(tmp_path, "mine-0004", at=4)
    made(tmp_path, "yours-0001", AGENT, recipe="yours.yaml", at=5)
    made(tmp_path, "mine-0005", AGENT, overrides=["seed=2"], at=6)
    (tmp_path / "latest").symlink_to("mine-0002")
    for started in (AGENT, AGAIN):
        assert begun(tmp_path, [started], recipe="mine.yaml", overrides=()) == mine
    assert begun(tmp_path, [AGAIN], recipe="mine.yaml", overrides=["seed=2"]) == tmp_path / "mine-0005"
    assert begun(tmp_path, [AGAIN], recipe="mine.yaml", overrides=["seed=3"]) is None


def test_what_cannot_be_read_is_passed_over(tmp_path: Path) -> None:
    for number, text in enumerate(("", "[1]", '{"job": 3}', '{"job": {"id": "7d05"}}', "{")):
        folder = tmp_path / f"mine-000{number}"
        folder.mkdir()
        (folder / "env.json").write_text(text)
    assert begun(tmp_path, [AGAIN], recipe="mine.yaml", overrides=[]) is None
    assert begun(tmp_path / "nowhere", [AGAIN], recipe="mine.yaml", overrides=[]) is None
    mine = made(tmp_path, "mine-0009", AGENT)
    assert begun(tmp_path, [AGAIN], recipe="mine.yaml", overrides=[]) == mine


def test_a_machine_that_has_just_come_may_be_the_first(tmp_path: Path) -> None:
    came = Launch(id="7d05", agent="process 4 on b, begun at 8", restarts=0)
    mine = made(tmp_path, "mine-0001", AGENT)
    assert begun(tmp_path, [came, AGENT], recipe="mine.yaml", overrides=[]) == mine
    assert begun(tmp_path, [came], recipe="mine.yaml", overrides=[]) is None
