"""Audio and video towers in front of one decoder; number formats; gradients; what training changes."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM

from plait.core.errors import ConfigError
from plait.core.tensors import IGNORE, Batch, Patches
from plait.models.connectors.projection import Linear
from plait.models.multimodal import MultimodalLM
from plait.models.towers.mel import LogMel, hertz_of, mel_of
from plait.models.towers.video import FrameEncoder, SpaceTimeTransformer, TemporalTransformer, TimePool, VideoSizes
from plait.models.towers.vit import VisionTransformer, vit
from plait.models.towers.wav2vec import ConvPosition, Wav2Vec, Wav2VecSizes
from plait.models.towers.whisper import WhisperEncoder, WhisperSizes
from plait.models.transformer import TransformerSizes

INNER = TransformerSizes(d=12, depth=2, heads=2, key_bias=False)
SOUND, VIDEO = 40, 41


def whisper(**more: float) -> WhisperEncoder:
    return WhisperEncoder(WhisperSizes(transformer=replace(INNER, **more), mels=8, tokens=10))


def wav2vec(**more: float) -> Wav2Vec:
    inner = replace(INNER, key_bias=True, norm_place="post", **more)
    convs = {"widths": (8, 8), "kernels": (10, 4), "strides": (5, 4)}
    return Wav2Vec(Wav2VecSizes(transformer=inner, **convs, position_kernel=5, position_groups=2))


def frames() -> FrameEncoder:
    tower = VisionTransformer(replace(vit(12, 1, 2, patch=4, size=8), class_token=False, pool="mean"))
    return FrameEncoder(tower, TemporalTransformer(INNER, position="rope"), TimePool(12))


def space_time() -> SpaceTimeTransformer:
    return SpaceTimeTransformer(VideoSizes(transformer=INNER, patch=4))


@pytest.mark.row("S4-41")
@pytest.mark.row("S4-42")
@pytest.mark.row("S4-43")
@pytest.mark.parametrize("audio", [whisper, wav2vec])
@pytest.mark.parametrize("video", [frames, space_time])
def test_sounds_and_videos_reach_the_decoder_and_learn(audio, video):
    torch.manual_seed(0)
    sizes = {"vocab_size": 40, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 1}
    decoder = LlamaForCausalLM(LlamaConfig(**sizes, num_attention_heads=2))
    towers = {"audio": audio(), "video": video()}
    connectors = {"audio": Linear(12, 16), "video": Linear(12, 16)}
    model = MultimodalLM(towers, connectors, decoder, placeholder={"audio": SOUND, "video": VIDEO})
    media = {
        "audio": Patches(values=torch.randn(700, 1), grid=torch.tensor([[1, 1, 640], [1, 1, 60]])),
        "video": Patches(values=torch.rand(3 * 8 * 8, 3), grid=torch.tensor([[3, 8, 8]])),
    }
    slots = {m: model.slots(m, towers[m].grid_out(patches.grid)).tolist() for m, patches in media.items()}
    ids = [5, *[SOUND] * slots["audio"][0], 6, *[VIDEO] * slots["video"][0], 7, *[SOUND] * slots["audio"][1], 8]
    token_ids = torch.tensor([ids])
    batch = Batch(
        token_ids=token_ids,
        labels=torch.full_like(token_ids, IGNORE),
        segment_ids=torch.ones_like(token_ids),
        media=media,
        item_row={"audio": torch.tensor([0, 0]), "video": torch.tensor([0])},
        sample_ids=("s",),
    )
    model.hidden(batch).square().sum().backward()
    unused = {"mask_token"}
    for name, weight in nn.ModuleDict(towers).named_parameters():
        assert name.rpartition(".")[2] in unused or (weight.grad is not None and weight.grad.abs().sum() > 0), name


@pytest.mark.parametrize("audio", [whisper, wav2vec])
def test_gradients_reach_the_samples(audio):
    tower = audio().eval()
    samples = torch.randn(1, 200, requires_grad=True)
    tower.features(samples).square().sum().backward()
    assert samples.grad is not None
    assert torch.isfinite(samples.grad).all()
    assert samples.grad.abs().sum() > 0


@torch.no_grad()
def test_log_mel_is_the_same_whatever_the_format_of_the_weights():
    torch.manual_seed(0)
    samples = torch.randn(1, 3200)
    tower = whisper().eval()
    wanted = tower.log_mel(samples)
    assert torch.equal(tower.bfloat16().log_mel(samples), wanted)
    assert wanted.dtype == torch.float32
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(LogMel(8)(samples), wanted)
    assert tower.features(samples).dtype == torch.bfloat16
    close = wav2vec().eval()
    exact = close.features(samples)
    rounded = close.bfloat16().features(samples)
    assert rounded.dtype == torch.bfloat16
    assert (rounded - exact).abs().max() < 0.2  # of values about 1; worst of 5 seeds: 0.07


@given(st.lists(st.floats(0, 8000), min_size=1, max_size=8))
def test_the_mel_scale_goes_both_ways(hertz):
    given_ = torch.tensor(hertz, dtype=torch.float64)
    torch.testing.assert_close(hertz_of(mel_of(given_)), given_, atol=1e-8, rtol=1e-10)


@settings(max_examples=50, deadline=None)
@given(st.lists(st.integers(1, 20_000), min_size=1, max_size=5))
def test_account_of_windows_adds_up(lengths):
    grid = torch.tensor([[1, 1, n] for n in lengths])
    tower = WhisperEncoder(WhisperSizes(transformer=INNER, mels=8, tokens=10), longer="windows")
    assert tower.grid_out(grid)[:, 2].tolist() == [-(-n // 320) for n in lengths]
    tower.keep = "all"
    assert tower.grid_out(grid)[:, 2].tolist() == [-(-n // 3200) * 10 for n in lengths]


@torch.no_grad()
def test_training_drops_and_eval_does_not():
    for tower in (whisper(dropout=0.5), wav2vec(inner_dropout=0.5), wav2vec(layer_drop=0.5)):
        torch.manual_seed(0)
        samples = torch.randn(1, 400)
        tower.eval()
        assert torch.equal(tower.features(samples), tower.features(samples))
        tower.train()
        several = [tower.features(samples) for _ in range(8)]
        assert any(not torch.equal(several[0], other) for other in several[1:])


@torch.no_grad()
def test_weight_norm_forgets_the_length_of_the_direction():
    code = ConvPosition(12, 5, groups=2)
    x = torch.randn(2, 7, 12)
    before = code(x)
    code.direction.mul_(3.0)
    torch.testing.assert_close(code(x), before)
    assert before.shape == x.shape
    # A fresh one is the plain convolution with its direction.
    fresh = ConvPosition(12, 4, groups=3)
    plain = nn.functional.conv1d(x.mT, fresh.direction, fresh.bias, padding=2, groups=3)[..., :7]
    torch.testing.assert_close(fresh(x), nn.functional.gelu(plain).mT)


def test_faults_name_the_setting():
    with pytest.raises(ConfigError, match="2 widths, 1 kernels and 1 strides"):
        Wav2VecSizes(transformer=INNER, widths=(8, 8), kernels=(3,), strides=(2,))
    with pytest.raises(ConfigError, match="no output layer"):
        wav2vec().logits(torch.randn(1, 100))
    bare = Wav2Vec(replace(wav2vec().sizes, mask_token=False))
    with pytest.raises(ConfigError, match="no vector for masked frames"):
        bare.features(torch.randn(1, 100), masked=torch.zeros(1, 4, dtype=torch.bool))
    with pytest.raises(ConfigError, match="no classifier"):
        space_time().logits(torch.rand(1, 2, 3, 8, 8))


def spoken(seed: int, count: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Four syllables of 10 ms, each one of four tones that fades in and out, in noise; and which they are, from 1."""
    generator = torch.Generator().manual_seed(seed)
    syllables = torch.randint(0, 4, (count, 4), generator=generator)
    turn = torch.tensor([300.0, 700.0, 1300.0, 2300.0])[syllables][..., None] * torch.arange(160) / 16_000
    waves = torch.sin(2 * torch.pi * (turn + torch.rand(count, 4, 1, generator=generator))) * torch.hann_window(160)
    return waves.flatten(1) + 0.1 * torch.randn(count, 640, generator=generator), syllables + 1


