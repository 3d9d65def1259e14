"""Kill -9 at any moment, resume, and the bits are those of a run that nobody touched. ``victim.py`` is killed."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from plait.training.interrupt import GRACE_S
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
    "beside training, half a tensor file written": (4, 1),
    "beside training, sealed, not renamed": (4, 1),
    "beside training, renamed, not verified": (6, 0),
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


# When a signal comes: exit code, and the step that is then saved. Steps, waits and hooks are held up for 20 s.
PHASES = {
    "waiting for data": (130, 3),
    "waiting for data, SIGTERM": (143, 3),
    "in a step": (143, 3),  # given up: it is done again
    "in the hook": (143, 3),  # given up: it is told again
    "while saving": (143, 4),
    "while saving beside training": (143, 4),
}


@pytest.mark.parametrize("phase", PHASES)
def test_a_signal_saves_ends_with_its_code_and_the_rest_gives_the_same_bits(outcome, phase):
    code, step = PHASES[phase]
    ended, seconds = outcome.ended[phase]
    assert seconds < 10  # it does not wait for what is held up
    assert ended == f"exit {code}", outcome.log
    beside = "beside" in phase  # training went on meanwhile, by one step or more
    saved = [int(name) for name in outcome.ended[phase + " saved"]]
    assert saved == [step] or (beside and saved[0] >= step), saved
    assert f"stopped after step {saved[0]} of 8, which is saved" in outcome.log
    assert outcome.ended[phase + " resumed"] == f"exit {saved[0]}", outcome.log
    assert_as_if_untouched(outcome.root / phase, outcome.root / "whole")
    told = (outcome.root / phase / "told").read_text().splitlines()
    assert told == [str(number) for number in range(1, STEPS + 1)]  # each step once, also the one given up


def test_what_a_signal_may_hold_up_leaves_time_to_save_within_thirty_seconds():
    assert GRACE_S <= 10


def test_a_second_ctrl_c_ends_at_once_and_leaves_the_checkpoint(outcome):
    ended, seconds = outcome.ended["twice"]
    assert ended == "exit 130", outcome.log
    assert seconds < 10
    assert "stopped at once" in outcome.log
    assert sorted(p.name for p in (outcome.root / "twice/checkpoints").iterdir()) == ["000002"]
