"""Kill -9 at any moment, resume, and the bits are those of a run that nobody touched. ``victim.py`` is killed."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from plait.training.monitor import TIMING

STEPS = 8

# Where the process dies: the step it then resumes from (a checkpoint is due every second step), and how many lie in
# quarantine.
POINTS: dict[str, tuple[int, int]] = {
    "in the first step": (0, 0),
    "between two micro-batches": (4, 0),
    "after the update, before its record": (4, 0),
    "half a line of metrics written": (4, 0),
    "half of the first checkpoint written": (0, 1),
    "half a tensor file written": (4, 1),
    "half of the model's file written": (4, 1),
    "sealed, not renamed": (4, 1),
    "renamed, not verified": (6, 0),
    "half of the old checkpoint deleted": (6, 0),
    "right after a checkpoint": (6, 0),
    "after the last checkpoint, before results.csv": (8, 0),
}


class Outcome:
    def __init__(self, root: Path, ended: dict[str, Any], log: str) -> None:
        self.root, self.ended, self.log = root, ended, log


@pytest.fixture(scope="module")
def outcome(tmp_path_factory) -> Outcome:
    root = tmp_path_factory.mktemp("kill")
    result = subprocess.run(
        [sys.executable, str(Path(__file__).with_name("victim.py")), str(root)],
        capture_output=True,
        text=True,
        check=False,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        timeout=400,
    )
    assert result.returncode == 0, result.stderr
    return Outcome(root, json.loads(result.stdout.splitlines()[-1]), result.stderr)


def tensors(folder: Path) -> dict[str, bytes]:
    """Every tensor file of the last checkpoint, byte for byte: the model's, weights, optimizer, generators."""
    last = max((folder / "checkpoints").glob("[0-9]*"))
    found = {p.relative_to(last).as_posix(): p.read_bytes() for p in last.rglob("*.safetensors")}
    assert len(found) == 4
    return found


def lasting(folder: Path) -> list[dict[str, Any]]:
    """Metrics without what tells about the machine."""
    records = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [{key: value for key, value in record.items() if key not in TIMING} for record in records]


def assert_as_if_untouched(folder: Path, whole: Path) -> None:
    assert tensors(folder) == tensors(whole)
    assert lasting(folder) == lasting(whole)
    assert [r["step"] for r in lasting(folder)] == list(range(1, len(lasting(folder)) + 1))
    assert (folder / "results.csv").is_file()
    assert [p.name for p in (folder / "checkpoints").iterdir() if p.name.startswith(".")] == []


@pytest.mark.parametrize("point", POINTS)
def test_killed_and_resumed_equals_untouched(outcome, point):
    resumed_from, quarantined = POINTS[point]
    assert outcome.ended["whole"] == "exit 0", outcome.log
    assert outcome.ended[point] == ["killed", f"exit {resumed_from}"], outcome.log
    assert_as_if_untouched(outcome.root / point, outcome.root / "whole")
    assert len(lasting(outcome.root / point)) == STEPS
    assert len(list((outcome.root / point / "checkpoints/quarantine").glob("*"))) == quarantined


def test_twenty_kills_at_random_moments(outcome):
    """Most fall into a checkpoint, which is most of what so small a run does."""
    assert outcome.ended["storm"]["ended"].startswith("exit"), outcome.log
    assert outcome.ended["storm"]["ended"] != "exit 99", outcome.log
    assert outcome.ended["storm"]["kills"] >= 10
    assert_as_if_untouched(outcome.root / "storm", outcome.root / "storm whole")


def test_the_proof_is_not_empty_the_generators_do_matter(outcome):
    assert outcome.ended["reseeded"] == ["exit 0"] * 3, outcome.log
    assert len({tensors(outcome.root / name)["model.safetensors"] for name in "abc"}) == 3


@pytest.mark.parametrize(("name", "code"), [("SIGINT", 130), ("SIGTERM", 143)])
def test_a_signal_saves_ends_with_its_code_and_the_rest_gives_the_same_bits(outcome, name, code):
    ended, seconds = outcome.ended[name]
    assert seconds < 10  # it does not wait for its data, which would have come after 20
    assert ended == f"exit {code}", outcome.log
    assert "stopped after step 3 of 8, which is saved" in outcome.log
    assert outcome.ended[name + " saved"] == ["000003"]
    assert outcome.ended[name + " resumed"] == "exit 3", outcome.log
    assert_as_if_untouched(outcome.root / name, outcome.root / "whole")


def test_a_second_ctrl_c_ends_at_once_and_leaves_the_checkpoint(outcome):
    ended, seconds = outcome.ended["twice"]
    assert ended == "exit 130", outcome.log
    assert seconds < 10
    assert "stopped at once" in outcome.log
    assert sorted(p.name for p in (outcome.root / "twice/checkpoints").iterdir()) == ["000002"]
