"""Whisper's encoder and wav2vec 2.0 = transformers' with the same weights: frames, values, gradients, files."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from transformers import (
    AutoModel,
    AutoModelForCTC,
    Wav2Vec2Config,
    Wav2Vec2FeatureExtractor,
    Wav2Vec2ForCTC,
    Wav2Vec2ForPreTraining,
    Wav2Vec2Model,
    WhisperConfig,
    WhisperFeatureExtractor,
    WhisperForConditionalGeneration,
    WhisperModel,
)
from transformers.models.whisper.modeling_whisper import WhisperEncoder as TheirEncoder

from plait.core.errors import CheckpointError, DataError
from plait.core.protocols import Encoder
from plait.core.tensors import Patches
from plait.models.hub import vit, wav2vec, whisper
from plait.models.towers.mel import LogMel, filled, mel_filters
from plait.models.towers.vit import VIT_B16
from plait.models.towers.wav2vec import WAV2VEC_BASE, WAV2VEC_LARGE, Wav2Vec
from plait.models.towers.whisper import (
    WHISPER_BASE,
    WHISPER_TINY,
    WhisperEncoder,
    sinusoids,
)

NEAR = {"atol": 1e-11, "rtol": 1e-9}
"""Float64; worst measured: 6e-15 of the largest number, gradients included."""
WHISPER = WhisperConfig(
    d_model=16, encoder_layers=2, decoder_layers=1, encoder_attention_heads=2, decoder_attention_heads=2,
    encoder_ffn_dim=24, decoder_ffn_dim=24, vocab_size=20, num_mel_bins=8, max_source_positions=10,
    max_target_positions=6, pad_token_id=0, bos_token_id=1, eos_token_id=2, decoder_start_token_id=3,
    suppress_tokens=None, begin_suppress_tokens=None,
)  # fmt: skip
WAV2VEC: dict[str, Any] = {
    "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2, "vocab_size": 5,
    "conv_dim": [8, 12, 8], "conv_kernel": [10, 3, 2], "conv_stride": [5, 2, 2], "num_conv_pos_embedding_groups": 2,
    "hidden_dropout": 0.0, "activation_dropout": 0.0, "attention_dropout": 0.0, "final_dropout": 0.0, "layerdrop": 0.0,
}  # fmt: skip
KINDS: dict[str, dict[str, Any]] = {
    "base": {"num_conv_pos_embeddings": 8},
    "odd kernel, no mask": {"num_conv_pos_embeddings": 7, "mask_time_prob": 0.0},
    "stable": {"num_conv_pos_embeddings": 8, "feat_extract_norm": "layer", "do_stable_layer_norm": True,
               "conv_bias": True},
}  # fmt: skip


def stirred(model: nn.Module) -> Any:
    """Every weight random, norms and biases too, in float64."""
    torch.manual_seed(0)
    for weight in model.parameters():
        weight.data = torch.randn_like(weight) * 0.3 + (0.5 if weight.ndim == 1 else 0.0)
    return model.double().eval()


def ragged(*lengths: int) -> Patches:
    generator = torch.Generator().manual_seed(sum(lengths))
    values = torch.randn(sum(lengths), 1, dtype=torch.float64, generator=generator)
    return Patches(values=values, grid=torch.tensor([[1, 1, n] for n in lengths]))


def one_by_one(tower: Any, media: Patches) -> Tensor:
    sounds = media.values.split(media.grid[:, 2].tolist())
    return torch.cat([tower(Patches(values=s, grid=torch.tensor([[1, 1, len(s)]]))).values for s in sounds])


def same_gradients(ours: nn.Module, wanted: dict[str, Tensor]) -> None:
    for name, weight in ours.named_parameters():
        assert weight.grad is not None, name
        torch.testing.assert_close(weight.grad, wanted[name], **NEAR, msg=lambda m, name=name: f"{name}: {m}")


# --- log-mel frames --------------------------------------------------------------------------------------------------


def sound(kind: str, length: int) -> np.ndarray:
    generator = np.random.default_rng(length)
    if kind == "noise":
        return generator.standard_normal(length).astype(np.float32)
    if kind == "tone":
        return (0.3 * np.sin(2 * np.pi * 440 * np.arange(length) / 16_000)).astype(np.float32)
    return np.zeros(length, np.float32)


@pytest.mark.row("S4-42")
@pytest.mark.parametrize("mels", [80, 128])
@pytest.mark.parametrize("kind", ["noise", "tone", "silence"])
@pytest.mark.parametrize("length", [1, 399, 16_000, 47_999, 480_000])
def test_log_mel_is_that_of_whispers_extractor(kind, length, mels):
    given = sound(kind, length)
    wanted = WhisperFeatureExtractor(feature_size=mels)(given, sampling_rate=16_000, return_tensors="pt")
    found = LogMel(mels)(filled(torch.from_numpy(given)[None], 480_000))
    assert found.shape == (1, mels, 3000)
    # Measured: equal to the last bit. Another build of torch may add up in another order.
    torch.testing.assert_close(found, wanted["input_features"], atol=1e-5, rtol=0)


@pytest.mark.row("S4-42")
@pytest.mark.parametrize("mels", [80, 128])
def test_mel_filters_are_the_published_ones(mels):
    wanted = torch.from_numpy(WhisperFeatureExtractor(feature_size=mels).mel_filters).T
    torch.testing.assert_close(mel_filters(mels), wanted, atol=1e-15, rtol=1e-9)


# --- Whisper ---------------------------------------------------------------------------------------------------------


@pytest.mark.row("S4-42")
@pytest.mark.parametrize("kind", [WhisperModel, WhisperForConditionalGeneration])
def test_whisper_values_and_gradients(as_saved, loaded, kind):
    reference = stirred(kind(WHISPER))
    config, state = as_saved(reference)
    tower = WhisperEncoder(whisper.sizes_from(config), keep="all").double().eval()
    tower.load_state_dict(whisper.to_ours(state))
    samples = torch.randn(3, 2500, dtype=torch.float64)
    mel = tower.log_mel(filled(samples, 3200)).double()
    wanted = reference.get_encoder()(mel).last_hidden_state
    found = tower.features(samples)
    torch.testing.assert_close(found, wanted, **NEAR)
    pull = torch.randn_like(wanted)
    (found * pull).sum().backward()
    (wanted * pull).sum().backward()
    same_gradients(tower, whisper.to_ours(as_saved(reference, gradients=True).state))
    if kind is WhisperModel:  # the whole file comes back
        whole = whisper.to_official(tower.state_dict(), whisper.split(state).rest)
        again = loaded(AutoModel, config | whisper.config_from(tower.sizes), whole)
        assert torch.equal(again.get_encoder()(mel).last_hidden_state, wanted)


@pytest.mark.row("S4-42")
@torch.no_grad()
def test_our_whisper_encoder_loads_in_transformers_alone(as_saved, loaded):
    tower = stirred(WhisperEncoder(whisper.sizes_from(WHISPER.to_dict())))
    reference = loaded(TheirEncoder, whisper.config_from(tower.sizes), whisper.to_official(tower.state_dict()))
    mel = torch.randn(2, 8, 20, dtype=torch.float64)
    torch.testing.assert_close(tower.tokens(mel), reference(mel).last_hidden_state, **NEAR)
    back = whisper.to_ours(as_saved(reference).state)
    assert all(torch.equal(back[name], value) for name, value in tower.state_dict().items())
    assert whisper.sizes_from(as_saved(reference).config) == tower.sizes


@pytest.mark.row("S4-42")
def test_published_numbers_of_whisper():
    with torch.device("meta"):
        for sizes, whole in ((WHISPER_TINY, 37_760_640), (WHISPER_BASE, 72_593_920)):
            inner = sizes.transformer
            d, depth, heads = inner.d, inner.depth, inner.heads
            config = WhisperConfig(
                d_model=d, encoder_layers=depth, decoder_layers=depth, encoder_attention_heads=heads,
                decoder_attention_heads=heads, encoder_ffn_dim=4 * d, decoder_ffn_dim=4 * d,
            )  # fmt: skip
            model = WhisperModel(config)
            assert model.num_parameters() == whole
            tower = WhisperEncoder(sizes)
            held = sum(v.numel() for v in tower.state_dict().values())
            assert held == model.get_encoder().num_parameters()
            # Their positions are a parameter that is never trained; ours are none.
            assert held - sum(p.numel() for p in tower.parameters()) == 1500 * d


def test_fresh_positions_are_those_of_a_fresh_model():
    wanted = TheirEncoder(WhisperConfig(d_model=64, encoder_attention_heads=2)).embed_positions.weight
    # Theirs are computed in float32, whose steps at 1500 radians are 1.2e-4.
    torch.testing.assert_close(sinusoids(1500, 64), wanted.detach(), atol=2e-4, rtol=0)


@pytest.mark.row("S4-42")
@torch.no_grad()
@pytest.mark.parametrize("keep", ["real", "all"])
@pytest.mark.parametrize("longer", ["error", "windows"])
def test_sounds_of_mixed_lengths_through_whisper(keep, longer):
    tower = stirred(WhisperEncoder(whisper.sizes_from(WHISPER.to_dict()), keep=keep, longer=longer, batch_size=2))
    assert isinstance(tower, Encoder)
    lengths = [3200, 1, 320, 321, 3200, 1, 777, 3199, *([3201, 6400, 9000] if longer == "windows" else [])]
    media = ragged(*lengths)
    found = tower(media)
    assert torch.equal(found.grid, tower.grid_out(media.grid))
    assert len(found.values) == found.grid.prod(1).sum()
    torch.testing.assert_close(found.values, one_by_one(tower, media), **NEAR)
    if keep == "real":
        assert found.grid[:8, 2].tolist() == [10, 1, 1, 2, 10, 1, 3, 10]
    else:
        assert found.grid[:8, 2].tolist() == [10] * 8
    if longer == "windows":
        assert found.grid[8:, 2].tolist() == ([11, 20, 29] if keep == "real" else [20, 20, 30])
        cut = torch.cat([tower(Patches(values=part, grid=torch.tensor([[1, 1, len(part)]]))).values
                         for part in media.values[-9000:].split(3200)])  # fmt: skip
        torch.testing.assert_close(found.values[-len(cut) :], cut, **NEAR)


def test_what_whisper_keeps_is_the_beginning_of_all_tokens():
    tower = stirred(WhisperEncoder(whisper.sizes_from(WHISPER.to_dict())))
    samples = torch.randn(1, 1000, dtype=torch.float64)
    short = tower.features(samples)
    tower.keep = "all"
    assert short.shape[1] == 4
    assert torch.equal(short, tower.features(samples)[:, :4])


@pytest.mark.parametrize("length", [0, 3201])
def test_whisper_refuses_empty_and_long_sounds(length):
    tower = WhisperEncoder(whisper.sizes_from(WHISPER.to_dict()))
    media = ragged(5, length)
    for ask in (lambda: tower(media), lambda: tower.grid_out(media.grid)):
        with pytest.raises(DataError, match=rf"has {length} samples, expected 1 to 3200"):
            ask()


# --- wav2vec 2.0 -----------------------------------------------------------------------------------------------------


@pytest.mark.row("S4-41")
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("ctc", [False, True])
def test_wav2vec_values_and_gradients(as_saved, loaded, kind, ctc):
    reference = stirred((Wav2Vec2ForCTC if ctc else Wav2Vec2Model)(Wav2Vec2Config(**WAV2VEC, **KINDS[kind])))
    config, state = as_saved(reference)
    tower = Wav2Vec(wav2vec.sizes_from(config)).double().eval()
    tower.load_state_dict(wav2vec.to_ours(state, tower.sizes))
    samples = torch.randn(3, 501, dtype=torch.float64) * 3 + 1
    normal = torch.stack([(s - s.mean()) / (s.var(correction=0) + 1e-7).sqrt() for s in samples])
    masked = torch.rand(3, tower.sizes.frames(501)) < 0.3
    if ctc:
        found, wanted = tower.logits(samples), reference(normal).logits
    elif tower.mask_token is not None:
        found = tower.features(samples, masked=masked)
        wanted = reference(normal, mask_time_indices=masked).last_hidden_state
    else:
        found, wanted = tower.features(samples), reference(normal).last_hidden_state
    torch.testing.assert_close(found, wanted, **NEAR)
    pull = torch.randn_like(wanted)
    (found * pull).sum().backward()
    (wanted * pull).sum().backward()
    if ctc and tower.mask_token is not None:
        tower.mask_token.grad = torch.zeros_like(tower.mask_token)  # neither side masked
    same_gradients(tower, wav2vec.to_ours(as_saved(reference, gradients=True).state, tower.sizes))
    again = loaded(
        AutoModelForCTC if ctc else AutoModel,
        wav2vec.config_from(tower.sizes),
        wav2vec.to_official(tower.state_dict(), tower.sizes),
    )
    plain = again(normal).logits if ctc else again(normal).last_hidden_state
    torch.testing.assert_close(tower.logits(samples) if ctc else tower.features(samples), plain, **NEAR)
    assert wav2vec.sizes_from(as_saved(again).config) == tower.sizes


@pytest.mark.row("S4-41")
@torch.no_grad()
def test_pretraining_files_are_taken_apart(as_saved):
    reference = stirred(Wav2Vec2ForPreTraining(Wav2Vec2Config(**WAV2VEC, **KINDS["base"])))
    config, state = as_saved(reference)
    tower = Wav2Vec(wav2vec.sizes_from(config, normalize=False)).double().eval()
    tower.load_state_dict(wav2vec.to_ours(state, tower.sizes))
    parts = wav2vec.split(state)
    assert parts.tower.keys() | parts.quantizer.keys() == state.keys()
    assert "quantizer.codevectors" in parts.quantizer
    samples = torch.randn(2, 333, dtype=torch.float64)
    torch.testing.assert_close(tower.features(samples), reference.wav2vec2(samples).last_hidden_state, **NEAR)


@pytest.mark.row("S4-41")
@torch.no_grad()
def test_normalization_is_that_of_the_extractor():
    tower = stirred(Wav2Vec(wav2vec.sizes_from(Wav2Vec2Config(**WAV2VEC, **KINDS["base"]).to_dict()))).float()
    samples = torch.randn(1, 900) * 0.01 + 0.2
    given = Wav2Vec2FeatureExtractor()(samples[0].numpy(), sampling_rate=16_000, return_tensors="pt")["input_values"]
    found = tower.features(samples)
    tower.sizes = replace(tower.sizes, normalize=False)
    torch.testing.assert_close(found, tower.features(given), atol=2e-5, rtol=1e-4)


@pytest.mark.row("S4-41")
def test_published_numbers_of_wav2vec():
    with torch.device("meta"):
        base, large = Wav2Vec(WAV2VEC_BASE), Wav2Vec(WAV2VEC_LARGE)
        theirs = [
            AutoModel.from_config(Wav2Vec2Config(**wav2vec.config_from(sizes)))
            for sizes in (WAV2VEC_BASE, WAV2VEC_LARGE)
        ]
    counts = [sum(p.numel() for p in tower.parameters()) for tower in (base, large)]
    assert counts == [94_371_712, 315_438_720]
    assert counts == [model.num_parameters() for model in theirs]
    assert WAV2VEC_BASE.hears == 400


SMALL = stirred(Wav2Vec(wav2vec.sizes_from(Wav2Vec2Config(**WAV2VEC, **KINDS["base"]).to_dict())))


@pytest.mark.row("S4-41")
@settings(deadline=None, max_examples=60)
@given(st.integers(30, 400))
@torch.no_grad()
def test_account_of_every_length_is_what_comes_out(length):
    media = ragged(length)
    assert SMALL.sizes.hears == 30
    found = SMALL(media)
    assert len(found.values) == int(SMALL.grid_out(media.grid).prod()) == SMALL.sizes.frames(length) >= 1


@pytest.mark.row("S4-41")
@torch.no_grad()
def test_sounds_of_mixed_lengths_through_wav2vec():
    assert isinstance(SMALL, Encoder)
    media = ragged(100, 30, 444, 100, 30, 100)
    SMALL.batch_size = 2
    found = SMALL(media)
    assert torch.equal(found.grid, SMALL.grid_out(media.grid))
    torch.testing.assert_close(found.values, one_by_one(SMALL, media), **NEAR)


def test_wav2vec_refuses_what_makes_no_token():
    with pytest.raises(DataError, match="a sound has 29 samples, a token hears 30"):
        SMALL(ragged(30, 29))
    with pytest.raises(DataError, match="one row a sample"):
        SMALL(Patches(values=torch.zeros(60, 2), grid=torch.tensor([[1, 1, 60]])))
    with pytest.raises(DataError, match="one row a sample"):
        SMALL(Patches(values=torch.zeros(60, 1), grid=torch.tensor([[1, 2, 30]])))


def test_layouts_refuse_what_they_have_not(as_saved):
    config, state = as_saved(Wav2Vec2Model(Wav2Vec2Config(**WAV2VEC, **KINDS["base"])))
    sizes = wav2vec.sizes_from(config)
    with pytest.raises(CheckpointError, match="add_adapter is True"):
        wav2vec.sizes_from(config | {"add_adapter": True})
    with pytest.raises(CheckpointError, match=r"expected one of 'Wav2Vec2Model', 'Wav2Vec2ForCTC'"):
        wav2vec.sizes_from(config | {"architectures": ["Wav2Vec2ForXVector"]})
    with pytest.raises(CheckpointError, match=r"1 names have no place here \(wav2vec2\.adapter"):
        wav2vec.to_ours({**state, "adapter.proj.weight": torch.zeros(1)}, sizes)
    keyless = replace(sizes, transformer=replace(sizes.transformer, key_bias=False))
    with pytest.raises(CheckpointError, match="key_bias is False, expected True"):
        wav2vec.config_from(keyless)
    dropping = replace(VIT_B16, transformer=replace(VIT_B16.transformer, layer_drop=0.1))
    with pytest.raises(CheckpointError, match=r"layer_drop is 0\.1, this layout has 0\.0"):
        vit.config_from(dropping)
    with pytest.raises(CheckpointError, match="model_type is 'wav2vec2', expected 'whisper'"):
        whisper.sizes_from(config)


def test_old_names_of_weight_norm_are_known(as_saved):
    config, state = as_saved(Wav2Vec2Model(Wav2Vec2Config(**WAV2VEC, **KINDS["base"])))
    given = "parametrizations.weight.original"
    old = {n.replace(given + "0", "weight_g").replace(given + "1", "weight_v"): v for n, v in state.items()}
    sizes = wav2vec.sizes_from(config)
    assert old.keys() != state.keys()
    assert (
        wav2vec.to_ours(old, sizes).keys() == wav2vec.to_ours(state, sizes).keys() == Wav2Vec(sizes).state_dict().keys()
    )
