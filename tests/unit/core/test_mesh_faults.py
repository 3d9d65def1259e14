"""What one of several processes does for all, and how all end when one fails, is stopped or is killed."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from plait.core import mesh
from plait.core.errors import ResourceError

OWN, TOLD = "half of a picture is missing", "process {} of 2: half of a picture is missing"


@pytest.fixture(scope="module")
def found() -> dict[str, Any]:
    top = Path(__file__).parents[3]
    result = subprocess.run(
        [sys.executable, str(Path(__file__).with_name("mesh_faults.py"))],
        capture_output=True,
        text=True,
        check=False,
        env=os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": f"{top}:{top / 'src'}"},
        timeout=120,
    )
    assert result.returncode == 0, result.stderr
    return json.loads(result.stdout.splitlines()[-1])


def test_the_first_one_works_as_if_alone_and_all_get_the_result(found: dict[str, Any]) -> None:
    assert found["first"] == [[[0, 1, 0, 10, 1], 2, 3]] * 2


def test_the_others_work_after_the_first(found: dict[str, Any]) -> None:
    assert found["one_after_the_other"] == [["of 0", 1, True], ["of 1", 1, True]]


def test_a_fault_is_told_with_its_process(found: dict[str, Any]) -> None:
    assert found["fault_of_the_first"] == [["DataError", OWN, None], ["DataError", TOLD.format(0), 0]]
    there = [["DataError", TOLD.format(1), 1], ["DataError", OWN, None]]
    assert found["fault_met_at_the_next_first"] == there
    assert found["stopped_because_of_another"] == there


def test_a_stop_of_one_stops_all_and_a_kill_is_said_to_be_one(found: dict[str, Any]) -> None:
    assert found["stopped"] == [["Stopped", 15], ["Stopped", 15]]
    survivor, killed = found["killed"]
    assert killed == "killed"
    assert survivor[0] == "ResourceError"
    assert survivor[1].startswith("another of 2 processes is gone, and said nothing: ")
    assert "]" not in survivor[1].partition("127.0.0.1")[0]
    assert survivor[2] == -1


def test_who_waits_for_a_killed_one_does_not_wait_in_vain(found: dict[str, Any]) -> None:
    killed, survivor = found["first_killed"]
    assert killed == "killed"
    assert (survivor[0], survivor[2]) == ("ResourceError", -1)
    assert survivor[1].startswith("another of 2 processes is gone, and said nothing: ")


def test_a_kill_while_they_join_is_told_as_such(found: dict[str, Any]) -> None:
    killed, survivor = found["killed_while_they_join"]
    assert killed == "killed"
    assert survivor[0] == "ResourceError"
    assert survivor[1].startswith("the processes could not join: ")


def test_ctrl_c_is_no_fault(found: dict[str, Any]) -> None:
    assert found["interrupted"] == [["Stopped", 2], ["KeyboardInterrupt", 0]]


def test_more_processes_than_gpus_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in {"RANK": "1", "LOCAL_RANK": "1", "WORLD_SIZE": "2"}.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setenv("MASTER_ADDR", "127.0.0.1")
    monkeypatch.setenv("MASTER_PORT", "1")
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    with pytest.raises(ResourceError, match="process 1 of this machine has no GPU: there are 1"), mesh.joined("cuda"):
        pass