@pytest.mark.row("S4-41")
def test_ctc_learns_to_write_down_syllables():
    torch.manual_seed(0)
    inner = TransformerSizes(d=32, depth=1, heads=2, eps=1e-5)
    convs = {"widths": (32, 32, 32), "kernels": (10, 4, 4), "strides": (5, 4, 2), "conv_norm": "layer"}
    tower = Wav2Vec(
        Wav2VecSizes(transformer=inner, **convs, conv_bias=True, position_kernel=8, position_groups=2, vocabulary=5)
    )
    update = torch.optim.AdamW(tower.parameters(), lr=5e-3)

    def exact() -> float:
        sounds, wanted = spoken(10_000, 200)
        with torch.no_grad():
            best = tower.logits(sounds).argmax(-1).tolist()
        written = [[v for i, v in enumerate(row) if v and (i == 0 or row[i - 1] != v)] for row in best]
        return sum(w == g for w, g in zip(wanted.tolist(), written, strict=True)) / 200

    assert exact() < 0.05
    for step in range(130):
        sounds, wanted = spoken(step, 16)
        scores = tower.logits(sounds).log_softmax(-1).transpose(0, 1)
        loss = nn.functional.ctc_loss(scores, wanted, torch.full((16,), len(scores)), torch.full((16,), 4))
        update.zero_grad()
        loss.backward()
        update.step()
    assert exact() > 0.95  # 1.0 where it was written; guessing four of four tones is right once in 256
