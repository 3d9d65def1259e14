from __future__ import annotations

import csv
import json
import os
from dataclasses import replace
from types import SimpleNamespace

import pytest

from plait.core.errors import ResourceError
from plait.core.events import Events
from plait.core.files import read_jsonl
from plait.training import monitor as module
from plait.training.monitor import TIMING, Cost, Monitor, Plan

pytestmark = pytest.mark.light

COST = Cost(samples=4, tokens=100, wait_s=0.5, work_s=1.5)


def run(folder, steps, *, at=0, total=10, seen=None, cost=COST, **plan) -> Monitor:
    """Record ``steps`` steps after step ``at``."""
    events = Events(listeners=(seen.append,)) if seen is not None else Events()
    monitor = Monitor(folder, Plan(task="tune", total=total, **plan), step=at, events=events)
    for step in range(at + 1, at + steps + 1):
        monitor.step(step, {"loss": 1.0 / step}, cost)
    return monitor


def steps(folder) -> list[int]:
    return [record["step"] for record in read_jsonl(folder / "metrics.jsonl")]


def test_rates_come_from_the_costs(tmp_path):
    run(tmp_path, 1, peak_flops=1e9, cost=replace(COST, flops=1e8))
    (record,) = read_jsonl(tmp_path / "metrics.jsonl")
    assert record["samples_per_s"] == 2.0
    assert record["tokens_per_s"] == 50.0
    assert record["data_wait"] == 0.25
    assert record["mfu"] == 0.05  # 1e8 FLOPs in 2 s, of 1e9 a second
    assert record["memory_bytes"] > 2**20
    assert set(record) - TIMING == {"step", "loss", "samples", "tokens"}


def test_what_is_found_out_later_joins_the_record_of_its_step_alone(tmp_path):
    run(tmp_path, 3, log_every=2, total=3)
    before = read_jsonl(tmp_path / "metrics.jsonl")
    monitor = run(tmp_path, 0, at=3, log_every=2, total=3)
    monitor.amend(2, {"evaluation": 9.0})  # not the last one
    assert read_jsonl(tmp_path / "metrics.jsonl") == before
    for value in (0.5, float("inf")):
        monitor.amend(3, {"evaluation": value})
    after = read_jsonl(tmp_path / "metrics.jsonl")
    assert after == [before[0], before[1] | {"evaluation": None}]
    assert list(after[1])[:4] == ["step", "loss", "evaluation", "samples"]


def test_mfu_is_left_out_where_a_rate_is_unknown(tmp_path):
    run(tmp_path, 1, cost=replace(COST, flops=1e8))
    assert "mfu" not in read_jsonl(tmp_path / "metrics.jsonl")[0]


def test_records_are_every_so_many_steps_and_the_last(tmp_path):
    run(tmp_path, 10, log_every=4)
    assert steps(tmp_path) == [4, 8, 10]
    assert read_jsonl(tmp_path / "metrics.jsonl")[0]["loss"] == 0.25  # of that step alone


@pytest.mark.parametrize("tail", ["", '{"step": 7, "lo', '{"step": 7, "loss": 1}', "\0\0\0\0\n", "[]\n"])
def test_a_killed_and_resumed_file_equals_one_that_ran_through(tmp_path, tail):
    whole, cut = tmp_path / "whole", tmp_path / "cut"
    whole.mkdir()
    cut.mkdir()
    run(whole, 10)
    run(cut, 6)  # killed at step 6, perhaps while writing; the checkpoint is of step 4
    with (cut / "metrics.jsonl").open("a") as file:
        file.write(tail)
    seen: list = []
    run(cut, 6, at=4, seen=seen)
    assert (cut / "metrics.jsonl").read_text().count("\n") == 10

    def lasting(folder):
        return [{k: v for k, v in r.items() if k not in TIMING} for r in read_jsonl(folder / "metrics.jsonl")]

    assert lasting(whole) == lasting(cut)
    assert not [e for e in seen if e.kind == "warning"]


