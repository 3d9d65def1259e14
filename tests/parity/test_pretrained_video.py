"""A folder of VideoMAE behind our face = transformers; what does not fit is refused."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from transformers import (
    VideoMAEConfig,
    VideoMAEForPreTraining,
    VideoMAEForVideoClassification,
    VideoMAEModel,
)

from plait.assembly.video_towers import load_video_tower
from plait.core.errors import CheckpointError, ConfigError, DataError
from plait.core.events import Events
from plait.core.protocols import Encoder
from plait.data.frames import uniform

TINY: dict[str, Any] = {
    "hidden_size": 12, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2, "image_size": 16,
    "patch_size": 4, "num_frames": 4, "tubelet_size": 2, "decoder_num_attention_heads": 2, "decoder_hidden_size": 8,
    "decoder_num_hidden_layers": 1, "decoder_intermediate_size": 8,
}  # fmt: skip
PREPROCESSING = {
    "do_resize": True, "size": {"shortest_edge": 16}, "resample": 2, "do_center_crop": True,
    "crop_size": {"height": 16, "width": 16}, "do_rescale": True, "rescale_factor": 1 / 255, "do_normalize": True,
    "image_mean": [0.485, 0.456, 0.406], "image_std": [0.229, 0.224, 0.225],
    "image_processor_type": "VideoMAEImageProcessor",
}  # fmt: skip
KINDS = {"bare": VideoMAEModel, "classifier": VideoMAEForVideoClassification, "pretraining": VideoMAEForPreTraining}


@pytest.fixture
def folder(tmp_path: Path):
    def make(kind: str, *, mean: bool = True) -> tuple[Path, Any]:
        torch.manual_seed(0)
        model = KINDS[kind](VideoMAEConfig(**TINY, use_mean_pooling=mean)).eval()
        for value in model.parameters():
            torch.nn.init.normal_(value, std=0.2)
        model.save_pretrained(tmp_path / kind)
        (tmp_path / kind / "preprocessor_config.json").write_text(json.dumps(PREPROCESSING))
        return tmp_path / kind, model

    return make


def video(total: int) -> list[Image.Image]:
    pixels = np.random.default_rng(0).integers(0, 256, (total, 16, 16, 3), dtype=np.uint8)
    return [Image.fromarray(frame) for frame in pixels]


@pytest.mark.row("S4-43")
@torch.no_grad()
@pytest.mark.parametrize("mean", [False, True])
@pytest.mark.parametrize("kind", KINDS)
def test_a_folder_says_what_transformers_says(folder, kind, mean):
    path, model = folder(kind, mean=mean)
    tower = load_video_tower(str(path), dtype="float32")
    assert isinstance(tower.encoder, Encoder)
    whole = video(11)
    frames = [whole[i] for i in uniform(len(whole), tower.frames)]
    media = tower.clip(frames)
    found = tower.encoder(media)
    assert found.grid.tolist() == tower.encoder.grid_out(media.grid).tolist() == [[2, 4, 4]]
    pixels = torch.from_numpy(np.stack([np.array(f) for f in frames])).float() / 255
    mean_of, std_of = (torch.tensor(PREPROCESSING[name]) for name in ("image_mean", "image_std"))
    normal = ((pixels - mean_of) / std_of).permute(0, 3, 1, 2)[None]
    wanted = getattr(model, "videomae", model)(normal).last_hidden_state[0]
    torch.testing.assert_close(found.values, wanted, atol=1e-5, rtol=1e-4)  # worst measured: 4e-7 of the largest


def test_what_is_left_out_is_said_and_settings_give_the_tower_again(folder):
    said: list[Any] = []
    events = Events(listeners=(said.append,))
    path, _ = folder("classifier")
    tower = load_video_tower(str(path), dtype="float32", events=events)
    assert any("4 tensors of a classifier" in event.text for event in said)
    assert any("frames that are not square" in event.text for event in said)
    assert load_video_tower(**tower.settings).key == tower.key
    rounded = load_video_tower(str(path), dtype="bfloat16")
    assert rounded.key != tower.key
    assert rounded.encoder(rounded.clip(video(4))).values.dtype == torch.bfloat16
    assert not any(p.requires_grad for p in tower.encoder.parameters())
    with pytest.raises(DataError, match="3 frames came, this tower takes 4"):
        tower.clip(video(3))


def test_folders_that_do_not_fit_are_refused(folder, tmp_path):
    with pytest.raises(ConfigError, match=r"no folder with a config\.json"):
        load_video_tower(str(tmp_path / "nowhere"))
    path, _ = folder("bare")
    settings = path / "preprocessor_config.json"
    settings.write_text(json.dumps(PREPROCESSING | {"crop_size": {"height": 32, "width": 32}}))
    with pytest.raises(CheckpointError, match="expected 16 pixels, the tower's image_size"):
        load_video_tower(str(path))
    settings.write_text(json.dumps(PREPROCESSING))
    state = load_file(path / "model.safetensors")
    save_file({k: v for k, v in state.items() if "layernorm_after.bias" not in k}, path / "model.safetensors")
    with pytest.raises(CheckpointError, match=r"2 of \d+ tensors do not fit, such as .*feed_forward_part\.norm\.bias"):
        load_video_tower(str(path))
    (path / "model.safetensors").write_bytes(b"nothing")
    with pytest.raises(CheckpointError, match="weights cannot be read"):
        load_video_tower(str(path))
    config = json.loads((path / "config.json").read_text())
    (path / "config.json").write_text(json.dumps(config | {"model_type": "vivit"}))
    (path / "model.safetensors").unlink()
    save_file(state, path / "model.safetensors")
    with pytest.raises(CheckpointError, match="model_type is 'vivit', expected 'videomae'"):
        load_video_tower(str(path))
    (path / "config.json").write_text("[]")
    with pytest.raises(CheckpointError, match="no configuration of VideoMAE"):
        load_video_tower(str(path))
