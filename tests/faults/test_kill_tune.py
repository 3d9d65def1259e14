"""Kill -9 in any phase of tune, run it again, and all is as if nobody had touched it. ``victim_tune.py`` is killed."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from plait.core.files import find_model, read_done, read_jsonl
from plait.training.monitor import TIMING

PHASES = ("words", "connector", "decoder")

# Where the process dies: what each phase that had a checkpoint says when it is run again. Of the first phase only the
# last step is saved.
POINTS: dict[str, list[int]] = {
    "in words": [],
    "between words and connector": [3],
    "in connector": [3, 1],
    "in decoder": [3, 2, 1],
    "half of an adapter written": [3, 2, 1],
    "before the seal": [3, 2, 3],
    "in decoder, mixed": [3, 2, 1],
}


class Outcome:
    def __init__(self, root: Path, ended: dict[str, Any], log: str) -> None:
        self.root, self.ended, self.log = root, ended, log


@pytest.fixture(scope="module")
def outcome(tmp_path_factory: pytest.TempPathFactory, tiny_folders: dict[str, Path]) -> Outcome:
    root = tmp_path_factory.mktemp("kill")
    victim = Path(__file__).with_name("victim_tune.py")
    result = subprocess.run(
        [sys.executable, str(victim), str(root), str(tiny_folders["image"]), str(tiny_folders["decoder"])],
        capture_output=True,
        text=True,
        check=False,
        env=os.environ | {"OMP_NUM_THREADS": "1", "PLAIT_HOME": str(root / "home")},
        timeout=400,
    )
    assert result.returncode == 0, result.stderr
    return Outcome(root, json.loads(result.stdout.splitlines()[-1]), result.stderr)


def tensors(folder: Path) -> dict[str, bytes]:
    """Every tensor file of the last checkpoints, byte for byte: connector, adapter, weights, optimizer, generators."""
    found: dict[str, bytes] = {}
    for phase in PHASES:
        last = max((folder / phase / "checkpoints").glob("[0-9]*"))
        found |= {p.relative_to(folder).as_posix(): p.read_bytes() for p in last.rglob("*.safetensors")}
    model = find_model(folder).relative_to(folder)
    assert f"{model}/model.safetensors" in found
    assert f"{model}/adapter/adapter_model.safetensors" in found
    return found


def lasting(folder: Path) -> list[list[dict[str, Any]]]:
    """Metrics of each phase without what tells about the machine."""
    files = [read_jsonl(folder / phase / "metrics.jsonl") for phase in PHASES]
    return [[{k: v for k, v in record.items() if k not in TIMING} for record in records] for records in files]


def shown(folder: Path) -> dict[str, str]:
    return {path.name: path.read_text() for path in (folder / "samples").iterdir()}


@pytest.mark.parametrize("point", POINTS)
def test_killed_and_run_again_equals_untouched(outcome: Outcome, point: str) -> None:
    untouched = "whole, mixed" if point.endswith("mixed") else "whole"
    assert outcome.ended[untouched] == "exit 0", outcome.log
    assert outcome.ended[point] == ["killed", "exit 0"], outcome.log
    whole, again = outcome.root / untouched, outcome.root / point
    said = (again / "resumed").read_text().splitlines() if (again / "resumed").exists() else []
    assert [int(line.split()[3]) for line in said] == POINTS[point]
    assert tensors(again) == tensors(whole)
    assert lasting(again) == lasting(whole)
    assert [len(records) for records in lasting(again)] == [3, 2, 3]
    assert shown(again) == shown(whole)
    assert read_done(again) == read_done(whole)


SIGNALS = ("while encoding", "in words", "at answers", "in decoder", "in a save")


@pytest.mark.parametrize("point", SIGNALS)
def test_a_signal_in_any_phase_ends_it_with_its_code_and_the_rest_is_the_same(outcome: Outcome, point: str) -> None:
    place, whole = outcome.root / f"SIGTERM {point}", outcome.root / "whole"
    assert outcome.ended[f"SIGTERM {point}"] == ["exit 143", "exit 0"], outcome.log
    assert float((place / "asked").read_text()) < 30
    assert tensors(place) == tensors(whole)
    assert lasting(place) == lasting(whole)
    assert shown(place) == shown(whole)
    assert read_done(place) == read_done(whole)
