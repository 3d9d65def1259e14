"""Every encoder of sounds, videos and texts in the list: published counts, small ones run, and settings are kept."""

from typing import Any, get_args

import pytest
import torch
from torch import nn

from plait.core.errors import ConfigError
from plait.core.protocols import Encoder
from plait.core.spec import Spec, resolve
from plait.core.tensors import Patches
from plait.core.yamltext import Node, Source
from plait.models import audio_specs, fusion_specs, specs, text_specs, video_specs
from plait.models.audio_specs import Wav2Vec2, Whisper
from plait.models.build_media import build_audio, build_text, build_video
from plait.models.text_specs import T5, Bert, Gpt, Llama
from plait.models.towers.video import SpaceTimeTransformer
from plait.models.video_specs import FramesThenTime, SpaceTime

AUDIO: dict[str, specs.Part] = {
    "whisper": Whisper(d=16, depth=1, heads=2, mels=8, tokens=50),
    "wav2vec2": Wav2Vec2(d=16, depth=1, heads=2, channels=8, position_kernel=4, position_groups=2),
    "wav2vec2 large": Wav2Vec2(
        d=16, depth=1, heads=2, form="large", channels=8, position_kernel=4, position_groups=2, vocabulary=5
    ),
}
TOWER = specs.ViT(size=16, patch=8, d=12, depth=1, heads=2)
VIDEO: dict[str, specs.Part] = {
    "frames": FramesThenTime(tower=TOWER, depth=1, heads=2),
    "frames, all cells": FramesThenTime(
        tower=specs.ResNet(size=32, depth=18, width=8), cells="all", depth=1, heads=2, position="rope"
    ),
    "frames, mean": FramesThenTime(tower=TOWER, cells="all", over_time="mean"),
    "space-time": SpaceTime(size=16, frames=4, patch=8, d=12, depth=1, heads=2),
    "space-time, learned": SpaceTime(size=16, frames=4, patch=8, d=12, depth=1, heads=2, position="learned"),
}
TEXT: dict[str, specs.Part] = {
    "bert": Bert(vocabulary=30, max_tokens=9, d=12, depth=1, heads=2, masked_head=True),
    "gpt": Gpt(vocabulary=30, max_tokens=9, d=12, depth=1, heads=2, d_ff=20),
    "llama": Llama(vocabulary=30, d=12, depth=1, heads=2, kv_heads=1, d_ff=20),
}


def weights(module: nn.Module) -> int:
    return sum(p.numel() for p in module.parameters())


def parts(union: Any) -> tuple[type[specs.Part], ...]:
    return get_args(get_args(union)[0])


def test_all_parts_are_tried_here() -> None:
    for union, tried in (
        (audio_specs.ScratchAudio, AUDIO.values()),
        (video_specs.ScratchVideo, VIDEO.values()),
        (text_specs.ScratchText, (*TEXT.values(), T5())),
    ):
        assert set(parts(union)) == {type(spec) for spec in tried}
    for union in (audio_specs.AudioEncoder, video_specs.VideoEncoder, text_specs.TextEncoder):
        for part in parts(union):
            assert part.source.startswith("https://")
            assert part.__doc__.endswith(".")


@pytest.mark.row("S4-41")
@pytest.mark.row("S4-42")
@pytest.mark.row("S3-09")
@pytest.mark.row("S3-10")
@pytest.mark.row("S4-40")
@pytest.mark.parametrize(
    ("build", "spec", "count"),
    [
        (build_audio, Whisper(), 7_632_384),  # tiny, without its fixed positions
        (build_audio, Wav2Vec2(), 94_371_712),
        (build_text, Bert(), 109_482_240),
        (build_text, Gpt(), 124_439_808),
        (build_text, Llama(d=4096, depth=32, heads=32, d_ff=11_008), 6_738_415_616),
        (build_text, T5(), 60_506_624),
    ],
    ids=lambda value: value.kind if isinstance(value, specs.Part) else "",
)
def test_defaults_have_published_sizes(build: Any, spec: specs.Part, count: int) -> None:
    with torch.device("meta"):
        assert weights(build(spec)) == count


def test_video_defaults_build() -> None:
    with torch.device("meta"):
        assert weights(build_video(FramesThenTime())) > weights(build_video(SpaceTime())) > 20_000_000


@pytest.mark.parametrize("name", AUDIO)
def test_sounds_become_the_tokens_that_were_promised(name: str) -> None:
    torch.manual_seed(0)
    tower = build_audio(AUDIO[name])
    assert isinstance(tower, Encoder)
    grid = torch.tensor([[1, 1, 800], [1, 1, 1600]])
    found = tower(Patches(values=torch.randn(2400, 1), grid=grid))
    assert torch.equal(found.grid, tower.grid_out(grid))
    assert found.values.shape == (int(found.grid.prod(1).sum()), 16)
    found.values.square().sum().backward()
    assert all(p.grad is not None for p in tower.transformer.parameters())


