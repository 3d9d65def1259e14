"""``kill -9`` of a whole run at several points: `plait resume` ends with the very weights and scores of a quiet run."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from plait.core.files import sha256_file

pytestmark = [pytest.mark.slow, pytest.mark.real]

SETTINGS = ["data.source.max_train=120", "data.source.max_test=20", "stages.pretrain.steps=40"]
SETTINGS += ["stages.pretrain.save_every=10", "stages.pretrain.batch_size=64"]
RESULTS = ("01-data/ledger.jsonl", "01-data/card.md", "02-pretrain/scores.json", "02-pretrain/predictions.jsonl")


def plait(*words: str, folder: Path) -> subprocess.Popen[bytes]:
    command = [sys.executable, "-m", "plait", *words]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    return subprocess.Popen(command, cwd=folder, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE)


def finish(process: subprocess.Popen[bytes]) -> None:
    _, err = process.communicate(timeout=300)
    assert process.returncode == 0, err.decode()


def results(folder: Path) -> dict[str, str]:
    run = folder / "runs" / "latest"
    weights = list((run / "02-pretrain" / "checkpoints" / "000040").rglob("*.safetensors"))
    assert weights
    return {str(p.relative_to(run)): sha256_file(p) for p in [*weights, *(run / name for name in RESULTS)]}


@pytest.fixture(scope="module")
def quiet(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    folder = tmp_path_factory.mktemp("quiet")
    finish(plait("run", "quickstart-ci", *SETTINGS, folder=folder))
    return results(folder)


def any_of(pattern: str) -> Callable[[Path], bool]:
    return lambda folder: any(folder.glob(f"runs/latest/{pattern}"))


POINTS = {
    "before the data are sealed": any_of("01-data/.shards*"),
    "when features are made": any_of("02-pretrain/spec.json"),
    "after the first checkpoint": any_of("02-pretrain/checkpoints/000010/manifest.json"),
    "near the end": any_of("02-pretrain/checkpoints/000040"),
}


@pytest.mark.parametrize("point", POINTS)
def test_a_killed_run_resumes_to_identical_bits(point: str, quiet: dict[str, str], tmp_path: Path) -> None:
    process = plait("run", "quickstart-ci", *SETTINGS, folder=tmp_path)
    deadline = time.monotonic() + 120
    while not POINTS[point](tmp_path):
        assert process.poll() is None, "the run ended before the point was seen"
        assert time.monotonic() < deadline
        time.sleep(0.005)
    process.send_signal(signal.SIGKILL)
    process.communicate()
    finish(plait("resume", folder=tmp_path))
    assert results(tmp_path) == quiet
