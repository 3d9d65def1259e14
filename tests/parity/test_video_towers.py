"""Space-time towers = VideoMAE with the same weights; frames, then time: what knows their order and what does not."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from transformers import (
    AutoModel,
    AutoModelForVideoClassification,
    VideoMAEConfig,
    VideoMAEForPreTraining,
    VideoMAEForVideoClassification,
    VideoMAEModel,
)

from plait.core.errors import CheckpointError, ConfigError, DataError
from plait.core.protocols import Encoder
from plait.core.tensors import Patches
from plait.models.hub import videomae
from plait.models.position.absolute import LearnedVolume, SinCosVolume
from plait.models.towers.resnet import ResNet, ResNetSizes
from plait.models.towers.video import (
    VIDEOMAE_B,
    VIDEOMAE_L,
    VIDEOMAE_S,
    FrameEncoder,
    FramePool,
    SpaceTimeTransformer,
    TemporalTransformer,
    TimePool,
    TubeletEmbedding,
    VideoSizes,
)
from plait.models.towers.vit import VisionTransformer, vit
from plait.models.transformer import TransformerSizes

NEAR = {"atol": 1e-11, "rtol": 1e-9}
"""Float64; worst measured: 3e-15 of the largest number, gradients included."""
TINY: dict[str, Any] = {
    "hidden_size": 12, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2, "image_size": 16,
    "patch_size": 4, "num_frames": 6, "tubelet_size": 2, "decoder_num_attention_heads": 2, "decoder_hidden_size": 8,
    "decoder_num_hidden_layers": 1, "decoder_intermediate_size": 8,
}  # fmt: skip
INNER = TransformerSizes(d=12, depth=1, heads=2)


def stirred(model: nn.Module) -> Any:
    """Every weight random, norms and biases too, in float64."""
    torch.manual_seed(0)
    for weight in model.parameters():
        weight.data = torch.randn_like(weight) * 0.3 + (0.5 if weight.ndim == 1 else 0.0)
    return model.double().eval()


def ragged(*shapes: tuple[int, int, int], d: int = 3) -> Patches:
    generator = torch.Generator().manual_seed(len(shapes))
    rows = sum(f * h * w for f, h, w in shapes)
    return Patches(values=torch.rand(rows, d, dtype=torch.float64, generator=generator), grid=torch.tensor(shapes))


def one_by_one(tower: Any, media: Patches) -> Tensor:
    clips = media.values.split(media.grid.prod(1).tolist())
    return torch.cat([tower(Patches(values=c, grid=g[None])).values for c, g in zip(clips, media.grid, strict=True)])


# --- space and time at once ------------------------------------------------------------------------------------------


@pytest.mark.row("S4-43")
@pytest.mark.parametrize("head", [False, True, "two classes"])
@pytest.mark.parametrize("mean", [False, True])
def test_videomae_values_and_gradients(as_saved, loaded, head, mean):
    config = VideoMAEConfig(**TINY, use_mean_pooling=mean, num_labels=2 if head == "two classes" else 3)
    reference = stirred((VideoMAEForVideoClassification if head else VideoMAEModel)(config))
    config, state = as_saved(reference)
    tower = SpaceTimeTransformer(videomae.sizes_from(config)).double().eval()
    tower.load_state_dict(videomae.to_ours(state))
    clips = torch.rand(2, 6, 3, 16, 16, dtype=torch.float64)
    normal = (clips - tower.normalize.mean) / tower.normalize.std

    def outcome(model: Any) -> Tensor:
        found = model(normal)
        return found.logits if head else found.last_hidden_state

    found, wanted = tower.logits(clips) if head else tower.features(clips), outcome(reference)
    torch.testing.assert_close(found, wanted, **NEAR)
    pull = torch.randn_like(wanted)
    (found * pull).sum().backward()
    (wanted * pull).sum().backward()
    gradients = videomae.to_ours(as_saved(reference, gradients=True).state)
    for name, weight in tower.named_parameters():
        torch.testing.assert_close(weight.grad, gradients[name], **NEAR)
    auto = AutoModelForVideoClassification if head else AutoModel
    again = loaded(auto, videomae.config_from(tower.sizes), videomae.to_official(tower.state_dict()))
    assert torch.equal(outcome(again), wanted)
    assert videomae.sizes_from(as_saved(again).config) == tower.sizes


@pytest.mark.row("S4-43")
def test_pretraining_files_are_taken_apart(as_saved):
    reference = stirred(VideoMAEForPreTraining(VideoMAEConfig(**TINY, use_mean_pooling=False)))
    config, state = as_saved(reference)
    tower = SpaceTimeTransformer(videomae.sizes_from(config)).double().eval()
    tower.load_state_dict(videomae.to_ours(state))
    parts = videomae.split(state)
    assert parts.decoder.keys() | parts.tower.keys() == state.keys()
    assert "mask_token" in parts.decoder
    clips = torch.rand(1, 6, 3, 16, 16, dtype=torch.float64)
    wanted = reference.videomae((clips - tower.normalize.mean) / tower.normalize.std).last_hidden_state
    torch.testing.assert_close(tower.features(clips), wanted, **NEAR)


@pytest.mark.row("S4-43")
def test_published_numbers_of_videomae():
    with torch.device("meta"):
        towers = [SpaceTimeTransformer(sizes) for sizes in (VIDEOMAE_S, VIDEOMAE_B, VIDEOMAE_L)]
        classifier = SpaceTimeTransformer(replace(VIDEOMAE_B, norm="pooled", num_classes=400))
        reference = AutoModelForVideoClassification.from_config(VideoMAEConfig(num_labels=400))
    # The base model with Kinetics' 400 classes.
    assert sum(p.numel() for p in classifier.parameters()) == reference.num_parameters() == 86_534_800
    for tower in towers:
        assert int(tower.grid_out(torch.tensor([[16, 224, 224]])).prod()) == 1568


@pytest.mark.row("S4-43")
@pytest.mark.parametrize("tubelet", [1, 2, 3])
def test_tubelets_are_a_3d_convolution(tubelet):
    embed = stirred(TubeletEmbedding(tubelet, 4, 5))
    clips = torch.randn(2, 6, 3, 8, 12, dtype=torch.float64)
    found, wanted = embed(clips), nn.functional.conv3d(
        clips.transpose(1, 2), embed.conv.weight, embed.conv.bias, stride=(tubelet, 4, 4)
    ).flatten(2).mT  # fmt: skip
    torch.testing.assert_close(found, wanted, **NEAR)
    embed.unfold = False
    torch.testing.assert_close(embed(clips), wanted, **NEAR)
    pull = torch.randn_like(wanted)
    gradients = [torch.autograd.grad((y * pull).sum(), embed.conv.weight)[0] for y in (found, wanted)]
    torch.testing.assert_close(*gradients, **NEAR)


SIZES = VideoSizes(transformer=replace(INNER, key_bias=False), patch=4, grid=(3, 4, 4))


@pytest.mark.row("S4-43")
@torch.no_grad()
@pytest.mark.parametrize("position", ["sincos", "learned", "none"])
def test_clips_of_mixed_sizes_through_the_space_time_tower(position):
    tower = stirred(SpaceTimeTransformer(replace(SIZES, position=position), batch_size=2))
    assert isinstance(tower, Encoder)
    media = ragged((6, 16, 16), (1, 3, 5), (6, 16, 16), (5, 16, 9), (6, 16, 16), (1, 3, 5))
    found = tower(media)
    assert torch.equal(found.grid, tower.grid_out(media.grid))
    assert found.grid.tolist() == [[3, 4, 4], [1, 1, 2], [3, 4, 4], [3, 4, 3], [3, 4, 4], [1, 1, 2]]
    torch.testing.assert_close(found.values, one_by_one(tower, media), **NEAR)


@settings(deadline=None, max_examples=25)
@given(st.tuples(st.integers(1, 5), st.integers(1, 9), st.integers(1, 9)))
@torch.no_grad()
def test_account_of_every_clip_is_what_comes_out(shape):
    tower = stirred(SpaceTimeTransformer(SIZES))
    media = ragged(shape)
    assert len(tower(media).values) == int(tower.grid_out(media.grid).prod())


@torch.no_grad()
def test_a_begun_tubelet_repeats_the_last_frame_and_fills_up_with_the_mean():
    tower = stirred(SpaceTimeTransformer(SIZES))
    clip = torch.rand(1, 3, 3, 6, 8, dtype=torch.float64)
    whole = tower.normalize.mean.double().expand(1, 4, 3, 8, 8).clone()
    whole[:, :3, :, :6], whole[:, 3, :, :6] = clip, clip[:, 2]
    torch.testing.assert_close(tower.features(clip), tower.features(whole), **NEAR)
    with pytest.raises(DataError, match=r"3 frames of 6 x 8 pixels does not split into patches of 2 frames of 4 x 4"):
        SpaceTimeTransformer(replace(SIZES, remainder="error")).features(clip.float())


def test_numbered_positions_know_one_size():
    tower = SpaceTimeTransformer(replace(SIZES, position="sequence"))
    with pytest.raises(DataError, match=r"made for clips of 6 frames of 16 x 16 pixels, came 6 frames of 16 x 12"):
        tower.features(torch.rand(1, 6, 3, 16, 12))
    with pytest.raises(DataError, match="rows have 4 values, expected RGB"):
        tower(ragged((6, 16, 16), d=4))


def test_layout_refuses_what_it_has_not(as_saved):
    config, _ = as_saved(VideoMAEModel(VideoMAEConfig(**TINY)))
    with pytest.raises(CheckpointError, match="qv_bias is False, expected True"):
        videomae.sizes_from(config | {"qv_bias": False})
    with pytest.raises(CheckpointError, match="position is 'sincos', expected 'sequence'"):
        videomae.config_from(SIZES)
    with pytest.raises(CheckpointError, match="key_bias is True, expected False"):
        videomae.config_from(replace(SIZES, position="sequence", transformer=INNER))


def test_positions_of_a_volume():
    code = SinCosVolume(18)(2, 3, 4).view(2, 3, 4, 18)
    sides = code[..., :6], code[..., 6:12], code[..., 12:]
    for axis, part in enumerate(sides):
        for other in {0, 1, 2} - {axis}:  # each part reads one axis alone
            assert torch.equal(part, part.narrow(other, 0, 1).expand_as(part))
        assert len(part.reshape(-1, 6).unique(dim=0)) == part.shape[axis]
    assert SinCosVolume(16)(1, 1, 1).shape == (1, 16)
    with pytest.raises(ConfigError, match="even width of 6 or more, came 4"):
        SinCosVolume(4)
    learned = LearnedVolume(2, 2, 2, d=3)
    assert torch.equal(learned(2, 2, 2), learned.table)
    constant = LearnedVolume(2, 3, 2, d=3)
    constant.table.data[:] = torch.tensor([1.0, 2.0, 3.0])
    torch.testing.assert_close(constant(5, 4, 7), torch.tensor([1.0, 2.0, 3.0]).expand(140, 3))
    # Along time alone: halfway between neighbors, as align_corners=False has it
    ramp = LearnedVolume(2, 1, 1, d=1)
    ramp.table.data[:] = torch.tensor([[0.0], [1.0]])
    torch.testing.assert_close(ramp(4, 1, 1), torch.tensor([[0.0], [0.25], [0.75], [1.0]]))


# --- frames, then time -----------------------------------------------------------------------------------------------


def picture_tower() -> VisionTransformer:
    return VisionTransformer(replace(vit(12, 1, 2, patch=4, size=8), class_token=False, pool="mean"))


def over_time(position: str) -> TemporalTransformer:
    return TemporalTransformer(INNER, position=position, frames=6)


@pytest.mark.row("S4-43")
@torch.no_grad()
@pytest.mark.parametrize("per", ["cell", "frame"])
@pytest.mark.parametrize("position", ["learned", "sincos", "rope", "none"])
def test_order_of_frames(position, per):
    torch.manual_seed(0)
    parts = [picture_tower(), *([FramePool(12)] if per == "frame" else []), over_time(position)]
    video = stirred(FrameEncoder(*parts))
    clip = torch.rand(5, 8, 12, 3, dtype=torch.float64)
    shuffle = torch.tensor([3, 0, 4, 1, 2])
    grid = torch.tensor([[5, 8, 12]])
    plain = video(Patches(values=clip.view(-1, 3), grid=grid)).values.view(5, -1, 12)
    moved = video(Patches(values=clip[shuffle].view(-1, 3), grid=grid)).values.view(5, -1, 12)
    same = torch.allclose(moved, plain[shuffle], atol=1e-9)
    assert same == (position == "none")
    # Pooled over time, a code of places still tells orders apart; without one they are the same video.
    assert torch.allclose(moved.mean(0), plain.mean(0), atol=1e-9) == (position == "none")


@pytest.mark.row("S4-43")
@torch.no_grad()
def test_pooling_over_time_forgets_the_order():
    video = stirred(FrameEncoder(picture_tower(), TimePool(12)))
    clip = torch.rand(5, 8, 12, 3, dtype=torch.float64)
    grid = torch.tensor([[5, 8, 12]])
    plain = video(Patches(values=clip.view(-1, 3), grid=grid))
    moved = video(Patches(values=clip[torch.randperm(5)].view(-1, 3), grid=grid))
    assert plain.grid.tolist() == [[1, 2, 3]]
    torch.testing.assert_close(moved.values, plain.values, atol=1e-12, rtol=1e-12)
    frames = video.tower.features(clip.permute(0, 3, 1, 2))
    torch.testing.assert_close(plain.values, frames.mean(0), **NEAR)


@pytest.mark.row("S4-43")
@torch.no_grad()
@pytest.mark.parametrize("kind", ["vit", "resnet"])
@pytest.mark.parametrize("pooled", ["cells", "frames", "time", "both"])
def test_videos_of_mixed_lengths_and_any_picture_tower(kind, pooled):
    tower = picture_tower()
    if kind == "resnet":
        tower = ResNet(ResNetSizes(depths=(1,), widths=(12,), bottleneck=False, d_stem=4))
    parts = {"cells": [over_time("learned")], "frames": [FramePool(12), over_time("rope")], "time": [TimePool(12)],
             "both": [over_time("sincos"), FramePool(12), TimePool(12)]}[pooled]  # fmt: skip
    video = stirred(FrameEncoder(tower, *parts))
    assert isinstance(video, Encoder)
    media = ragged((2, 8, 8), (1, 8, 12), (6, 8, 8), (2, 8, 8))
    found = video(media)
    assert torch.equal(found.grid, video.grid_out(media.grid))
    assert len(found.values) == found.grid.prod(1).sum()
    torch.testing.assert_close(found.values, one_by_one(video, media), **NEAR)
    cells = {"cells": [8, 6, 24, 8], "frames": [2, 1, 6, 2], "time": [4, 6, 4, 4], "both": [1, 1, 1, 1]}[pooled]
    assert found.grid.prod(1).tolist() == cells


@pytest.mark.row("S4-43")
def test_temporal_attention_over_time_is_the_transformer_on_each_cell():
    module = stirred(over_time("learned"))
    media = ragged((4, 2, 3), d=12)
    found = module(media).values.view(4, 6, 12)
    cells = media.values.view(4, 6, 12)
    for cell in range(6):
        wanted = module.transformer(cells[:, cell][None] + module.position.table[:4])[0]
        torch.testing.assert_close(found[:, cell], wanted, **NEAR)


def test_faults_of_modules_over_time():
    with pytest.raises(ConfigError, match="learned for 0 frames"):
        TemporalTransformer(INNER)
    with pytest.raises(DataError, match="7 tokens, 6 learned positions"):
        over_time("learned").double()(ragged((7, 1, 1), d=12))
    with pytest.raises(DataError, match="features of width 8 came, expected 12"):
        FramePool(12)(ragged((2, 1, 1), d=8))


def bars(seed: int, count: int) -> tuple[Tensor, Tensor]:
    """A bar of any color crosses the picture to the right (1) or to the left (0): the same 6 frames both ways."""
    generator = torch.Generator().manual_seed(seed)
    ways = torch.randint(0, 2, (count,), generator=generator)
    columns = torch.where(ways[:, None] == 1, torch.arange(6), 5 - torch.arange(6))
    frames = nn.functional.one_hot(columns, 6).float()[:, :, None, :, None].expand(-1, -1, 4, -1, 3)
    return frames * (0.3 + 0.7 * torch.rand(count, 1, 1, 1, 3, generator=generator)), ways


@pytest.mark.row("S4-43")
@pytest.mark.parametrize("knows_order", [True, False])
def test_direction_of_motion_needs_the_order_of_frames(knows_order):
    torch.manual_seed(0)
    sizes = TransformerSizes(d=24, depth=1, heads=4)
    tower = VisionTransformer(
        replace(vit(24, 1, 2, patch=2, size=4), grid=(2, 3), class_token=False, pool="mean", position="learned")
    )
    temporal = [TemporalTransformer(sizes, frames=6)] if knows_order else []
    video = FrameEncoder(tower, FramePool(24), *temporal, TimePool(24))
    head = nn.Linear(24, 2)
    update = torch.optim.AdamW([*video.parameters(), *head.parameters()], lr=3e-3)

    def scores(clips: Tensor) -> Tensor:
        media = Patches(values=clips.reshape(-1, 3), grid=torch.tensor([clips.shape[1:4]] * len(clips)))
        return head(video(media).values)

    for step in range(90 if knows_order else 30):
        clips, ways = bars(step, 32)
        loss = nn.functional.cross_entropy(scores(clips), ways)
        update.zero_grad()
        loss.backward()
        update.step()
    with torch.no_grad():
        clips, ways = bars(10_000, 400)
        right = (scores(clips).argmax(1) == ways).float().mean()
        order = torch.stack([torch.randperm(6) for _ in range(400)])
        shuffled = torch.stack([clip[o] for clip, o in zip(clips, order, strict=True)])
        right_shuffled = (scores(shuffled).argmax(1) == ways).float().mean()
    chance = 0.5 + 4 * 0.025  # four deviations of 400 coins
    if knows_order:
        assert right > 0.95
        assert 1 - chance < right_shuffled < chance
    else:
        assert 1 - chance < right < chance
