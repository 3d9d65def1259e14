"""``plait resume``: what is said on the command line reaches the run."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from plait.cli.main import main

pytestmark = pytest.mark.light

RECIPE = "name: mine\ndata: {source: {kind: emoji}}\nstages: {}\n"


@pytest.fixture
def run(tmp_path: Path) -> Path:
    folder = tmp_path / "runs" / "mine-0001"
    folder.mkdir(parents=True)
    (folder / "recipe.yaml").write_text(RECIPE)
    (folder / "env.json").write_text('{"threads": 1}')
    return folder.resolve()


def test_consent_reaches_the_run(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[Any] = []
    monkeypatch.setattr("plait.recipes.run.resume", lambda path, **how: seen.append((path, how["accept"])))
    monkeypatch.setattr("plait.recipes.run.summary", lambda path: {"stages": [], "run": str(path)})
    words = ["resume", run.name, "--runs", str(run.parent)]
    assert main([*words, "--accept", "optimizer.lr", "--accept", "seed"]) == 0
    assert main(words) == 0
    assert seen == [(run, ["optimizer.lr", "seed"]), (run, [])]


def test_what_can_never_be_accepted_exits_3(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["resume", run.name, "--runs", str(run.parent), "--accept", "optimizer.kind"]) == 3
    assert "cannot be accepted" in capsys.readouterr().err
