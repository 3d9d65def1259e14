"""``plait doctor gradients`` on a whole tiny recipe: all is well there; planted faults fail, with their place."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from tests.tiny_recipe import write_recipe
from torch import Tensor, nn

from plait.cli.main import main
from plait.core.tensors import IGNORE, Batch
from plait.data import conversations
from plait.objectives.language import NextToken


@pytest.fixture(scope="module")
def recipe(tmp_path_factory: pytest.TempPathFactory, tiny_folders: dict[str, Path]) -> Path:
    path = write_recipe(tmp_path_factory.mktemp("recipe"), tiny_folders, steps=4)
    path.write_text(path.read_text().replace("\n  tune:", "\n  tune-2:\n    kind: tune", 1))  # names may have a dash
    return path


@pytest.fixture(autouse=True)
def _elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PLAIT_HOME", str(tmp_path / "home"))
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    monkeypatch.chdir(tmp_path)


def asked(capsys: pytest.CaptureFixture[str], *words: str) -> tuple[int, dict[str, Any]]:
    code = main(["doctor", "gradients", *words, "--json"])
    return code, json.loads(capsys.readouterr().out)


def by_name(result: Mapping[str, Any]) -> dict[tuple[str, str], dict[str, Any]]:
    return {(check["group"], check["name"]): check for check in result["checks"]}


SMALL = ("stages.pretrain=null", "stages.align=null")


def test_a_sound_recipe_passes_alone_and_in_two_processes(
    recipe: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "kept").mkdir()
    code, result = asked(capsys, str(recipe), *SMALL, "--stage", "tune-2", "--processes", "2", "--keep", "kept")
    found = by_name(result)
    assert code == 0, json.dumps(result["checks"], indent=1)
    assert result["ok"]
    assert {"tune-2: words", "tune-2: connector", "tune-2: decoder", "tune-2: 2 processes"} <= {
        group for group, _ in found
    }
    for phase in ("words", "connector", "decoder"):
        assert max(found["tune-2: 2 processes", phase]["facts"]["parts"].values()) < 1e-13  # float64
        assert found[f"tune-2: {phase}", "split 4 x 1" if phase != "words" else "split 4 + 4"]["status"] == "ok"
    rates = found["tune-2: decoder", "learning rates"]["value"]
    assert "connectors.image 0.001" in rates  # adapt.lr_connector
    assert found["tune-2: decoder", "packed in long rows"]["status"] == "ok"
    mask = found["tune-2: decoder", "label mask"]
    assert mask["facts"]["samples"] > 40
    kinds = found["tune-2: decoder", "trained tokens"]["facts"]
    assert kinds["yesno"]["tokens"] < 5 * kinds["yesno"]["samples"]  # "yes", "no" in bytes, and the end
    assert {path.name for path in tmp_path.iterdir()} <= {"home", "kept"}  # the rehearsal is gone
    assert (tmp_path / "kept" / "recipe.yaml").is_file()


class Averaged(NextToken):
    """Each micro-batch's mean, as many a hand-written loss gives it."""

    def count(self, batch: Batch) -> Mapping[str, Tensor]:
        return {"next_token": torch.tensor(1)}

    def __call__(self, model: nn.Module, batch: Batch) -> Mapping[str, Tensor]:
        return {"next_token": super().__call__(model, batch)["next_token"] / batch.predicting.sum()}


def test_faults_in_objective_and_mask_fail_and_are_named(
    recipe: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from plait.stages.tuning import phases

    right = conversations.collate_rows

    def shifted(*args: Any, **kwargs: Any) -> Batch:
        batch = right(*args, **kwargs)
        moved = torch.where(batch.labels.roll(-1, 1) != IGNORE, batch.token_ids, IGNORE)
        return replace(batch, labels=moved)

    monkeypatch.setattr(phases, "NextToken", Averaged)
    monkeypatch.setattr(conversations, "collate_rows", shifted)
    code, result = asked(capsys, str(recipe), *SMALL, "--processes", "1")
    found = by_name(result)
    assert code == 6
    split = found["tune-2: decoder", "split 2 + 2"]
    assert split["status"] == "fail"
    assert "counts differ: next_token 1, here 2" in split["value"]
    mask = found["tune-2: decoder", "label mask"]
    assert mask["status"] == "fail"
    assert "what is trained is not the answer" in mask["value"]
    assert found["tune-2: words", "split 4 + 4"]["status"] == "ok"


def test_pretrain_and_align_pass_in_lines_for_a_person(recipe: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["doctor", "gradients", str(recipe), "--processes", "1", "--samples", "3"]) == 0
    said = capsys.readouterr().out
    assert "\npretrain\n" in said
    assert "8 pairs: 8 positives (0 beside the pairs themselves, of one concept), 56 negatives" in said
    assert "\nalign\n" in said
    assert "split 2 + 1" in said
    assert "«gray tree<|im_end|>»" in said or "<|im_end|>»" in said
    assert " 0 failed, in " in said


def test_a_folder_to_keep_that_is_not_empty_is_refused_at_once(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "kept").mkdir()
    (tmp_path / "kept" / "mine.txt").write_text("there")
    assert main(["doctor", "gradients", "quickstart-ci", "--keep", "kept"]) == 2
    told = capsys.readouterr()
    assert "the target is there and not empty" in told.err
    assert not told.out  # nothing was begun
    assert [path.name for path in (tmp_path / "kept").iterdir()] == ["mine.txt"]


@pytest.mark.parametrize(
    ("words", "says", "code"),
    [
        ((), "gradients needs a recipe", 2),
        (("quickstart-ci", "--samples", "1"), "--samples is 1", 2),
        (("quickstart-ci", "--processes", "two"), "--processes is 'two'", 2),
        (("quickstart-ci", "--stage", "evaluate"), "no stage called 'evaluate' that trains", 3),
        (("nothing-of-that-name",), "no recipe called", 3),
    ],
)
def test_wrong_words_are_refused(words: Any, says: str, code: int, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["doctor", "gradients", *words]) == code
    assert says in capsys.readouterr().err
