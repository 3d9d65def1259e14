"""The runner: one folder a run, sealed stages once, faults recorded, resume."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from PIL import Image

from plait.core.errors import DataError
from plait.core.files import find_run
from plait.recipes.run import resume, start, summary


@pytest.fixture
def pairs(tmp_path: Path) -> Path:
    """A recipe with the data stage alone, on twenty pictures of our own."""
    rows = ["image,text"]
    for number in range(20):
        Image.new("RGB", (8, 8), (number * 12, 90, 40)).save(tmp_path / f"{number}.png")
        rows.append(f"{number}.png,thing {number}")
    (tmp_path / "pairs.csv").write_text("\n".join(rows) + "\n")
    recipe = tmp_path / "mine.yaml"
    recipe.write_text(f"name: mine\nseed: 3\ndata:\n  source: {tmp_path / 'pairs.csv'}\n")
    return recipe


def test_a_run_is_one_folder_that_says_all(pairs: Path, tmp_path: Path) -> None:
    run = start(str(pairs), ["data.questions.yes_no=2"], root=tmp_path / "runs")
    assert {p.name for p in run.iterdir()} >= {"recipe.yaml", "env.json", "events.jsonl", "01-data"}
    assert json.loads((run / "01-data" / "spec.json").read_text())["questions"]["yes_no"] == 2
    env = json.loads((run / "env.json").read_text())
    assert env["versions"]["pillow"]
    assert env["threads"] >= 1
    found = summary(run)
    assert [(s["stage"], s["state"]) for s in found["stages"]] == [("data", "done")]
    assert find_run("latest", tmp_path / "runs") == run.resolve()
    kinds = [json.loads(line)["kind"] for line in (run / "events.jsonl").read_text().splitlines()]
    assert kinds.count("stage") == 2


def test_a_sealed_stage_is_not_run_again(pairs: Path, tmp_path: Path) -> None:
    run = start(str(pairs), root=tmp_path / "runs")
    before = {p: p.stat().st_mtime_ns for p in (run / "01-data").rglob("*")}
    resume(run)
    assert {p: p.stat().st_mtime_ns for p in (run / "01-data").rglob("*")} == before


def test_what_the_plan_can_see_is_refused_before_anything_is_created(pairs: Path, tmp_path: Path) -> None:
    (tmp_path / "pairs.csv").write_text("picture,words\n")
    with pytest.raises(DataError):
        start(str(pairs), root=tmp_path / "runs")
    assert not (tmp_path / "runs").exists()


def test_a_fault_is_recorded_with_its_trace_and_mended_by_resume(pairs: Path, tmp_path: Path) -> None:
    damaged = [tmp_path / f"{number}.png" for number in range(5)]
    good = [path.read_bytes() for path in damaged]
    for path in damaged:
        path.write_bytes(b"")
    with pytest.raises(DataError):
        start(str(pairs), root=tmp_path / "runs")
    run = find_run("latest", tmp_path / "runs")
    assert summary(run)["stages"][0]["state"] == "started"
    record = json.loads((run / "events.jsonl").read_text().splitlines()[-1])
    assert record["kind"] == "error"
    assert "Traceback" in record["trace"]
    for path, content in zip(damaged, good, strict=True):
        path.write_bytes(content)
    resume(run)
    assert summary(run)["stages"][0]["state"] == "done"
