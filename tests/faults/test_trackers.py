"""T17: a tracker that raises, hangs, is slow, dies or has no disk never costs the run; what was not sent is said."""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any, ClassVar

import pytest
from tests.unit.recipes.test_trackers import board, make_run, write

from plait.core.errors import Stopped
from plait.core.events import Events
from plait.core.files import read_json
from plait.recipes import records as records_module
from plait.recipes.follower import Follower, follow
from plait.recipes.records import Records, Sent, sent_file
from plait.recipes.trackers import Mlflow, TensorBoard
from plait.recipes.tracking import Beside, account, tracking
from plait.training.monitor import Monitor, Plan

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
    def scores(self, stage, values): {scores}
    def flush(self): pass
    def finish(self): {finish}

sys.exit(serve(Path(sys.argv[1]), "scripted", Scripted, queues={queues}))
"""


def beside(run: Path, fault: str, finish: str = "pass", *, scores: str = "pass", queues: bool = False) -> Beside:
    script = SCRIPT.format(fault=fault, finish=finish, scores=scores, queues=queues)
    return Beside(name="scripted", command=[sys.executable, "-c", script, str(run)])


def work(run: Path, one: Beside, *, patience_s: float = 8.0, until: int = 0) -> tuple[list[Any], float]:
    """What is said in the end of a run that takes until so many records came, and how long the end took."""
    seen: list[Any] = []
    came, begun = run / "came.txt", time.monotonic()
    with tracking(run, [one], events=Events(listeners=(seen.append,)), patience_s=patience_s):
        while (
            until and time.monotonic() - begun < 60.0 and not (came.is_file() and came.read_text().count("\n") == until)
        ):
            time.sleep(0.05)
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


def test_a_damaged_line_is_said_with_its_place_and_the_others_are_sent_t17(run: Path) -> None:
    metrics = next(run.glob("*/decoder/metrics.jsonl"))
    lines = metrics.read_text().splitlines(keepends=True)
    metrics.write_text("".join([*lines[:2], '{"step": 3, "lo\n', *lines[3:]]))
    (warned, said), _ = work(run, beside(run, "pass"), patience_s=30.0)
    place = f"{metrics.relative_to(run)}:3"
    assert (warned.kind, warned.text) == ("warning", f"scripted: 1 damaged line was not sent: {place}")
    assert said.text == "scripted: 9 records sent"


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


@pytest.mark.parametrize(
    ("finish", "why"),
    [("time.sleep(1000)", "it did not answer in time"), ("1 / 0", "ZeroDivisionError: division by zero")],
    ids=["hangs", "raises"],
)
@pytest.mark.parametrize("queues", [False, True])
def test_one_that_fails_when_it_is_closed_is_ended_and_said_t17(
    run: Path, finish: str, why: str, *, queues: bool
) -> None:
    (said,), took = work(run, beside(run, "pass", finish=finish, queues=queues), patience_s=3.0, until=10)
    assert took < 8.0
    assert said.kind == "warning"
    expected = (
        f"10 of 10 records may not have come there ({why}). metrics.jsonl has all: `plait track tiny-0001` sends them "
        "later"
        if queues
        else f"10 records were sent, but it was not closed ({why}). `plait track tiny-0001` does it again"
    )
    assert said.text == f"scripted: {expected}"

    out: list[tuple[str, int]] = []
    again = Follower(run, "scripted", lambda told: Failing(out, []), queues=queues)
    assert again.send() == len(out) == (10 if queues else 0)
    again.finish()
    assert account(run, "scripted").fault() == ""
    once_more = Follower(run, "scripted", lambda told: Failing(out, []), queues=queues)
    assert once_more.send() == 0
    once_more.finish()


def test_scores_that_were_not_sent_are_said_t17(run: Path) -> None:
    (run / "03-tune" / "done.json").write_text("{}")
    (said,), _ = work(run, beside(run, "pass", scores="1 / 0"))
    end = ". metrics.jsonl has all: `plait track tiny-0001` sends them later"
    assert said.text == (f"scripted: scores of tune may not have come there (ZeroDivisionError: division by zero){end}")
    (run / "03-tune" / "scores.json").write_text("[")  # damaged
    (said,), _ = work(run, beside(run, "pass"))
    assert said.text.startswith("scripted: scores of tune may not have come there (DataError: ")
    (run / "03-tune" / "scores.json").write_text("[]")
    (said,), _ = work(run, beside(run, "pass"))
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
        self.values: list[Any] = []

    def log(self, stage: str, step: int, values: Any) -> None:
        if self.fails and self.fails.pop(0):
            raise TimeoutError("slow")
        self.out.append((stage, step))
        self.values.append(dict(values))

    def scores(self, stage: str, values: Any) -> None: ...
    def flush(self) -> None: ...
    def finish(self) -> None: ...


class Buffering(Failing):
    """Keeps what it is given when it is flushed, if that works; once broken it stays so."""

    def __init__(self, out: list[tuple[str, int]], fails: list[bool]) -> None:
        super().__init__([], [])
        self.kept, self.breaks = out, fails

    def flush(self) -> None:
        if self.breaks and self.breaks[0]:
            raise OSError(28, "No space left on device")
        self.breaks[:1] = []
        self.kept += self.out
        self.out.clear()


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


@pytest.mark.parametrize("purges", [False, True])
def test_what_failed_while_it_was_flushed_is_sent_again_by_one_opened_anew_t17(run: Path, *, purges: bool) -> None:
    out: list[tuple[str, int]] = []
    broken = [[True], [False, True], [False, False]]  # the second one breaks at its second batch
    opened: list[Buffering] = []

    def opens(told: Any) -> Buffering:
        opened.append(Buffering(out, broken.pop(0)))
        return opened[-1]

    follower = Follower(run, "buffering", opens, purges=purges)
    for sent in (0, 5):
        with pytest.raises(OSError, match="No space"):
            follower.send()
        found = account(run, "buffering")
        assert (found.sent, found.missing) == (sent, 10 - sent)
        assert "No space" in found.error
    assert follower.send() == 5
    assert follower.send() == 0
    follower.finish()
    assert out == [(f"tune/{phase}", step) for phase in ("decoder", "words") for step in range(1, 6)]
    assert len(opened) == 3
    assert account(run, "buffering").fault() == ""


@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")  # of TensorBoard's own thread
def test_a_tensorboard_without_disk_has_every_record_once_there_is_room_t17(
    run: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    writer = pytest.importorskip("tensorboard.summary.writer.record_writer").RecordWriter
    right, left = writer.write, [30]

    def write_some(self: Any, data: bytes) -> None:
        left[0] -= 1
        if left[0] < 0:
            raise OSError(28, "No space left on device")
        right(self, data)

    spec = TensorBoard()
    follower = Follower(run, spec.name, spec.open, purges=spec.purges)
    with monkeypatch.context() as patch:
        patch.setattr(writer, "write", write_some)
        for _ in range(2):
            with pytest.raises(OSError, match="No space"):
                follower.send()
    assert account(run, spec.name).missing
    assert follower.send()
    follower.finish()
    for phase in ("words", "decoder"):
        assert board(run, f"tune/{phase}")["loss"] == [(s, round(10.0 / s, 5)) for s in range(1, 6)]
    assert account(run, spec.name).fault() == ""


def test_one_that_queues_and_fails_twice_is_sent_all_again_t17(run: Path) -> None:
    class Broken(Failing):
        def finish(self) -> None:
            raise ConnectionError("gone")

    lost: list[tuple[str, int]] = []
    out: list[tuple[str, int]] = []
    trackers = [Broken(lost, [False] * 7 + [True]), Failing(out, [])]
    follower = Follower(run, "queues", lambda told: trackers.pop(0), queues=True)
    with pytest.raises(TimeoutError):
        follower.send()
    assert len(lost) == 7
    assert follower.send() == len(out) == 10
    assert account(run, "queues").sent == 0  # not before it was closed
    follower.finish()
    assert account(run, "queues").sent == 10


def amend(run: Path) -> None:
    """As a resumed run does, whose signal came in an evaluation."""
    plan = Plan(task="tune", total=9)
    Monitor(run / "03-tune" / "decoder", plan, step=5, events=Events()).amend(5, {"evaluation": 0.75})


def test_an_evaluation_that_came_after_its_record_is_sent_t17(run: Path) -> None:
    tracker = Failing([], [])
    for expected in (10, 0):
        follower = Follower(run, "one", lambda told: tracker)
        assert follower.send() == expected
        follower.finish()
    follower = Follower(run, "one", lambda told: tracker)
    follower.send()
    amend(run)
    assert account(run, "one").missing == 1
    assert follower.send() == 1
    assert (tracker.out[-1], tracker.values[-1]) == (("tune/decoder", 5), {"evaluation": 0.75})
    assert follower.send() == 0
    write(run, "decoder", range(6, 8))
    assert follower.send() == 2
    follower.finish()
    assert account(run, "one").fault() == ""


def test_a_tensorboard_has_an_evaluation_that_came_later_beside_the_loss_t17(run: Path) -> None:
    pytest.importorskip("tensorboard")
    spec = TensorBoard()
    follower = Follower(run, spec.name, spec.open, purges=spec.purges)
    assert follower.send() == 10
    amend(run)
    assert follower.send() == 1
    follower.finish()
    found = board(run, "tune/decoder")
    assert found["evaluation"] == [(5, 0.75)]
    assert found["loss"] == [(s, round(10.0 / s, 5)) for s in range(1, 6)]


def test_a_look_parses_what_came_since_the_last_one_alone(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    parsed: list[str] = []
    right = json.loads

    def loads(text: str) -> Any:
        parsed.append(text)
        return right(text)

    monkeypatch.setattr(records_module.json, "loads", loads)
    records, sent = Records(run), Sent()

    def look() -> list[int]:
        parsed.clear()
        steps: list[int] = []
        for stage, found in records.waiting(sent):
            steps += [step for step, _ in found]
            sent.upto[stage] = found[-1][0]
        return steps

    metrics = run / "03-tune" / "decoder" / "metrics.jsonl"
    assert (len(look()), len(parsed)) == (10, 10)
    assert (look(), parsed) == ([], [])
    write(run, "decoder", range(6, 8), end='\n{"step": 8, "lo')
    assert (look(), len(parsed)) == ([6, 7], 2)
    with metrics.open("a") as file:
        file.write('ss": 1.0}\n')
    assert (look(), len(parsed)) == ([8], 1)
    whole = metrics.read_text().splitlines(keepends=True)
    metrics.write_text("".join(whole[:4]))  # cut, in the same file
    assert (look(), len(parsed)) == ([], 4)
    other = metrics.with_name("other")
    other.write_text("".join(whole) + '{"step": 9, "loss": 1.0}\n')
    other.replace(metrics)  # another file
    assert (look(), len(parsed)) == ([9], 9)


def test_a_file_that_was_replaced_under_the_same_number_is_read_from_its_beginning(run: Path) -> None:
    metrics = run / "03-tune" / "decoder" / "metrics.jsonl"
    records = Records(run)
    assert len(list(records.waiting(Sent()))) == 2
    lines = [json.dumps({"step": step, "loss": 1.0, "other": "x" * 99}) for step in range(1, 12)]
    metrics.write_text("\n".join(lines) + "\n")  # the inode stays, and it is longer
    ((stage, found),) = records.waiting(Sent(upto={"tune/words": 5}))
    assert (stage, [step for step, _ in found]) == ("tune/decoder", list(range(1, 12)))


class FakeMlflow:
    """As much of MLflow's client as is called; what it is told first of parameters fails."""

    made: ClassVar[list[str]] = []
    params: ClassVar[dict[str, str]] = {}
    fails: ClassVar[list[bool]] = []

    def __init__(self, tracking_uri: str) -> None: ...

    def get_experiment_by_name(self, name: str) -> None: ...

    def create_experiment(self, name: str, folder: str | None) -> str:
        return "0"

    def create_run(self, experiment: str, run_name: str) -> Any:
        self.made.append(f"run{len(self.made)}")
        return SimpleNamespace(info=SimpleNamespace(run_id=self.made[-1]))

    def update_run(self, name: str, status: str) -> None: ...

    def get_run(self, name: str) -> Any:
        return SimpleNamespace(data=SimpleNamespace(params=dict(self.params)))

    def log_param(self, name: str, key: str, value: str) -> None:
        if self.fails.pop(0):
            raise ConnectionError("gone")
        self.params[key] = value

    def log_batch(self, name: str, metrics: Any = (), params: Any = ()) -> None:
        for key, value in params:
            self.log_param(name, key, value)

    def set_terminated(self, name: str) -> None: ...


def test_an_mlflow_that_fails_at_its_parameters_makes_one_run_t17(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    names = {"made": [], "params": {}, "fails": [False, True, False, True, False, False, False, False]}
    for name, value in names.items():
        monkeypatch.setattr(FakeMlflow, name, value)
    entities = SimpleNamespace(Metric=lambda *of: of, Param=lambda *of: of)
    monkeypatch.setitem(sys.modules, "mlflow", SimpleNamespace(MlflowClient=FakeMlflow, entities=entities))  # pyright: ignore[reportArgumentType]
    monkeypatch.setitem(sys.modules, "mlflow.entities", entities)  # pyright: ignore[reportArgumentType]
    for failed in (True, True, False):  # each time another process
        follower = Follower(run, "mlflow", Mlflow().open)
        if failed:
            with pytest.raises(ConnectionError):
                follower.send()
        else:
            assert follower.send() == 10
        follower.finish()
    assert FakeMlflow.made == ["run0"]
    assert FakeMlflow.params["name"] == "tiny"
    assert set(FakeMlflow.params) == {"name", "seed", "trackers"}
    assert account(run, "mlflow").fault() == ""