@pytest.mark.row("S4-43")
@pytest.mark.parametrize("name", VIDEO)
def test_clips_become_the_tokens_that_were_promised(name: str) -> None:
    torch.manual_seed(0)
    tower = build_video(VIDEO[name])
    assert isinstance(tower, Encoder)
    side = 32 if "all cells" in name else 16
    grid = torch.tensor([[4, side, side], [2, side, side]])
    found = tower(Patches(values=torch.rand(6 * side * side, 3), grid=grid))
    assert torch.equal(found.grid, tower.grid_out(grid))
    assert found.values.shape == (int(found.grid.prod(1).sum()), tower.d_out)
    found.values.square().sum().backward()
    assert any(p.grad is not None and p.grad.any() for p in tower.parameters())


@pytest.mark.parametrize("name", TEXT)
def test_texts_become_states_and_one_vector(name: str) -> None:
    torch.manual_seed(0)
    tower = build_text(TEXT[name])
    ids = torch.randint(0, 30, (2, 7))
    assert tower(ids).shape == (2, 7, 12)
    assert tower.pooled(ids).shape == (2, 12)
    assert tower.logits(tower(ids)).shape == (2, 7, 30)
    changed = ids.clone()
    changed[:, -1] = (changed[:, -1] + 1) % 30
    tower.eval()
    first_is_deaf = torch.allclose(tower(ids)[:, 0], tower(changed)[:, 0])
    assert first_is_deaf == (name != "bert")


def test_a_text_is_written_from_another() -> None:
    t5 = build_text(T5(vocabulary=30, d=12, depth=1, depth_decoder=2, heads=2, d_ff=20))
    assert t5(torch.randint(0, 30, (2, 7)), torch.randint(0, 30, (2, 3))).shape == (2, 3, 30)
    assert t5.encode(torch.randint(0, 30, (2, 7))).shape == (2, 7, 12)
    assert len(t5.decoder.blocks) == 2


def test_settings_are_kept() -> None:
    whisper = build_audio(Whisper(d=16, depth=3, heads=2, mels=8, tokens=50, keep="all", longer="windows"))
    assert (whisper.keep, whisper.longer, whisper.sizes.window) == ("all", "windows", 16_000)
    large = build_audio(AUDIO["wav2vec2 large"])
    assert large.sizes.transformer.norm_place == "pre"
    assert large.sizes.conv_norm == "layer"
    assert large.logits(torch.randn(1, 800)).shape[-1] == 5
    video = build_video(VIDEO["space-time, learned"])
    assert isinstance(video, SpaceTimeTransformer)
    assert video.sizes.grid == (2, 2, 2)
    llama = build_text(TEXT["llama"])
    assert llama.sizes.transformer.kv_heads == 1
    assert llama.sizes.position == "rope"


@pytest.mark.parametrize(
    ("build", "spec", "cause"),
    [
        (build_audio, audio_specs.PretrainedAudio(), "PretrainedAudio is not built from scratch here"),
        (build_video, video_specs.PretrainedVideo(), "PretrainedVideo is not built"),
        (build_text, specs.ViT(), "ViT is not built"),
        (build_audio, Wav2Vec2(d=20, heads=2, position_groups=16), "16 groups do not divide a width of 20"),
        (build_video, FramesThenTime(tower=specs.PretrainedImage()), "the tower of frames is pretrained"),
        (build_text, Bert(d=10, heads=4), "heads"),
    ],
)
def test_what_does_not_fit_together_is_refused(build: Any, spec: specs.Part, cause: str) -> None:
    with pytest.raises(ConfigError, match=cause):
        build(spec)


class Everything(Spec):
    """One part of each kind, as a recipe would have them."""

    audio: audio_specs.AudioEncoder = Whisper()
    video: video_specs.VideoEncoder = SpaceTime()
    text: text_specs.TextEncoder = Bert()
    fusion: fusion_specs.Fusion = fusion_specs.Gated()


def read(*overrides: str) -> Everything:
    return resolve(Everything, Node({}, Source("default")), overrides).spec


def test_parts_are_read_from_settings() -> None:
    found = read(
        "audio.kind=wav2vec2",
        "audio.form=large",
        "video={kind: frames, tower: {kind: swin, size: 64}}",
        "fusion={kind: late, fusion: {kind: mfb, k: 3}}",
    )
    assert found.audio == Wav2Vec2(form="large")
    assert found.video == FramesThenTime(tower=specs.Swin(size=64))
    assert found.fusion == fusion_specs.Late(fusion=fusion_specs.Mfb(k=3))


@pytest.mark.parametrize(
    ("override", "cause", "remedy"),
    [
        ("audio.deph=3", "unknown setting 'audio.deph'", "audio.depth"),
        ("fusion={kind: late, fusion: {kind: mfb, kk: 3}}", "unknown setting 'fusion.fusion.kk'", "fusion.fusion.k"),
        ("fusion.kind=gate", "fusion.kind: expected", "config explain"),
        ("video.tubelet=0", "video.tubelet: expected", "config explain"),
    ],
)
def test_wrong_settings_are_named_with_the_nearest(override: str, cause: str, remedy: str) -> None:
    with pytest.raises(ConfigError, match=cause) as error:
        read(override)
    assert remedy in (error.value.remedy or "")
