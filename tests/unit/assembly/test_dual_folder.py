from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from plait.assembly.dual import Dual, HeadSizes, build_dual, load_dual, save_dual
from plait.assembly.towers import load_image_tower, load_text_tower
from plait.core.errors import CheckpointError
from plait.core.manifest import write_manifest

pytestmark = pytest.mark.real


@pytest.fixture(scope="module")
def dual(packages: Callable[[str], Path]) -> Dual:
    packages("efficientnet-lite0")
    torch.manual_seed(0)
    image, text = load_image_tower("efficientnet-lite0", size=64), load_text_tower("minilm", max_tokens=32)
    return build_dual(image, text, HeadSizes(d_hidden=16, d_shared=8, dropout=0.1), scale=20.0)


@pytest.fixture
def folder(dual: Dual, tmp_path: Path) -> Path:
    save_dual(dual, tmp_path)
    return tmp_path


def change(path: Path, edit: Callable[[dict], object]) -> None:
    record = json.loads(path.read_text())
    edit(record)
    path.write_text(json.dumps(record))


def test_what_is_saved_comes_back(dual: Dual, folder: Path):
    assert {p.name for p in folder.iterdir()} == {"config.json", "model.safetensors", "plait.json"}
    again = load_dual(folder)
    assert again.sizes == dual.sizes
    assert again.image.contract == dual.image.contract
    assert not again.model.training
    for name, value in dual.model.state_dict().items():
        assert torch.equal(again.model.state_dict()[name], value)


@pytest.mark.parametrize(
    ("file", "edit", "match"),
    [
        (
            "plait.json",
            lambda r: r["composition"]["image"].update(key="0" * 64),
            "the image tower 'efficientnet-lite0'",
        ),
        ("plait.json", lambda r: r["composition"]["text"].update(key="0" * 64), "the text tower 'minilm'"),
        ("plait.json", lambda r: r.update(format=99), "format 99"),
        ("plait.json", lambda r: r.update(kind="multimodal"), "'multimodal'"),
        ("plait.json", lambda r: r["composition"].pop("text"), "a field is missing"),
        ("config.json", lambda r: r.update(d_hidden=17), "tensors do not fit"),
    ],
)
def test_what_does_not_fit_is_refused(folder: Path, file: str, edit: Callable[[dict], object], match: str):
    change(folder / file, edit)
    with pytest.raises(CheckpointError, match=match):
        load_dual(folder)


@pytest.mark.parametrize("file", ["config.json", "model.safetensors", "plait.json"])
def test_missing_and_cut_files_are_named(folder: Path, file: str):
    (folder / file).write_bytes((folder / file).read_bytes()[:10])
    with pytest.raises(CheckpointError, match=r"cannot be read|not valid JSON"):
        load_dual(folder)
    (folder / file).unlink()
    with pytest.raises(CheckpointError) as caught:
        load_dual(folder)
    assert file in str(caught.value)


def test_a_flipped_bit_is_found_by_the_manifest_before_anything_is_loaded(folder: Path):
    (folder / "resume").mkdir()
    (folder / "resume" / "optimizer.safetensors").write_bytes(b"not the model's")
    write_manifest(folder, step=3)
    load_dual(folder)
    (folder / "resume" / "optimizer.safetensors").write_bytes(b"damaged, and not the model's")
    load_dual(folder)
    weights = bytearray((folder / "model.safetensors").read_bytes())
    weights[-1] ^= 1
    (folder / "model.safetensors").write_bytes(weights)
    with pytest.raises(CheckpointError, match=r"damaged: sha256 of model\.safetensors") as caught:
        load_dual(folder)
    assert caught.value.place == str(folder)
    assert "manifest.json" in caught.value.remedy
    (folder / "manifest.json").unlink()  # somebody answers for the change
    load_dual(folder)
