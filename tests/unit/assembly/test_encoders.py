"""A spec of any modality becomes an encoder, from scratch or from a folder."""

from pathlib import Path

import pytest
import torch
from transformers import Wav2Vec2Config, Wav2Vec2FeatureExtractor, Wav2Vec2Model

from plait.assembly.encoders import load_encoder
from plait.core.errors import ConfigError
from plait.core.protocols import Encoder
from plait.core.tensors import Patches
from plait.models import audio_specs, specs, text_specs, video_specs

SCRATCH = [
    specs.ResNet(size=32, depth=18, width=8),
    audio_specs.Whisper(d=8, depth=1, heads=2, mels=4, tokens=10),
    video_specs.SpaceTime(size=16, frames=2, patch=8, d=12, depth=1, heads=2),
    video_specs.FramesThenTime(tower=specs.ViT(size=16, patch=8, d=12, depth=1, heads=2), depth=1, heads=2),
    text_specs.Bert(vocabulary=9, d=8, depth=1, heads=2),
]


@pytest.mark.parametrize("spec", SCRATCH, ids=lambda spec: spec.kind)
def test_from_scratch_it_learns(spec: specs.Part) -> None:
    encoder = load_encoder(spec)
    assert encoder.training
    assert all(p.requires_grad for p in encoder.parameters())


def test_pictures_and_frames_from_a_folder(tiny_folders: dict[str, Path]) -> None:
    image = specs.PretrainedImage(name=str(tiny_folders["image"]), dtype="float32")
    pictures = load_encoder(image)
    assert isinstance(pictures, Encoder)
    video = load_encoder(video_specs.FramesThenTime(tower=image, over_time="mean"))
    assert isinstance(video, Encoder)
    side = 32
    frames = torch.rand(2, side * side, 3)
    grid = torch.tensor([[1, side, side]])
    alone = torch.stack([pictures(Patches(values=frame, grid=grid)).values.mean(0) for frame in frames]).mean(0)
    found = video(Patches(values=frames.flatten(0, 1), grid=torch.tensor([[2, side, side]])))
    torch.testing.assert_close(found.values[0], alone)
    assert not any(p.requires_grad for p in video.parameters())


def test_sounds_and_texts_from_a_folder(tiny_folders: dict[str, Path], tmp_path: Path) -> None:
    sizes = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 16}
    convolutions = {"conv_dim": (8,) * 7, "num_conv_pos_embeddings": 4, "num_conv_pos_embedding_groups": 2}
    Wav2Vec2Model(Wav2Vec2Config(**sizes, **convolutions)).save_pretrained(tmp_path)
    Wav2Vec2FeatureExtractor().save_pretrained(tmp_path)
    audio = load_encoder(audio_specs.PretrainedAudio(name=str(tmp_path), dtype="float32"))
    assert isinstance(audio, Encoder)
    assert audio.d_out == 16
    text = load_encoder(text_specs.PretrainedText(name=str(tiny_folders["text"]), max_tokens=8, dtype="float32"))
    assert not text.training


@pytest.mark.parametrize("spec", [audio_specs.PretrainedAudio(name="none"), video_specs.PretrainedVideo()])
def test_a_folder_must_be_named(spec: specs.Part) -> None:
    with pytest.raises(ConfigError, match=r"is no folder|no audio tower"):
        load_encoder(spec)
    with pytest.raises(ConfigError, match="Mlp is not built from scratch"):
        load_encoder(specs.Mlp())
