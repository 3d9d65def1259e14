"""A few real steps in a folder that goes away: what they say, what stays, and what a failing one looks like."""

from __future__ import annotations

import json
import os
import signal
import tempfile
from pathlib import Path

import pytest
from tests.tiny_recipe import write_recipe

from plait.cli.main import main
from plait.core.errors import DataError, PlaitError, ResourceError
from plait.recipes import probe as probing
from plait.recipes.probe_stage import no_memory


@pytest.fixture
def place(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("PLAIT_HOME", str(tmp_path / "home"))
    monkeypatch.setenv("TMPDIR", str(tmp_path / "temporary"))
    monkeypatch.setattr(tempfile, "tempdir", None)
    (tmp_path / "temporary").mkdir()
    return tmp_path


@pytest.mark.row("S4-58")
def test_real_steps_stand_beside_the_plan_and_leave_only_caches(place, tiny_folders, capfd):
    recipe = write_recipe(place, tiny_folders, steps=5)
    recipe.write_text(recipe.read_text().replace("\n  tune:", "\n  between: {kind: evaluate}\n  tune:", 1))
    there = sorted(path.name for path in place.iterdir())
    assert main(["plan", "tiny.yaml", "stages.align=null", "--probe", "--json"]) == 0
    said = json.loads(capfd.readouterr().out)
    assert [one["stage"] for one in said["probe"]] == ["pretrain", "tune"]
    phases = {one["stage"]: {p["phase"]: (p["steps"], p["done"]) for p in one["phases"]} for one in said["probe"]}
    assert phases == {
        "pretrain": {"training": (4, 3)},
        "tune": {"words": (3, 3), "connector": (2, 2), "decoder": (5, 3)},
    }
    for one in said["probe"]:
        assert one["peak_bytes"] == max(one["peaks"].values()) > 2**27
        assert one["peaks"][one["section"]] > 0.98 * one["peak_bytes"]
        assert one["rest_s"] > 0
        assert all(p["step_s"] > 0 and p["expected_s"] == p["step_s"] * p["steps"] for p in one["phases"])
        assert one["expected_s"] == pytest.approx(one["rest_s"] + sum(p["expected_s"] for p in one["phases"]))
    assert sorted(path.name for path in place.iterdir()) == sorted([*there, "home"])
    assert list((place / "temporary").iterdir()) == []


def test_what_stops_a_step_is_the_refusal(place, tiny_folders, capfd):
    write_recipe(place, tiny_folders, steps=2, pretrain=False)
    asked = ["plan", "tiny.yaml", "--probe", "stages.align=null", "stages.tune.row=16"]
    assert main(asked) == 4
    told = capfd.readouterr()
    assert "total" in told.out  # the plan comes first
    assert "row" in told.err
    assert list((place / "temporary").iterdir()) == []


def test_errors_of_another_process_are_raised_as_what_they_are():
    record = DataError("a picture is damaged", place="7.png", remedy="mend it").as_dict()
    error = probing.as_raised(record)
    assert type(error) is DataError
    assert error.as_dict() == record
    killed = probing.ended(-signal.SIGKILL, "", place="here")
    assert type(killed) is ResourceError
    assert "memory does not suffice" in killed.cause
    other = probing.ended(1, "Traceback ...\nValueError: odd\n", place="here")
    assert type(other) is PlaitError
    assert "ValueError: odd" in other.cause


def test_too_little_memory_is_said_and_other_faults_stay():
    import torch

    with pytest.raises(ResourceError, match="memory does not suffice"), no_memory():
        torch.empty(2**55)
    with pytest.raises(ResourceError), no_memory():
        raise MemoryError
    with pytest.raises(RuntimeError, match="odd"), no_memory():
        raise RuntimeError("odd")


def test_the_peak_begins_anew(tmp_path):
    import numpy as np

    from plait.core.device import peak_rss, reset_peak, rss

    assert not reset_peak(tmp_path)  # a system that cannot
    if not os.access("/proc/self/clear_refs", os.W_OK):
        pytest.skip("this system cannot")
    np.ones(64 * 2**20 // 8).sum()
    high = peak_rss()
    assert reset_peak()
    assert peak_rss() < high - 32 * 2**20
    assert peak_rss() >= rss() - 2**20
    assert Path("/proc/self/clear_refs").exists()
