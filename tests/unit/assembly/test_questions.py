"""Questions with features: what is chosen is encoded and nothing else, views only of the first split, faults named."""

from __future__ import annotations

import hashlib
import io
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from plait.assembly.questions import Questions, read_questions
from plait.assembly.towers import ImageTower, load_image_tower
from plait.core.errors import DataError
from plait.core.events import Event, Events
from plait.core.types import MediaRef, Sample, Text, Turn
from plait.data.augment.views import View
from plait.data.media import decode_image
from plait.data.shards import ShardReader, write_shards


def png(seed: int) -> bytes:
    out = io.BytesIO()
    Image.fromarray(np.random.default_rng(seed).integers(0, 256, (20, 30, 3), dtype=np.uint8)).save(out, "PNG")
    return out.getvalue()


def asked(picture: int, task: str) -> tuple[Sample, dict[str, bytes]]:
    data = png(picture)
    sha256 = hashlib.sha256(data).hexdigest()
    ref = MediaRef(modality="image", sha256=sha256, uri="", width=30, height=20)
    turns = (
        Turn(role="user", parts=(ref, Text(text="what?"))),
        Turn(role="assistant", parts=(Text(text=f"name {picture}"),), trained=True),
    )
    return Sample(id=f"q{picture}-{task}", turns=turns, meta={"task": task}), {sha256: data}


@pytest.fixture
def shards(tmp_path: Path) -> Path:
    """Six training pictures with two questions each, three test pictures with one, one of them a training picture."""
    folder = tmp_path / "shards"
    folder.mkdir()
    write_shards(folder, "instruct-train", [asked(n, task) for n in range(6) for task in ("name", "yesno")])
    write_shards(folder, "instruct-test-concept", [asked(n, "name") for n in (5, 6, 7)])
    return folder


@pytest.fixture
def tower(tiny_folders: dict[str, Path]) -> ImageTower:
    return load_image_tower(str(tiny_folders["image"]), dtype="float32")


def everything(split: str, samples: Sequence[Sample]) -> Sequence[Sample]:
    return samples


def names_only(split: str, samples: Sequence[Sample]) -> Sequence[Sample]:
    return [s for s in samples if s.meta["task"] == "name" and s.id != "q0-name"]


def read(shards: Path, tower: ImageTower, **named: object) -> tuple[Questions, list[str]]:
    said: list[str] = []

    def listener(event: Event) -> None:
        if event.text.startswith("features: "):
            said.append(event.text)

    settings: dict[str, object] = {"choose": everything, "splits": ("train", "test-concept", "test-style"), **named}
    found = read_questions(
        shards,
        cache=shards.parent / "cache",
        image=tower,
        events=Events(listeners=(listener,)),
        **settings,  # pyright: ignore[reportArgumentType]
    )
    return found, said


def test_a_split_that_the_data_do_not_have_is_left_out_and_order_is_the_shards(shards: Path, tower: ImageTower) -> None:
    found, _ = read(shards, tower)
    assert list(found.samples) == ["train", "test-concept"]
    assert [s.id for s in found.samples["train"]][:3] == ["q0-name", "q0-yesno", "q1-name"]
    assert len(found.samples["train"]) == 12
    assert len(found.samples["test-concept"]) == 3


def test_pictures_of_chosen_questions_are_encoded_once_and_no_others(shards: Path, tower: ImageTower) -> None:
    found, said = read(shards, tower, choose=names_only)
    assert len(found.stores) == 1
    pictures = {ref.sha256 for samples in found.samples.values() for s in samples for ref in s.media()}
    assert len(pictures) == 7  # 1 to 5 and 5 to 7
    assert all(sha256 in found.stores[0] for sha256 in pictures)
    assert hashlib.sha256(png(0)).hexdigest() not in found.stores[0]
    assert said[0].startswith("features: 7 computed, 0 reused")
    _, again = read(shards, tower)
    assert again[0].startswith("features: 1 computed, 7 reused")


def test_views_are_of_the_first_split_only_and_are_what_the_tower_sees(shards: Path, tower: ImageTower) -> None:
    view = View(2)
    found, _ = read(shards, tower, views=[View(1), view])
    assert len(found.stores) == 3
    outside = [hashlib.sha256(png(number)).hexdigest() for number in (6, 7)]
    assert all(sha256 in found.stores[0] for sha256 in outside)
    assert not any(sha256 in store for store in found.stores[1:] for sha256 in outside)
    sample = found.samples["train"][4]
    (ref,) = sample.media()
    with ShardReader(shards, "instruct-train") as reader:
        picture = decode_image(reader.media(ref), place="here")
    for store, drawn in ((found.stores[0], picture), (found.stores[2], view(picture))):
        with torch.inference_mode():
            expected = tower.encoder(tower.prepare(drawn))
        came = store([ref.sha256])
        assert torch.equal(came.grid, expected.grid)
        # Kept in 16 bits; encoded alone rather than in a batch.
        torch.testing.assert_close(came.values.float(), expected.values, rtol=2e-3, atol=2e-3)
    assert not torch.equal(found.stores[0]([ref.sha256]).values, found.stores[2]([ref.sha256]).values)
    assert torch.equal(found.features([ref]).values, found.stores[0]([ref.sha256]).values)


def test_no_question_left_and_no_first_split_are_said(shards: Path, tower: ImageTower) -> None:
    with pytest.raises(DataError, match="no question of 'train' is left"):
        read(shards, tower, choose=lambda split, samples: [])
    with pytest.raises(DataError, match="instruct-test-both"):
        read(shards, tower, splits=("test-both",))
