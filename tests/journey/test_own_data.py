"""The life of own data: a table or a folder of pictures with captions, through every stage of the recipe."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
from PIL import Image, ImageDraw

from plait.cli.main import main
from plait.core.errors import DataError
from plait.core.events import Events
from plait.core.files import read_done, read_json, read_jsonl
from plait.recipes import run as runner
from plait.recipes.recipe import load_recipe
from plait.stages.data import Data, PairsSource
from plait.stages.pretrain import Pretrain
from plait.stages.tune import Tune

COLORS = {"red": (220, 30, 30), "green": (20, 150, 60), "blue": (30, 60, 200), "orange": (240, 150, 20)}
THINGS = ("kite", "lamp", "boat", "drum", "coin", "vase")
CAPTIONS = [f"{color} {thing}" for color in COLORS for thing in THINGS]
WITHOUT_LATER = ("stages.align=null", "stages.compress=null", "stages.evaluate=null")
SENTENCE = "a small wooden toy that my sister painted and keeps on her desk"


@pytest.fixture(scope="module")
def text_tower(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A BERT of two layers that reads letters."""
    from transformers import BertConfig, BertModel, BertTokenizerFast

    folder = tmp_path_factory.mktemp("text")
    vocabulary = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
    vocabulary += [prefix + letter for letter in "abcdefghijklmnopqrstuvwxyz" for prefix in ("", "##")]
    (folder / "vocab.txt").write_text("\n".join(vocabulary) + "\n")
    BertTokenizerFast(vocab=str(folder / "vocab.txt")).save_pretrained(folder)
    sizes: dict[str, Any] = {
        "hidden_size": 16,
        "intermediate_size": 24,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
    }
    BertModel(BertConfig(**sizes, vocab_size=len(vocabulary), max_position_embeddings=128)).save_pretrained(folder)
    return folder


