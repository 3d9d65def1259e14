"""Folders of picture towers: what is found in them, what their preprocessing becomes, and what is refused."""

from __future__ import annotations

import hashlib
import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from tests.tiny_towers import TOWERS

from plait.assembly.local import fingerprint
from plait.assembly.towers import ImageTower, load_image_tower
from plait.core.errors import CheckpointError, ConfigError, DataError
from plait.core.events import Events
from plait.core.tensors import Patches
from plait.models.towers.families import DUAL, FAMILIES

MEAN, STD = (0.48, 0.45, 0.40), (0.26, 0.25, 0.27)


def load(path: Path, **settings: Any) -> ImageTower:
    return load_image_tower(str(path), dtype="float32", **settings)


def picture(h: int, w: int) -> Patches:
    values = torch.rand(h * w, 3, generator=torch.Generator().manual_seed(0))
    return Patches(values=values, grid=torch.tensor([[1, h, w]]))


# --- whole folders -------------------------------------------------------------------------------------------------

PIXELS = picture(32, 32)


def given() -> torch.Tensor:
    """:data:`PIXELS` as transformers gets them."""
    pixels = (PIXELS.values.view(32, 32, 3) - torch.tensor(MEAN)) / torch.tensor(STD)
    return pixels.permute(2, 0, 1)[None]


@pytest.mark.row("S0-02")
@pytest.mark.parametrize("kind", DUAL)
@torch.no_grad()
def test_the_picture_tower_of_a_dual_encoder(kind, tiny_towers):
    """The same as that tower in a folder of its own: values of those are compared in test_pretrained_towers.py."""
    tower = load(tiny_towers.folder(f"dual-{kind}")).encoder
    alone = tiny_towers.theirs(f"dual-{kind}").vision_model
    assert not any("text" in key for key, _ in tower.named_parameters())
    mine, theirs = dict(tower.backbone.named_parameters()), dict(alone.named_parameters())
    assert all(weight.equal(theirs[key]) for key, weight in mine.items())
    if kind != "siglip2":  # whose pictures are patches already
        wanted = alone(pixel_values=given()).last_hidden_state[0, -16:]
        torch.testing.assert_close(tower(PIXELS).values, wanted, atol=2e-5, rtol=1e-5)


HEADS = {
    "vit": "ViTForImageClassification",
    "deit": "DeiTForImageClassificationWithTeacher",
    "vit_mae": "ViTMAEForPreTraining",
    "beit": "BeitForImageClassification",
    "swin": "SwinForImageClassification",
    "swinv2": "Swinv2ForImageClassification",
    "convnext": "ConvNextForImageClassification",
    "resnet": "ResNetForImageClassification",
    "dinov2": "Dinov2ForImageClassification",
}


@pytest.mark.parametrize("name", HEADS)
@torch.no_grad()
def test_folders_of_classifiers_and_of_pretraining_are_towers_too(name, tiny_towers, tmp_path, capfd):
    """Published folders often hold these; their own head is left, and a pooler that they lack is not missed."""
    whole = tiny_towers.make(name, model=HEADS[name])
    tiny_towers.write(whole, tmp_path)
    inner = getattr(whole, whole.base_model_prefix)
    capfd.readouterr()
    tower = load(tmp_path).encoder
    assert "REPORT" not in capfd.readouterr().err, "what is not missed is not reported either"
    mine, theirs = dict(tower.backbone.named_parameters()), dict(inner.named_parameters())
    assert all(weight.equal(theirs[key]) for key, weight in mine.items())
    if name != "vit_mae":  # which masks
        last = inner(pixel_values=given()).last_hidden_state[0]
        wanted = last[-16:] if last.ndim == 2 else last.flatten(1).T
        torch.testing.assert_close(tower(PIXELS).values, wanted, atol=2e-5, rtol=1e-5)


def test_every_family_is_tried(tiny_towers):
    """Those of the table in tiny_towers.py; test_pretrained_towers.py goes through it, MetaCLIP 2 is tried above."""
    made = {tiny_towers.model_type(name) for name in TOWERS if not name.startswith("dual-")}
    assert made | {"metaclip_2_vision_model"} == set(FAMILIES)


# --- the key -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["clip", "siglip", "vit", "dinov2"])
def test_saved_models_find_the_towers_they_were_trained_on(name, tiny_towers):
    """The key of a tower with settings of before this file was written, computed as it was then."""
    path = tiny_towers.folder(name)
    contract = {"size": 32, "resample": "bicubic", "background": [255] * 3, "mean": list(MEAN), "std": list(STD)}
    record = {"weights": fingerprint(path), "dtype": "float32", "contract": contract, "code": 1}
    wanted = hashlib.sha256(json.dumps(record, sort_keys=True).encode()).hexdigest()
    tower = load(path)
    assert tower.key == wanted
    assert tower.settings == {"name": str(path), "size": 32, "dtype": "float32"}
    assert load(path, size=32, layer=-1).key == wanted


