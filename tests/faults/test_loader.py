"""A worker is killed, ends, hangs, is stopped or raises: once, and training goes on; twice, and the step is named."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from tests.unit.data import stream
from tests.unit.data.stream import Faulty, Stream

from plait.core.errors import DataError
from plait.core.events import Event, Events
from plait.data.loader import Loader

TIMEOUT_S = 5.0  # of what hangs; a worker's start must fit in
FAULTS = {
    "killed": (stream.killed, "was killed by SIGKILL"),
    "killed at the event": (stream.killed_at_the_event, "was killed by SIGKILL"),
    "ended": (stream.ended, "ended with exit code 7"),
    "hanging": (stream.hang, "nothing came for 5 s"),
    "stopped": (stream.stopped, "nothing came for 5 s"),
    "raising": (stream.crash, "ValueError: a negative number of pictures"),
}


def alive(folder: Path) -> list[int]:
    """Processes that made batches and are still there, zombies included."""
    pids = [int(path.name.removeprefix("pid-")) for path in folder.glob("pid-*")]
    return [pid for pid in pids if pid != os.getpid() and Path(f"/proc/{pid}").exists()]


def gone(folder: Path, *, within_s: float = 10.0) -> bool:
    deadline = time.monotonic() + within_s
    while alive(folder) and time.monotonic() < deadline:
        time.sleep(0.05)
    return not alive(folder)


def loader(source: Stream, heard: list[Event], workers: int = 2) -> Loader:
    made = Loader(
        source, steps=6, workers=workers, ahead=1, timeout_s=TIMEOUT_S, events=Events(listeners=(heard.append,))
    )
    with Loader(Stream(), steps=6, workers=1) as warm:  # the server that workers are forked from has imported torch
        warm.step_batches(0)
    return made


@pytest.mark.parametrize("name", [name for name in FAULTS if name != "hanging"])
def test_once_is_mended_and_said(tmp_path: Path, name: str) -> None:
    fault, said = FAULTS[name]
    heard: list[Event] = []
    with loader(Faulty(tmp_path, fault, once=True), heard) as mended:
        for step in range(2, 6):
            assert torch.equal(mended.step_batches(step)[0].token_ids, Stream().step_batches(step)[0].token_ids)
    (warning,) = [event for event in heard if event.kind == "warning"]
    assert said in warning.text
    assert "step 3" in warning.text
    assert gone(tmp_path)


@pytest.mark.parametrize("name", [name for name in FAULTS if name != "stopped"])
def test_twice_names_the_step_and_leaves_no_child(tmp_path: Path, name: str) -> None:
    fault, said = FAULTS[name]
    with loader(Faulty(tmp_path, fault), []) as broken:
        broken.step_batches(2)
        with pytest.raises(DataError, match=said) as caught:
            broken.step_batches(3)
        assert gone(tmp_path), "a child is left, though the loader is still open"
    assert caught.value.exit_code == 4
    assert caught.value.place == "step 3, samples 3-3-0, 3-3-1, 3-3-2, 3-2-0, 3-2-1"
    assert "workers=0" in caught.value.remedy
    assert len(list(tmp_path.glob("try-*"))) == 2


def test_the_step_that_kills_is_named_though_another_one_is_waited_for(tmp_path: Path) -> None:
    heard: list[Event] = []
    with loader(Faulty(tmp_path, stream.killed, step=4), heard, workers=4) as broken:
        for step in range(4):
            broken.step_batches(step)
        with pytest.raises(DataError) as caught:
            broken.step_batches(4)
    assert caught.value.place.startswith("step 4, samples 4-3-0")
    assert gone(tmp_path)


def test_what_the_source_says_about_its_data_arrives_as_it_was_said(tmp_path: Path) -> None:
    with loader(Faulty(tmp_path, stream.refuse), []) as refused:
        refused.step_batches(2)
        with pytest.raises(DataError) as caught:
            refused.step_batches(3)
    error = caught.value
    assert (error.cause, error.place, error.remedy) == ("the picture is cut off", "sample 3-3-1", "take it out")
    assert len(list(tmp_path.glob("try-*"))) == 1, "a pure function would say it again"
    assert gone(tmp_path)


TRAINER = """
import signal, sys
from pathlib import Path
from plait.data.loader import Loader
from plait.training.interrupt import Woken, stop_requests
from tests.unit.data.stream import Faulty, hang
if __name__ == "__main__":
    with Loader(Faulty(Path(sys.argv[1]), hang), steps=6, workers=2) as loader, stop_requests() as stop:
        for step in range(6):
            try:
                with stop.wake():
                    loader.step_batches(step)
            except Woken:
                sys.exit(100 + stop.signal)
            print(step, flush=True)
"""


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGKILL])
def test_no_worker_outlives_a_trainer_that_is_stopped_while_it_waits(tmp_path: Path, number: signal.Signals) -> None:
    script = tmp_path / "trainer.py"
    script.write_text(TRAINER)
    folder = tmp_path / "seen"
    folder.mkdir()
    trainer = subprocess.Popen(
        [sys.executable, str(script), str(folder)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
        env=os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(sys.path)},
    )
    try:
        assert trainer.stdout is not None
        while trainer.stdout.readline().strip() != "2":
            assert trainer.poll() is None, trainer.stderr and trainer.stderr.read()
        time.sleep(0.5)
        assert alive(folder)
        began = time.monotonic()
        if number == signal.SIGINT:  # as Ctrl-C in a terminal: to the workers, too
            os.killpg(trainer.pid, number)
        else:
            trainer.send_signal(number)
        _, said = trainer.communicate(timeout=30)
        assert time.monotonic() - began < 5
    finally:
        trainer.kill()
    assert trainer.returncode == (-number if number == signal.SIGKILL else 100 + number), said
    assert "Traceback" not in said
    assert number == signal.SIGKILL or "leaked" not in said
    assert gone(folder)