@pytest.fixture(autouse=True)
def own_home(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> None:
    """Features of these pictures do not go into the user's own cache; that cache is not read either."""
    monkeypatch.setenv("PLAIT_HOME", str(tmp_path_factory.getbasetemp() / "own-home"))


def draw(folder: Path, captions: Sequence[str] = CAPTIONS) -> list[str]:
    """A picture a caption, each another shape in the color that is its first word; the file names."""
    folder.mkdir(exist_ok=True)
    names: list[str] = []
    for number, _ in enumerate(captions):
        picture = Image.new("RGB", (40, 40), "white")
        side = 6 + number
        color = COLORS[CAPTIONS[number % len(CAPTIONS)].split()[0]]
        ImageDraw.Draw(picture).rectangle((4, 4, 4 + side, 40 - side // 2), fill=color)
        names.append(f"{number:02d}.png")
        picture.save(folder / names[-1])
    return names


def write_table(folder: Path, captions: Sequence[str] = CAPTIONS) -> Path:
    names = draw(folder, captions)
    table = folder / "pairs.csv"
    rows = [f'{name},"{caption}"' for name, caption in zip(names, captions, strict=True)]
    table.write_text("image,text\n" + "\n".join(rows) + "\n")
    return table


def write_folder(folder: Path, captions: Sequence[str] = CAPTIONS) -> Path:
    for name, caption in zip(draw(folder, captions), captions, strict=True):
        (folder / name).with_suffix(".txt").write_text(caption + "\n")
    return folder


@pytest.fixture
def small(tiny_folders: dict[str, Path], text_tower: Path) -> list[str]:
    """Overrides under which the quickstart needs no package and few steps."""
    return [
        f"stages.pretrain.image_tower={tiny_folders['image']}",
        f"stages.pretrain.text_tower={text_tower}",
        "stages.pretrain.resolution=0",
        "stages.pretrain.steps=3",
        f"stages.tune.image_tower={tiny_folders['image']}",
        "stages.tune.resolution=0",
        f"stages.tune.decoder={tiny_folders['decoder']}",
        "stages.tune.views=1",
        "stages.tune.words={steps: 2, batch_size: 8}",
        "stages.tune.frozen={steps: 1}",
        "stages.tune.adapt={steps: 3, rank: 2}",
        "stages.tune.batch_size=4",
        "stages.align.steps=2",
        "stages.align.batch_size=4",
    ]


def said(run: Path) -> str:
    return "\n".join(event["text"] for event in read_jsonl(run / "events.jsonl") if "text" in event)


def stage(run: Path, name: str) -> Path:
    (folder,) = run.glob(f"*-{name}")
    return folder


@pytest.mark.parametrize("write", [write_table, write_folder])
def test_own_data_live_the_whole_life(tmp_path: Path, small: list[str], write: Any):
    source = write(tmp_path / "mine")
    # Tasks that such data do not have, as in recipes for emoji.
    more = ["stages.tune.tasks.left=1", "stages.tune.tasks.count=1", "stages.evaluate.tasks=[name.en, yesno, group]"]
    run = runner.start("quickstart", [f"data.source={source}", *small, *more], root=tmp_path / "runs")
    data = read_done(stage(run, "data"))
    assert data is not None
    assert data["summary"]["splits"] == {"train": 22, "test-concept": 2}
    for name in ("pretrain", "tune", "align", "compress", "evaluate"):
        assert read_done(stage(run, name)) is not None, name

    notes = said(run)
    assert "left out, as the data stage made no such questions: count, left" in notes
    assert "there are no questions of test-style: those of test-concept are scored" in notes
    assert "there are no questions of test-style: those of test-concept are asked" in notes
    assert "made no such questions: all of test-style, all of test-both, test-concept/group" in notes

    first = read_json(stage(run, "tune") / "samples" / "000000.json")
    assert {row["split"] for row in first["samples"]} == {"test-concept"}
    predictions = read_jsonl(stage(run, "evaluate") / "predictions.jsonl")
    assert {(row["split"], row["task"]) for row in predictions} == {
        ("test-concept", "name.en"),
        ("test-concept", "yesno"),
    }
    assert {row["target"] for row in predictions if row["task"] == "name.en"} <= set(CAPTIONS)
    assert "quickstart-0001" in (run / "report.html").read_text()


def test_long_captions_are_fitted(tmp_path: Path, small: list[str]):
    """Sentences are described, not named; the rows of the batches grow to hold them."""
    table = write_table(tmp_path / "mine", [f"{caption}, {SENTENCE}" for caption in CAPTIONS])
    run = runner.start("quickstart", [f"data.source={table}", *small, *WITHOUT_LATER], root=tmp_path / "runs")
    shown = read_json(stage(run, "tune") / "samples" / "000000.json")["samples"]
    asked = {row["question"] for row in shown if row["task"] == "name.en"}
    assert asked <= {"Describe the picture.", "What does the picture show?", "What can be seen here?"}
    assert asked
    assert "22 of 22 names have more than 4 tokens" in said(run)


def test_a_row_that_is_set_too_short_names_sample_and_setting(tmp_path: Path, small: list[str]):
    table = write_table(tmp_path / "mine", [f"{caption}, {SENTENCE}" for caption in CAPTIONS])
    with pytest.raises(DataError, match="are longer than a row of 128 tokens") as caught:
        runner.start("quickstart", [f"data.source={table}", *small, "stages.tune.row=128"], root=tmp_path / "runs")
    assert caught.value.place.startswith("sample ")
    assert "set row to" in caught.value.remedy


def test_a_caption_beyond_the_decoder_is_refused_by_name(tmp_path: Path, small: list[str]):
    captions = [*CAPTIONS[:-1], " ".join([SENTENCE] * 5)]
    source = write_folder(tmp_path / "mine", captions)
    settings = [*small, "stages.pretrain=null", "data.source={kind: pairs, path: " + str(source) + ", max_test: 1}"]
    with pytest.raises(DataError, match="longer than the 256 tokens that the decoder reads") as caught:
        runner.start("quickstart", settings, root=tmp_path / "runs")
    assert caught.value.place.startswith("sample ")


def test_without_a_held_out_split_evaluation_is_refused_before_anything_runs(tmp_path: Path, small: list[str]):
    source = write_table(tmp_path / "mine")
    settings = [*small, "data.source={kind: pairs, path: " + str(source) + ", test_fraction: 0}"]
    with pytest.raises(DataError, match="nothing is held out") as caught:
        runner.start("quickstart", settings, root=tmp_path / "runs")
    assert "stages.evaluate=null" in caught.value.remedy
    assert not (tmp_path / "runs").exists()

    run = runner.start("quickstart", [*settings, "stages.evaluate=null"], root=tmp_path / "runs")
    notes = said(run)
    assert "there is no test split: nothing was scored" in notes
    assert "there is no test split: no answers are shown while training" in notes
    assert "there are no questions of test-style: nothing is scored" in notes
    assert "there are no questions of test-style: those of train are asked" in notes


def test_pretraining_may_be_left_out(tmp_path: Path, small: list[str]):
    source = write_folder(tmp_path / "mine")
    rest = [setting for setting in small if "pretrain" not in setting]
    settings = [f"data.source={source}", "stages.pretrain=null", *rest, *WITHOUT_LATER]
    run = runner.start("quickstart", settings, root=tmp_path / "runs")
    assert [folder.name for folder in sorted(run.glob("0*"))] == ["01-data", "02-tune"]


def test_a_split_that_was_deleted_is_missed(tmp_path: Path, tiny_folders: dict[str, Path], text_tower: Path):
    folder = tmp_path / "01-data"
    folder.mkdir()
    Data.model_validate({"source": str(write_table(tmp_path / "mine"))}).run(None, folder, events=Events())
    tune = Tune(image_tower=str(tiny_folders["image"]), resolution=0, decoder=str(tiny_folders["decoder"]))
    pretrain = Pretrain(image_tower=str(tiny_folders["image"]), resolution=0, text_tower=str(text_tower))
    for name, later in (("instruct-test-concept", tune), ("test-concept", pretrain)):
        for path in (folder / "shards").glob(f"{name}-*"):
            path.unlink()
        (tmp_path / later.kind).mkdir()
        with pytest.raises(DataError, match="there are no shards of test-concept any more") as caught:
            later.run(folder, tmp_path / later.kind, events=Events())
        assert caught.value.place.endswith(f"/{name}-000.tar")


@pytest.mark.parametrize("shape", ["source: own/pairs.csv", "source: {kind: pairs, path: own/pairs.csv, root: own}"])
def test_a_path_is_seen_from_where_it_is_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, shape: str):
    """A recipe finds the data beside it from anywhere; an override means the working directory."""
    (tmp_path / "recipes").mkdir()
    (tmp_path / "recipes" / "mine.yaml").write_text(f"name: mine\ndata:\n  {shape}\n")
    (tmp_path / "recipes" / "child.yaml").write_text("extends: ../recipes/mine.yaml\nname: child\n")
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    for recipe in ("mine", "child"):
        source = load_recipe(f"../recipes/{recipe}.yaml").spec.data.source
        assert isinstance(source, PairsSource)
        assert source.path.resolve() == tmp_path / "recipes" / "own" / "pairs.csv"
        assert source.root is None or source.root.resolve() == tmp_path / "recipes" / "own"
    source = load_recipe("../recipes/mine.yaml", ["data.source=other.csv"]).spec.data.source
    assert isinstance(source, PairsSource)
    assert source.path == tmp_path / "elsewhere" / "other.csv"


def test_plan_tells_what_own_data_need(tmp_path: Path, small: list[str], capsys: pytest.CaptureFixture[str]):
    table = write_table(tmp_path / "mine")
    command = ["plan", "quickstart", "--no-probe", "--json", "--runs", str(tmp_path / "runs")]
    assert main([*command, f"data.source={table}", *small]) == 0
    plan = json.loads(capsys.readouterr().out)
    assert plan["refused"] is None
    assert [row["stage"] for row in plan["stages"]][:2] == ["data", "pretrain"]
    assert plan["stages"][0]["samples"]["train"] == 22
    assert not (tmp_path / "runs").exists()
