"""SIGKILL of a sweep in the middle of a trial, with processes as a person would have them: the table stays the same."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from tests.tiny_recipe import write_recipe

from plait.core.errors import UsageError
from plait.core.files import lock, read_json
from plait.recipes import run as runner
from plait.recipes.search.run import resume, start
from plait.recipes.search.sweep import load_sweep
from plait.recipes.search.work import Ended, Watcher

WORDS = (
    "metric=pretrain.loss",
    "method=grid",
    "stages.pretrain.lr=[1e-3, 1e-2]",
    "stages.pretrain.steps=400",
    "stages.pretrain.save_every=100",
    "stages.pretrain.d_hidden=8",
    "stages.pretrain.d_shared=8",
    "stages.tune=null",
    "stages.align=null",
)


def in_process(run: Path, watch: Watcher | None) -> Ended:
    """A trial without a process of its own."""
    runner.resume(run)
    return Ended(code=0, stopped=watch is not None and not watch(True))


@pytest.mark.row("S3-28")
def test_killed_in_a_trial_and_resumed_nothing_differs(tmp_path: Path, tiny_folders: dict[str, Path]) -> None:
    recipe = write_recipe(tmp_path, tiny_folders, steps=2)
    whole = start(load_sweep(str(recipe), WORDS), root=tmp_path / "whole", worker=in_process)
    command = [sys.executable, "-m", "plait", "sweep", str(recipe), *WORDS, "--sweeps", str(tmp_path / "killed")]
    with (tmp_path / "log.txt").open("w") as log:
        process = subprocess.Popen(command, stdout=log, stderr=log, env=os.environ | {"OMP_NUM_THREADS": "2"})
    folder = tmp_path / "killed" / "tiny-0001"
    metrics = folder / "trials" / "trial-0000" / "02-pretrain" / "metrics.jsonl"
    until = time.monotonic() + 120
    while not (metrics.is_file() and metrics.read_text().count("\n") > 10):
        assert process.poll() is None, (tmp_path / "log.txt").read_text()
        assert time.monotonic() < until
        time.sleep(0.01)
    process.send_signal(signal.SIGKILL)
    process.wait()
    trial = folder / "trials" / "trial-0000"
    assert not (trial / "result.json").exists()
    _until_free(trial)  # the trial notices by itself, and saves its state
    kinds = [json.loads(line)["kind"] for line in (trial / "events.jsonl").read_text().splitlines()]
    assert kinds[-1] == "stopped"
    assert not (trial / "02-pretrain" / "done.json").exists()
    found = resume(folder, worker=in_process)
    assert (folder / "sweep.csv").read_text() == (whole.folder / "sweep.csv").read_text()
    assert found.final is not None
    assert whole.final is not None
    both = [read_json(at / "02-pretrain" / "scores.json") for at in (found.final, whole.final)]
    assert both[0] == both[1]
    looks = [read_json(at / "test_access.json") for at in (folder, whole.folder)]
    assert looks[0] == looks[1]
    assert len(looks[0]) == 1


def _until_free(run: Path) -> None:
    until = time.monotonic() + 60
    while True:
        try:
            with lock(run):
                return
        except UsageError:
            assert time.monotonic() < until
            time.sleep(0.1)
