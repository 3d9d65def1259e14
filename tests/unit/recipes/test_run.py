"""The runner: one folder a run, sealed stages once, faults recorded, resume."""

from __future__ import annotations

import errno
import json
import os
from pathlib import Path

import pytest
from PIL import Image

from plait.core.errors import ConfigError, DataError, ResourceError, Stopped
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


def test_a_finished_stage_is_not_built_upon_with_other_settings(pairs: Path, tmp_path: Path) -> None:
    run = start(str(pairs), root=tmp_path / "runs")
    recipe = run / "recipe.yaml"
    recipe.write_text(recipe.read_text().replace("yes_no: 1", "yes_no: 2"))
    with pytest.raises(ConfigError, match=r"01-data was made with other settings: questions: .*yes_no") as caught:
        resume(run)
    assert "remove 01-data" in caught.value.remedy


def test_a_stage_made_before_there_was_a_setting_had_its_default(pairs: Path, tmp_path: Path) -> None:
    run = start(str(pairs), root=tmp_path / "runs")
    path = run / "01-data" / "spec.json"
    made = json.loads(path.read_text())
    del made["questions"]["yes_no_easy"]
    path.write_text(json.dumps(made))
    resume(run)
    assert summary(run)["stages"][0]["state"] == "done"


def test_ctrl_c_says_how_to_go_on(pairs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupt(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr("plait.data.card.make_card", interrupt)
        with pytest.raises(Stopped, match=r"01-data: stopped; go on with `plait resume mine-0001`") as caught:
            start(str(pairs), root=tmp_path / "runs")
    assert caught.value.exit_code == 130
    run = find_run("latest", tmp_path / "runs")
    kinds = [json.loads(line)["kind"] for line in (run / "events.jsonl").read_text().splitlines()]
    assert kinds[-1] == "stopped"
    assert "error" not in kinds
    resume(run)
    assert summary(run)["stages"][0]["state"] == "done"


def test_a_full_disk_is_the_fault_that_is_told(pairs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real = Path.open

    def full(path: Path, mode: str = "r", *rest: object, **named: object) -> object:
        if path.name in ("events.jsonl", "card.md", ".card.md.tmp") and "r" not in mode:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return real(path, mode, *rest, **named)  # pyright: ignore[reportArgumentType, reportCallIssue]

    run = start(str(pairs), root=tmp_path / "runs")
    (run / "01-data" / "done.json").unlink()
    monkeypatch.setattr(Path, "open", full)
    with pytest.raises(ResourceError, match="No space left"):
        resume(run)
    monkeypatch.undo()
    resume(run)
    assert summary(run)["stages"][0]["state"] == "done"
