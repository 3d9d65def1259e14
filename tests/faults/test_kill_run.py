"""``kill -9`` of a whole run at several points: `plait resume` ends with the very weights and scores of a quiet run."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from plait.core.files import sha256_file
from plait.core.packages import home

pytestmark = pytest.mark.real

SETTINGS = ["data.source.max_train=120", "data.source.max_test=20", "stages.pretrain.steps=40"]
SETTINGS += ["stages.pretrain.save_every=10", "stages.pretrain.batch_size=64"]
SETTINGS += [f"stages.{later}=null" for later in ("tune", "align", "evaluate", "compress")]  # see test_kill_tune
RESULTS = ("01-data/ledger.jsonl", "01-data/card.md", "02-pretrain/scores.json", "02-pretrain/predictions.jsonl")


def plait(*words: str, folder: Path) -> subprocess.Popen[bytes]:
    """A process with its own home: the fetched packages of this machine, but no features made before."""
    own = folder / "home"
    own.mkdir(exist_ok=True)
    for shared in ("packages", "converted"):
        if not (own / shared).exists() and (home() / shared).exists():
            (own / shared).symlink_to(home() / shared)
    command = [sys.executable, "-m", "plait", *words]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PLAIT_HOME": str(own)}
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


POINTS = {
    "before the data are sealed": "runs/latest/01-data/.shards*",
    "when features are made": "home/features/**/*.safetensors",
    "after the first checkpoint": "runs/latest/02-pretrain/checkpoints/000010/manifest.json",
    "near the end": "runs/latest/02-pretrain/checkpoints/000040",
}
FAST = "after the first checkpoint"


@pytest.mark.parametrize("point", [p if p == FAST else pytest.param(p, marks=pytest.mark.slow) for p in POINTS])
def test_a_killed_run_resumes_to_identical_bits(point: str, quiet: dict[str, str], tmp_path: Path) -> None:
    process = plait("run", "quickstart-ci", *SETTINGS, folder=tmp_path)
    deadline = time.monotonic() + 120
    while not any(tmp_path.glob(POINTS[point])):
        assert process.poll() is None, "the run ended before the point was seen"
        assert time.monotonic() < deadline
        time.sleep(0.005)
    process.send_signal(signal.SIGKILL)
    process.communicate()
    finish(plait("resume", folder=tmp_path))
    assert results(tmp_path) == quiet