# --- refused -------------------------------------------------------------------------------------------------------


def changed(path: Path, target: Path, **changes: Any) -> Path:
    shutil.copytree(path, target)
    config = json.loads((target / "config.json").read_text()) | changes
    (target / "config.json").write_text(json.dumps({k: v for k, v in config.items() if v is not None}))
    return target


def test_positions_that_are_not_interpolated_have_one_size(tiny_towers):
    path = tiny_towers.folder("aimv2")
    with pytest.raises(ConfigError, match="size is 64, this tower takes 32 pixels") as caught:
        load(path, size=64)
    assert "32" in caught.value.remedy
    with pytest.raises(DataError, match=r"32 x 32 pixels, came a grid of \[1, 16, 32\]"):
        load(path, size=32).encoder(picture(16, 32))


@pytest.mark.parametrize(
    ("changes", "cause", "remedy"),
    [
        ({"model_type": "llama"}, "model_type is 'llama', which is no picture tower", "siglip2_vision_model"),
        ({"model_type": "vitdet"}, "model_type is 'vitdet'", "swin"),
        ({"model_type": None}, "model_type is None", "clip"),
        ({"model_type": None, "architecture": "resnet50"}, "a folder of timm", "transformers"),
        ({"model_type": "timm_wrapper"}, "a folder of timm", "transformers"),
        ({"image_size": [32, 64]}, r"1 of another shape: embeddings\.position_embeddings", "undamaged"),
        (
            {"patch_size": [8, 4]},
            r"no picture tower can be read|patch_size is \[8, 4\]|2 of another shape: .*patch_embeddings",
            "",
        ),
        ({"num_hidden_layers": 3}, "16 missing: layers.2", "undamaged"),
        ({"hidden_size": 24}, r"\d+ of another shape: .* and \d+ more", "undamaged"),
    ],
    ids=str,
)
def test_folders_that_are_no_known_tower_are_refused(changes, cause, remedy, tiny_towers, tmp_path):
    path = changed(tiny_towers.folder("vit"), tmp_path / "other", **changes)
    with pytest.raises(CheckpointError, match=cause) as caught:
        load(path)
    assert remedy in caught.value.remedy
    assert caught.value.place


