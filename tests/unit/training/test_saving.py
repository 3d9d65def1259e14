"""Checkpoints beside training: the same bits, one at a time, and no fault is lost."""

from __future__ import annotations

import os
import signal
import threading
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from types import MappingProxyType

import pytest
from tests import tiny_run
from tests.tiny_run import Stream, files, names, tiny_model

from plait.core.errors import CheckpointError, DataError, ResourceError, Stopped
from plait.core.files import read_jsonl
from plait.core.snapshot import later, save_tensors
from plait.core.tensors import Batch
from plait.training import checkpoint
from plait.training.settings import Batches, FitResult


def train(
    folder: Path,
    *,
    beside: bool = True,
    hold: Mapping[int, Callable[[], object]] = MappingProxyType({}),
    batches: Batches | None = None,
    seen: list | None = None,
) -> FitResult:
    """Saves every step; ``hold``: what to call when the checkpoint of a step is written."""
    model = tiny_model()

    def save(temp: Path) -> None:
        save_tensors(model.state_dict(), temp / "model.safetensors")
        later(hold.get(int(temp.name.split(".")[1]), lambda: None))

    changes = {"save_every": 1, "keep_last": 9, "async_save": beside}
    return tiny_run.train(folder, model=model, save_model=save, batches=batches, seen=seen, **changes)


def test_every_checkpoint_has_the_bits_of_one_written_within_the_step(tmp_path: Path) -> None:
    train(tmp_path / "within", beside=False)
    slow = {step: lambda: time.sleep(0.05) for step in range(7)}  # weights move on before they are written
    result = train(tmp_path / "beside", hold=slow)
    assert files(tmp_path / "within") == files(tmp_path / "beside")
    assert len(files(tmp_path / "within")) == 18
    assert result.checkpoint == tmp_path / "beside/checkpoints/000006"
    assert train(tmp_path / "beside").resumed_from == 6


def test_training_goes_on_while_one_is_written_and_the_next_save_waits(tmp_path: Path) -> None:
    gate, at_two = threading.Event(), threading.Event()

    class Watched(Stream):
        def step_batches(self, step: int) -> list[Batch]:
            if step == 2:  # the third step begins while the second checkpoint is still being written
                assert at_two.wait(5)
                assert names(tmp_path) == [f".000002.{os.getpid()}.tmp", "000001"]
                threading.Timer(0.2, gate.set).start()
            return super().step_batches(step)

    def hold() -> None:
        at_two.set()
        assert gate.wait(5)

    seen: list = []
    train(tmp_path, hold={2: hold}, batches=Watched(), seen=seen)
    records = read_jsonl(tmp_path / "metrics.jsonl")
    assert records[3]["save_s"] >= 0.1  # what the third save waited is found in the record of the step after it
    notes = [e.text for e in seen if "saved" in e.text]
    assert [note.split()[1] for note in notes] == [f"{n:06d}" for n in range(1, 7)]
    assert "beside training, which waited" in notes[0]


def test_seconds_within_the_step_are_recorded_too(tmp_path: Path) -> None:
    train(tmp_path, beside=False, hold={2: lambda: time.sleep(0.2)})
    records = read_jsonl(tmp_path / "metrics.jsonl")
    assert records[2]["save_s"] >= 0.2
    assert records[0]["save_s"] == 0.0


def full() -> None:
    with open("/dev/full", "wb") as file:
        file.write(b"weights")


@pytest.mark.parametrize("step", [2, 6])
def test_a_full_disk_is_the_same_error_at_the_next_step_and_leaves_the_checkpoints_before(
    tmp_path: Path, step: int
) -> None:
    with pytest.raises(ResourceError, match="No space left on device") as error:
        train(tmp_path, hold={step: full})
    assert error.value.exit_code == 5
    assert "MiB free" in error.value.cause
    assert names(tmp_path) == [f"{n:06d}" for n in range(1, step)]
    assert len(read_jsonl(tmp_path / "metrics.jsonl")) <= min(step + 1, 6)
    assert train(tmp_path).resumed_from == step - 1


def test_what_does_not_read_back_is_the_same_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    verify = checkpoint.verify

    def refuse(folder: Path) -> None:
        verify(folder)
        if folder.name == "000003":
            raise CheckpointError("damaged: as if", place=str(folder), remedy="-")

    monkeypatch.setattr(checkpoint, "verify", refuse)
    with pytest.raises(CheckpointError, match="as if"):
        train(tmp_path)


def test_a_thread_that_cannot_be_started_is_an_error_not_a_wait_for_ever(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    start = threading.Thread.start

    def refuse(self: threading.Thread) -> None:
        if self.name == "checkpoint" and (tmp_path / "checkpoints" / "000002").is_dir():
            raise RuntimeError("can't start new thread")
        start(self)

    with monkeypatch.context() as patch:
        patch.setattr(threading.Thread, "start", refuse)
        with pytest.raises(ResourceError, match="can't start new thread") as error:
            train(tmp_path)
    assert "async_save" in error.value.remedy
    assert "000003" in error.value.place
    assert names(tmp_path) == ["000001", "000002"]
    train(tmp_path / "whole")
    assert train(tmp_path).resumed_from == 2
    assert {k: v for k, v in files(tmp_path / "whole").items() if "/000006/" in k}.items() <= files(tmp_path).items()


class Broken(Stream):
    def step_batches(self, step: int) -> list[Batch]:
        if step == 3:
            raise DataError("no such picture", place="x", remedy="-")
        return super().step_batches(step)


def test_a_fault_of_training_waits_for_the_checkpoint_on_its_way(tmp_path: Path) -> None:
    with pytest.raises(DataError) as error:
        train(tmp_path, hold={3: lambda: time.sleep(0.3)}, batches=Broken())
    assert names(tmp_path) == ["000001", "000002", "000003"]
    assert not getattr(error.value, "__notes__", [])


def test_a_fault_of_training_does_not_hide_one_of_the_checkpoint(tmp_path: Path) -> None:
    def slow_and_full() -> None:
        time.sleep(0.3)
        full()

    with pytest.raises(DataError) as error:
        train(tmp_path, hold={3: slow_and_full}, batches=Broken())
    assert "not saved either: cannot write: No space left" in error.value.__notes__[0]
    assert names(tmp_path) == ["000001", "000002"]


def test_a_second_signal_does_not_wait(tmp_path: Path) -> None:
    gate = threading.Event()

    class Twice(Stream):
        def step_batches(self, step: int) -> list[Batch]:
            if step == 2:
                threading.Timer(0.2, os.kill, (os.getpid(), signal.SIGTERM)).start()
                os.kill(os.getpid(), signal.SIGTERM)
            return super().step_batches(step)

    began = time.monotonic()
    with pytest.raises(Stopped, match="at once"):
        train(tmp_path, hold={2: lambda: gate.wait(20)}, batches=Twice())
    assert time.monotonic() - began < 10
    assert "000001" in names(tmp_path)
    assert "000002" not in names(tmp_path)
    gate.set()
