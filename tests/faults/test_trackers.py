"""T17: a tracker that raises, hangs, is slow, dies or has no disk never costs the run; what was not sent is said."""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path
from typing import Any

import pytest
from tests.unit.recipes.test_trackers import make_run

from plait.core.errors import Stopped
from plait.core.events import Events
from plait.core.files import read_json
from plait.recipes.follower import Follower, follow, sent_file
from plait.recipes.tracking import Beside, tracking

SCRIPT = """
import os, sys, time
from pathlib import Path
from plait.recipes.follower import serve

class Scripted:
    id = "scripted"
    def __init__(self, told):
        self.out = told.run / "came.txt"
    def log(self, stage, step, values):
        {fault}
        with self.out.open("a") as file:
            file.write(f"{{stage}} {{step}}\\n")
    def scores(self, stage, values): pass
    def flush(self): pass
    def finish(self): {finish}

sys.exit(serve(Path(sys.argv[1]), "scripted", Scripted))
"""


def beside(run: Path, fault: str, finish: str = "pass") -> Beside:
    return Beside(name="scripted", command=[sys.executable, "-c", SCRIPT.format(fault=fault, finish=finish), str(run)])


def work(run: Path, one: Beside, *, patience_s: float = 8.0) -> tuple[list[Any], float]:
    """What is said in the end of a run that takes no time, and how long the end took."""
    seen: list[Any] = []
    with tracking(run, [one], events=Events(listeners=(seen.append,)), patience_s=patience_s):
        begun = time.monotonic()
    return seen, time.monotonic() - begun


@pytest.fixture
def run(tmp_path: Path) -> Path:
    return make_run(tmp_path)


def test_what_works_is_sent_and_said_t17(run: Path) -> None:
    (said,), _ = work(run, beside(run, "pass"), patience_s=30.0)
    assert (said.kind, said.text) == ("note", "scripted: 10 records sent")
    came = (run / "came.txt").read_text().split("\n")
    assert came[:-1] == [f"tune/{phase} {step}" for phase in ("decoder", "words") for step in range(1, 6)]


@pytest.mark.parametrize(
    ("fault", "why", "sent"),
    [
        ("raise ConnectionError('no route to host')", "ConnectionError: no route to host", 0),
        ("1 / 0 if step == 3 else None", "ZeroDivisionError: division by zero", 2),
        ("time.sleep(1000)", "it did not answer in time", 0),
        ("os._exit(3)", "it did not answer in time", 0),
        ("raise OSError(28, 'No space left on device')", "OSError: [Errno 28] No space left on device", 0),
    ],
    ids=["dead server", "raises midway", "hangs", "dies", "disk"],
)
def test_a_fault_costs_no_more_than_the_patience_and_is_said_with_counts_t17(
    run: Path, fault: str, why: str, sent: int
) -> None:
    (said,), took = work(run, beside(run, fault))
    assert took < 12.0
    assert said.kind == "warning"
    assert said.text == (
        f"scripted: {10 - sent} of 10 records were not sent ({why}). metrics.jsonl has all: `plait track tiny-0001` "
        "sends them later"
    )
    assert (said.fields["sent"], said.fields["missing"]) == (sent, 10 - sent)


def test_one_that_hangs_when_it_is_closed_is_ended_t17(run: Path) -> None:
    (said,), took = work(run, beside(run, "pass", finish="time.sleep(1000)"))
    assert took < 12.0
    assert said.text == "scripted: 10 records sent"


def test_a_program_that_is_not_there_costs_nothing_t17(run: Path) -> None:
    seen, took = work(run, Beside(name="scripted", command=["/nowhere/python"]))
    assert took < 5.0
    assert [event.kind for event in seen] == ["warning", "warning"]
    assert "was not started" in seen[0].text


def test_a_run_that_is_told_to_stop_waits_less_and_its_end_is_its_own_t17(run: Path) -> None:
    begun = time.monotonic()
    with pytest.raises(Stopped), tracking(run, [beside(run, "time.sleep(1000)")], events=Events(), patience_s=8.0):
        raise Stopped(15, "told to")
    assert time.monotonic() - begun < 6.0


class Failing:
    """Raises at some calls."""

    id = "failing"

    def __init__(self, out: list[tuple[str, int]], fails: list[bool]) -> None:
        self.out, self.fails = out, fails

    def log(self, stage: str, step: int, values: Any) -> None:
        if self.fails and self.fails.pop(0):
            raise TimeoutError("slow")
        self.out.append((stage, step))

    def scores(self, stage: str, values: Any) -> None: ...
    def flush(self) -> None: ...
    def finish(self) -> None: ...


def test_what_failed_is_tried_again_and_comes_once_in_order_t17(run: Path) -> None:
    out: list[tuple[str, int]] = []
    tracker = Failing(out, [False, True, True, False, False, True])
    waits: list[float] = []

    def ended(seconds: float) -> bool:
        waits.append(seconds)
        return len(waits) == 6

    follow(Follower(run, "failing", lambda told: tracker), ended=ended)
    assert out == [(f"tune/{phase}", step) for phase in ("decoder", "words") for step in range(1, 6)]
    assert waits == [1.0, 2.0, 4.0, 8.0, 1.0, 1.0]  # longer while it fails
    assert read_json(sent_file(run, "failing"))["error"] == ""


def test_steps_on_their_way_when_it_was_killed_are_never_sent_twice_t17(run: Path) -> None:
    class Killed(Exception): ...

    class Dies(Failing):
        def log(self, stage: str, step: int, values: Any) -> None:
            super().log(stage, step, values)
            if step == 3:
                kept.append(sent_file(run, "dies").read_text())  # what the disk has at this moment
                raise Killed

    out: list[tuple[str, int]] = []
    kept: list[str] = []
    with pytest.raises(Killed):
        (first := Follower(run, "dies", lambda told: Dies(out, []))).send()
    first.finish()
    sent_file(run, "dies").write_text(kept[0])
    (again := Follower(run, "dies", lambda told: Failing(out, []))).send()
    again.finish()
    assert len(out) == len(set(out))
    assert json.loads(kept[0])["sending"] == ["tune/decoder", 1, 5]
