"""Names of models: a run, a stage, a checkpoint; what has no model says what it has."""

from __future__ import annotations

from pathlib import Path

import pytest

from plait.core.errors import CheckpointError, UsageError
from plait.core.files import mark_done, point_latest
from plait.inference.load import find_model_folder, model_name

pytestmark = pytest.mark.light


@pytest.fixture
def run(tmp_path: Path) -> Path:
    """Data and pretrain finished, tune finished with a model, evaluate finished, compress begun."""
    run = tmp_path / "runs" / "quickstart-0001"
    previous = None
    for number, kind in enumerate(["data", "pretrain", "tune", "evaluate", "compress"], 1):
        folder = run / f"{number:02d}-{kind}"
        folder.mkdir(parents=True)
        if kind == "tune":
            (folder / "checkpoints/000100").mkdir(parents=True)
            (folder / "checkpoints/000100/plait.json").write_text("{}")
        if kind != "compress":
            summary = {"model": "checkpoints/000100"} if kind == "tune" else {}
            mark_done(folder, kind=kind, previous=previous, summary=summary)
        previous = folder
    (run / "recipe.yaml").write_text("name: quickstart\n")
    point_latest(run)
    return run


def test_every_way_to_name_it_finds_the_newest_finished_model(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    wanted = run / "03-tune/checkpoints/000100"
    monkeypatch.chdir(run.parent.parent)
    names = ["latest", "runs/latest", "quickstart-0001", str(run), str(wanted), str(run / "04-evaluate")]
    for name in names:
        assert find_model_folder(name) == wanted, name
    assert model_name(wanted) == "quickstart-0001"
    assert model_name(Path("/elsewhere/my-model")) == "my-model"


def test_what_has_no_model_says_what_there_is(run: Path, tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="there is 02-pretrain") as caught:
        find_model_folder(str(run / "02-pretrain"))
    (run / "03-tune/done.json").unlink()
    with pytest.raises(CheckpointError, match=r"01-data \(finished\).*03-tune \(not finished\)") as caught:
        find_model_folder(str(run))
    assert caught.value.place == str(run)
    with pytest.raises(UsageError, match=r"no run \(recipe.yaml\), no finished stage"):
        find_model_folder(str(tmp_path))
    with pytest.raises(UsageError, match="no run called 'quickstat'"):
        find_model_folder("quickstat", run.parent)