def test_lost_records_are_said_not_hidden(tmp_path):
    run(tmp_path, 3)
    seen: list = []
    run(tmp_path, 1, at=6, seen=seen)
    assert [e.text for e in seen if e.kind == "warning"] == [
        "metrics.jsonl ends at step 3, the checkpoint is at step 6: the records between are lost"
    ]
    seen.clear()
    other = tmp_path / "other"
    other.mkdir()
    run(other, 6, log_every=4)  # records 4; nothing is lost at step 6
    run(other, 1, at=6, seen=seen, log_every=4)
    assert not [e for e in seen if e.kind == "warning"]


def test_numbers_that_are_not_finite_stay_valid_json(tmp_path):
    monitor = Monitor(tmp_path, Plan(task="t", total=2), step=0, events=Events())
    monitor.step(1, {"loss": float("nan"), "grad_norm": float("inf")}, COST)
    record = json.loads((tmp_path / "metrics.jsonl").read_text(), parse_constant=pytest.fail)
    assert (record["loss"], record["grad_norm"]) == (None, None)


def test_results_hold_every_record_and_column(tmp_path):
    monitor = Monitor(tmp_path, Plan(task="t", total=2), step=0, events=Events())
    monitor.step(1, {"loss": 0.1 + 0.2}, COST)
    monitor.step(2, {"loss": float("nan"), "loss/extra": 3.0}, COST)
    with monitor.results().open() as file:
        first, second = csv.DictReader(file)
    assert float(first["loss"]) == 0.1 + 0.2  # no digit is lost
    assert (second["loss"], second["loss/extra"], first["loss/extra"]) == ("", "3.0", "")


def test_time_to_go_leaves_out_the_first_steps(tmp_path, monkeypatch):
    clock = iter([0.0, 100.0, 200.0, 201.0, 202.0, 203.0])  # the first steps are a hundred times slower
    monkeypatch.setattr(module, "time", SimpleNamespace(monotonic=lambda: next(clock)))
    seen: list = []
    run(tmp_path, 6, seen=seen)
    assert [e.fields["eta_s"] for e in seen] == [None, None, None, 6.0, 5.0, 4.0]


def test_time_to_go_counts_this_session_only(tmp_path, monkeypatch):
    clock = iter(float(n) for n in range(20))
    monkeypatch.setattr(module, "time", SimpleNamespace(monotonic=lambda: next(clock)))
    seen: list = []
    run(tmp_path, 5, at=90, total=100, seen=seen)
    assert [e.fields["eta_s"] for e in seen if e.kind == "progress"][-2:] == [6.0, 5.0]


def test_a_wall_clock_that_jumps_back_changes_nothing(tmp_path, monkeypatch):
    backwards = iter([1e9 - n for n in range(100)])
    monkeypatch.setattr(module.time, "time", lambda: next(backwards))
    seen: list = []
    run(tmp_path, 6, seen=seen)
    assert all(e.fields["eta_s"] >= 0 for e in seen[3:])
    assert steps(tmp_path) == [1, 2, 3, 4, 5, 6]


def test_a_full_disk_is_a_resource_error_and_earlier_records_stay(tmp_path):
    run(tmp_path, 3)
    kept = (tmp_path / "metrics.jsonl").read_text()
    monitor = Monitor(tmp_path, Plan(task="t", total=9), step=3, events=Events())
    (tmp_path / "metrics.jsonl").rename(tmp_path / "kept")
    (tmp_path / "metrics.jsonl").symlink_to("/dev/full")  # opened, never replaced
    with pytest.raises(ResourceError, match="No space left on device") as error:
        monitor.step(4, {"loss": 1.0}, COST)
    assert error.value.exit_code == 5
    assert (tmp_path / "kept").read_text() == kept


def test_sync_reaches_the_disk(tmp_path, monkeypatch):
    synced: list[int] = []
    monitor = run(tmp_path, 1)
    inode = (tmp_path / "metrics.jsonl").stat().st_ino
    monkeypatch.setattr(module.os, "fsync", lambda fd: synced.append(os.fstat(fd).st_ino))
    monitor.sync()
    assert synced == [inode, tmp_path.stat().st_ino]  # the content, and the name of a file that may be new
