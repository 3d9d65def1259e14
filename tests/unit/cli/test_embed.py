"""``plait embed``: vectors of pictures and texts, what is nearest, and what could not be read."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from PIL import Image
from safetensors import safe_open

from plait.assembly.dual import HeadSizes, build_dual, save_dual
from plait.assembly.towers import load_image_tower, load_text_tower
from plait.cli.main import main as plait


@pytest.fixture
def model(tiny_folders: dict[str, Path], tmp_path: Path) -> Path:
    torch.manual_seed(0)
    image = load_image_tower(str(tiny_folders["image"]), size=32)
    dual = build_dual(
        image, load_text_tower(str(tiny_folders["text"]), max_tokens=32), HeadSizes(d_hidden=16, d_shared=8), scale=20.0
    )
    folder = tmp_path / "dual"
    folder.mkdir()
    save_dual(dual, folder)
    return folder


@pytest.fixture
def pictures(tmp_path: Path) -> list[str]:
    paths = [tmp_path / f"{color}.png" for color in ("red", "blue")]
    for path in paths:
        Image.new("RGB", (40, 30), path.stem).save(path)
    return [str(path) for path in paths]


@pytest.mark.row("S3-11")
def test_pictures_and_texts_become_unit_vectors_of_one_space(
    model: Path, pictures: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "new" / "vectors.safetensors"
    assert plait(["embed", str(model), "--image", *pictures, "--text", "a cat", "b", "--json", "--out", str(out)]) == 0
    found = json.loads(capsys.readouterr().out)
    with safe_open(out, "pt") as file:
        image, text = file.get_tensor("image"), file.get_tensor("text")
        assert json.loads(file.metadata()["text"]) == ["a cat", "b"]
    assert image.shape == text.shape == (2, 8)
    torch.testing.assert_close(image.norm(dim=1), torch.ones(2))
    torch.testing.assert_close(image @ text.T, torch.tensor(found["cosine"]))
    torch.testing.assert_close(image @ image.T, torch.tensor(found["cosines"]["image-image"]))
    torch.testing.assert_close(text @ text.T, torch.tensor(found["cosines"]["text-text"]))
    assert (found["dimension"], found["images"], found["refused"]) == (8, pictures, [])


def test_each_item_is_told_with_what_is_nearest_to_it(
    model: Path, pictures: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    assert plait(["embed", str(model), "--image", pictures[0], "--text", "a", "b", "c", "--top", "2"]) == 0
    lines = capsys.readouterr().out.splitlines()
    blocks = [line for line in lines if not line.startswith("  ")]
    assert blocks == [pictures[0], "a", "b", "c"]
    first, second = (float(line.split()[0]) for line in lines[1:3])
    assert first >= second
    assert lines.index("a") == 3
    assert plait(["embed", str(model), "--text", "a", "b"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[-1] for line in lines] == ["a", "b", "b", "a"], "nothing is its own neighbor"


def test_what_cannot_be_read_is_told_and_the_rest_goes_on(
    model: Path, pictures: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    broken = tmp_path / "broken.png"
    broken.write_bytes(b"no picture")
    names = [pictures[0], str(broken), str(tmp_path / "nowhere.png")]
    assert plait(["embed", str(model), "--text", "a", "--image", *names]) == 4
    said = capsys.readouterr()
    assert pictures[0] in said.out
    assert "broken.png" in said.err
    assert "nowhere.png" in said.err
    assert "2 of 3 files could not be read" in said.err


def test_other_models_and_nothing_to_do_are_refused(
    model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert plait(["embed", str(model)]) == 2
    assert plait(["embed", str(model), "--text", "a", "--top", "0"]) == 2
    assert plait(["embed", str(model), "--text", "a", "--out", str(tmp_path)]) == 2
    assert plait(["embed", str(model), "--text", "a", "--out", str(model / "plait.json" / "x")]) == 5
    assert "cannot be written" in capsys.readouterr().err
    run = tmp_path / "run"
    run.mkdir()
    (run / "recipe.yaml").write_text("name: x\n")
    assert plait(["embed", str(run), "--text", "a"]) == 7
    assert "no finished pretrain stage" in capsys.readouterr().err
    record = json.loads((model / "plait.json").read_text())
    (model / "plait.json").write_text(json.dumps(record | {"kind": "multimodal"}))
    assert plait(["embed", str(model), "--text", "a"]) == 7
    assert "'multimodal'" in capsys.readouterr().err