def test_damaged_and_pickled_weights_are_refused(tiny_towers, tmp_path):
    path = changed(tiny_towers.folder("swin"), tmp_path / "damaged")
    weights = path / "model.safetensors"
    whole = weights.read_bytes()
    weights.write_bytes(whole[: len(whole) // 2])
    with pytest.raises(CheckpointError, match="no picture tower can be read"):
        load(path)
    weights.write_bytes(whole)
    state = load_file(weights)
    lost = "encoder.layers.0.blocks.1.attention.self.relative_position_bias_table"
    save_file({key: value for key, value in state.items() if key != lost}, weights, metadata={"format": "pt"})
    with pytest.raises(CheckpointError, match=r"1 missing: encoder\.layers\.0\.blocks\.1"):
        load(path)
    weights.rename(path / "pytorch_model.bin")
    with pytest.raises(CheckpointError, match="no safetensors weights") as caught:
        load(path)
    assert "save_pretrained" in caught.value.remedy


def test_a_tower_of_pictures_that_are_not_square_is_refused(tiny_towers, tmp_path):
    tiny_towers.write(tiny_towers.make("vit", image_size=[32, 64]), tmp_path)
    with pytest.raises(CheckpointError, match=r"image_size is \[32, 64\], expected one number or a square"):
        load(tmp_path)


def test_a_config_that_is_no_json_is_refused(tiny_towers, tmp_path):
    path = changed(tiny_towers.folder("vit"), tmp_path / "other")
    (path / "config.json").write_text("{")
    with pytest.raises(CheckpointError) as caught:
        load(path)
    assert caught.value.place == str(path / "config.json")


# --- the media contract --------------------------------------------------------------------------------------------

SIDES = {"convnext": 16, "resnet": 16}
"""Pixels a side of a token, where they are not 8."""

PUBLISHED: dict[str, tuple[str, dict[str, Any], int, str]] = {
    "dinov2": ("dinov2", {"size": {"shortest_edge": 40}, "crop_size": {"height": 24, "width": 24},
                          "do_center_crop": True, "image_processor_type": "BitImageProcessor"}, 24, "cuts their"),
    "old-deit": ("deit", {"size": 40, "crop_size": 32, "do_center_crop": True}, 32, "cuts their edges off"),
    "old-vit": ("vit", {"size": 32, "feature_extractor_type": "ViTFeatureExtractor"}, 32, ""),
    "old-mae": ("vit_mae", {"size": 32}, 32, ""),
    "old-resnet": ("resnet", {"size": 36, "crop_pct": 0.875}, 36, "cuts their edges off"),
    "convnext": ("convnext", {"size": {"shortest_edge": 32}, "crop_pct": 0.875}, 32, "cuts their edges off"),
    "convnext-384": ("convnext", {"size": {"shortest_edge": 384}, "crop_pct": 1.0}, 384, "bends them"),
    "naflex": ("siglip2", {"size": None, "patch_size": 8, "max_num_patches": 30, "resample": 2}, 40, "keeps their"),
    "pixtral": ("pixtral", {"size": {"longest_edge": 64}, "patch_size": {"height": 8, "width": 8}}, 64, "keeps their"),
    "dinov3": ("dinov3", {"size": {"height": 48, "width": 48}, "do_center_crop": None, "crop_size": None}, 48, "bends"),
    "swin": ("swin", {"size": {"height": 32, "width": 32}, "do_resize": True, "do_normalize": True}, 32, "bends"),
    "beit": ("beit", {"size": {"height": 32, "width": 32}, "do_center_crop": False, "do_reduce_labels": False,
                      "crop_size": {"height": 32, "width": 32}, "rescale_factor": 0.00392156862745098}, 32, "bends"),
}  # fmt: skip
"""Forms in which published folders say it, with the numbers of tiny towers."""


@pytest.mark.parametrize("name", PUBLISHED)
@torch.no_grad()
def test_what_published_folders_ask_for_becomes_the_contract(name, tiny_towers, tmp_path):
    case, changes, side, otherwise = PUBLISHED[name]
    path = changed(tiny_towers.folder(case), tmp_path / "other")
    file = path / "preprocessor_config.json"
    settings = json.loads(file.read_text()) | changes
    file.write_text(json.dumps({k: v for k, v in settings.items() if v is not None or k != "size"}))
    seen = []
    tower = load(path, events=Events(listeners=(seen.append,)))
    assert tower.contract.size == tower.settings["size"] == side
    said = " ".join(event.text for event in seen)
    assert otherwise in said
    assert ("here they are fitted whole" in said) == bool(otherwise)
    interpolated = case in ("dinov2", "siglip2")
    assert ("are interpolated to" in said) == interpolated, said
    out = tower.encoder(tower.prepare(_photo(50, 20)))
    cells_ = -(-side // SIDES.get(case, 8))
    assert out.grid.tolist() == [[1, cells_, cells_]]


def test_the_joint_file_of_transformers_5_is_read_as_well(tiny_towers, tmp_path):
    path = changed(tiny_towers.folder("clip"), tmp_path / "other")
    file, joint = path / "preprocessor_config.json", path / "processor_config.json"
    joint.write_text(json.dumps({"image_processor": json.loads(file.read_text()), "processor_class": "CLIPProcessor"}))
    contract = load(path).contract
    file.unlink()
    assert load(path).contract == contract
    joint.write_text(json.dumps({"processor_class": "CLIPProcessor"}))
    with pytest.raises(CheckpointError, match="holds no image_processor") as caught:
        load(path)
    assert caught.value.place == str(joint)


@pytest.mark.parametrize(
    ("case", "field", "changes"),
    [
        ("siglip2", "patch_size", {"patch_size": 16, "max_num_patches": 16}),
        ("siglip2", "max_num_patches", {"patch_size": 8, "max_num_patches": 0}),
        ("dinov2", "crop_size", {"do_center_crop": True, "crop_size": {"height": 24, "width": 32}}),
        ("dinov2", "crop_size", {"do_center_crop": True, "crop_size": {"height": 30, "width": 30}}),
        ("dinov2", "size", {"do_center_crop": True, "crop_size": 32, "size": {"shortest_edge": 24}}),
        ("convnext", "crop_pct", {"crop_pct": 0}),
        ("convnext", "size", {"size": {"shortest_edge": 40}, "crop_pct": 0.875}),
        ("aimv2", "size", {"size": {"height": 64, "width": 64}}),
        ("resnet", "size", {"size": {"height": 32, "width": 64}}),
        ("vit", "size", {"size": [32, 48]}),
        ("vit", "size", {"size": {}}),
        ("vit", "size", {"size": {"height": [32]}}),
        ("pixtral", "do_pad", {"do_pad": True}),
    ],
    ids=str,
)
def test_what_is_not_done_here_is_refused(case, field, changes, tiny_towers, tmp_path):
    path = changed(tiny_towers.folder(case), tmp_path / "other")
    file = path / "preprocessor_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | changes))
    with pytest.raises(CheckpointError, match=f"{field} is ") as caught:
        load(path)
    assert caught.value.place == f"{file}: {field}"


def _photo(width: int, height: int):

    return Image.new("RGB", (width, height), (200, 30, 90))
