"""Runs beside each other: what differs, what is paired, and runs that are half done or damaged."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from plait.cli.main import main
from plait.evaluation.statistics import paired_difference
from plait.recipes.compare import compare
from plait.report.compare_page import render

pytestmark = pytest.mark.light

RANKS = (1, 1, 4, 2, 1, 3, 1, 9)


def make(root: Path, name: str, *, lr: float, ranks: tuple[int, ...] = RANKS, digest: str = "a" * 64) -> Path:
    """A run of two stages as the runner leaves it."""
    run = root / name
    data, pretrain = run / "01-data", run / "02-pretrain"
    for folder in (data, pretrain):
        folder.mkdir(parents=True)
    (run / "recipe.yaml").write_text(f"name: tiny\nseed: 3\ndata: {{}}\nstages:\n  pretrain:\n    lr: {lr}\n    d: 4\n")
    env = {"plait": "0.1.0", "threads": 2 if lr > 1e-3 else 1, "versions": {"torch": "2.13"}}
    (run / "env.json").write_text(json.dumps(env))
    events = [
        {"time": 10.0, "kind": "stage", "text": "", "stage": "data", "state": "started"},
        {"time": 11.0, "kind": "stage", "text": "", "stage": "data", "state": "done"},
        {"time": 12.0, "kind": "stage", "text": "", "stage": "pretrain", "state": "started"},
        {"time": 15.5, "kind": "stage", "text": "", "stage": "pretrain", "state": "done"},
    ]
    (run / "events.jsonl").write_text("".join(json.dumps(event) + "\n" for event in events))
    done: dict[str, Any] = {"kind": "data", "previous": None, "summary": {"shards_sha256": digest}}
    (data / "done.json").write_text(json.dumps(done))
    (pretrain / "done.json").write_text(json.dumps({"kind": "pretrain", "previous": "../01-data", "summary": {}}))
    metrics = [{"step": at, "loss": 3.0 - at * lr, "lr": lr, "tokens": 10, "memory_bytes": 2**20} for at in range(1, 5)]
    (pretrain / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in metrics))
    hits = np.mean([rank <= 1 for rank in ranks])
    score = {"value": float(hits), "low": 0.1, "high": 0.9, "n": len(ranks), "rule": "hit@1", "failures": 0}
    names = ("retrieval/test-concept/image-to-text/R@1", "space/test-concept/alignment")
    (pretrain / "scores.json").write_text(json.dumps([{"name": name} | score for name in names]))
    answers = [
        {"id": f"s{at}", "split": "test-concept", "concept": f"c{at // 2}", "truth": f"t{at}", "rank": rank}
        for at, rank in enumerate(ranks)
    ]
    (pretrain / "predictions.jsonl").write_text("".join(json.dumps(answer) + "\n" for answer in answers))
    return run


@pytest.fixture
def two(tmp_path: Path) -> list[Path]:
    better = tuple(max(1, rank - 2) for rank in RANKS)
    return [make(tmp_path, "tiny-0001", lr=1e-3), make(tmp_path, "tiny-0002", lr=1e-2, ranks=better)]


def test_only_what_differs_is_told(two: list[Path]) -> None:
    found = compare(two)
    assert found.settings == {"stages.pretrain.lr": [0.001, 0.01]}
    assert found.machine == {"threads": ["1", "2"]}
    assert found.data == ""
    assert found.sides[0].costs["pretrain"].seconds == 3.5
    assert (found.sides[0].costs["pretrain"].steps, found.sides[0].costs["pretrain"].tokens) == (4, 40)


def test_runs_that_are_called_alike_have_names_of_their_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    runs = [make(tmp_path / sweep / "final", "final-0001", lr=1e-3) for sweep in ("lr-0001", "lr-0002")]
    runs.append(make(tmp_path / "runs", "tiny-0001", lr=1e-3))
    wanted = ["lr-0001/final/final-0001", "lr-0002/final/final-0001", "tiny-0001"]
    assert [side.name for side in compare(runs).sides] == wanted
    monkeypatch.chdir(runs[0])
    assert [side.name for side in compare([Path(), *runs[1:]]).sides] == wanted


def test_scores_are_paired_by_sample(two: list[Path]) -> None:
    found = compare(two)
    first, second = ([float(max(1, rank - less) <= 1) for rank in RANKS] for less in (0, 2))
    key = ("pretrain", "retrieval/test-concept/image-to-text/R@1")
    groups = [f"c{at // 2}" for at in range(len(RANKS))]
    wanted = paired_difference(second, first, name="", rule="", groups=groups)
    difference = found.differences[1, key]
    assert (difference.value, difference.low, difference.high) == (wanted.value, wanted.low, wanted.high)
    assert difference.n == len(RANKS)
    other = found.differences[1, ("pretrain", "space/test-concept/alignment")]
    assert other.low is None
    assert other.value == pytest.approx(wanted.value)


@pytest.mark.parametrize("change", ["another question", "a sample less", "a score of another rule"])
def test_what_is_not_the_same_is_not_paired(two: list[Path], change: str) -> None:
    path = two[1] / "02-pretrain" / "predictions.jsonl"
    records = [json.loads(line) for line in path.read_text().splitlines()]
    if change == "another question":
        records[3]["truth"] = "something else"
    elif change == "a sample less":
        records.pop()
    else:
        records[0]["rank"] = 50
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    difference = compare(two).differences[1, ("pretrain", "retrieval/test-concept/image-to-text/R@1")]
    assert difference.low is None


def test_other_data_are_said_loudly(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    runs = [make(tmp_path, "a-0001", lr=1e-3), make(tmp_path, "a-0002", lr=1e-3, digest="b" * 64)]
    assert "do not compare" in compare(runs).data
    assert main(["runs", "compare", *map(str, runs)]) == 0
    assert "WARNING  the data are not the same" in capsys.readouterr().out
    page = (tmp_path / "compare.html").read_text()
    assert "the data are not the same" in page


def test_runs_that_are_half_done_or_damaged_take_part(two: list[Path]) -> None:
    (two[1] / "02-pretrain" / "done.json").unlink()
    (two[1] / "02-pretrain" / "scores.json").write_text("[{")
    third = make(two[0].parent, "tiny-0003", lr=1e-3)
    (third / "recipe.yaml").write_text("{ not yaml")
    (third / "env.json").unlink()
    found = compare([*two, third])
    assert [side.run.state for side in found.sides][:2] == ["finished", "stopped"]
    assert found.settings == {"stages.pretrain.lr": [0.001, 0.01, None]}
    assert (1, ("pretrain", "retrieval/test-concept/image-to-text/R@1")) not in found.differences
    page = render(found)
    assert "scores.json" in page
    assert "recipe.yaml" in page


def test_the_terminal_and_the_page_say_the_same(two: list[Path], capsys: pytest.CaptureFixture[str]) -> None:
    root = two[0].parent
    (root / "latest").symlink_to("tiny-0002")
    assert main(["runs", "compare", "tiny-0001", "latest", "--runs", str(root)]) == 0
    out = capsys.readouterr().out
    assert "stages.pretrain.lr  0.001" in out
    assert "tiny-0002" in out
    assert main(["runs", "compare", "tiny-0001", str(two[1]), "--runs", str(root), "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["settings"] == {"stages.pretrain.lr": [0.001, 0.01]}
    assert found["scores"][0]["differences"][0]["paired"] is True
    assert Path(found["page"]) == root / "compare.html"
    page = (root / "compare.html").read_text()
    assert page.count("<main") <= 1
    assert "stages.pretrain.lr" in page
    assert "https://" not in page.partition("<script>")[0]


def test_one_run_in_depth(two: list[Path], capsys: pytest.CaptureFixture[str]) -> None:
    (two[0] / "02-pretrain" / "checkpoints" / "000004").mkdir(parents=True)
    with (two[0] / "events.jsonl").open("a") as file:
        file.write(json.dumps({"time": 13.0, "kind": "warning", "text": "a batch is small"}) + "\n")
    assert main(["runs", "show", str(two[0])]) == 0
    out = capsys.readouterr().out
    for words in ("02-pretrain", "2.996", "3.5 s", "50.0 % (10.0 to 90.0)", "000004", "a batch is small"):
        assert words in out
    assert main(["runs", "show", str(two[0]), "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["checkpoints"] == {"02-pretrain": ["000004"]}
    assert found["last"]["pretrain"]["loss"] == pytest.approx(2.996)


def test_all_runs_with_their_state_and_beginning(two: list[Path], capsys: pytest.CaptureFixture[str]) -> None:
    (two[0] / "recipe.yaml").write_text("extends: simclr\nname: tiny\n")
    (two[1] / "recipe.yaml").write_text("[")
    assert main(["runs", "--runs", str(two[0].parent)]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].split() == ["run", "recipe", "done", "state", "begun"]
    assert [line.split()[0] for line in lines[1:]] == ["tiny-0001", "tiny-0002:"]
    assert main(["runs", "--runs", str(two[0].parent), "--json"]) == 0
    found = {run["name"]: run for run in json.loads(capsys.readouterr().out)}
    assert (found["tiny-0001"]["state"], found["tiny-0001"]["begun"]) == ("finished", 10.0)
    assert "error" in found["tiny-0002"]


def test_one_run_is_no_comparison(two: list[Path], capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["runs", "compare", str(two[0]), str(two[0])]) == 2
    assert "named twice" in capsys.readouterr().err
    assert main(["runs", "show", *map(str, two)]) == 2
    assert main(["runs", "list", "--page", "x.html"]) == 2
