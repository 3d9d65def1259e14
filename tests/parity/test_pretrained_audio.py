"""Audio towers of transformers behind our face = transformers itself, sound by sound; what does not fit is refused."""

from __future__ import annotations

import json
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import (
    ASTConfig,
    ASTFeatureExtractor,
    ASTModel,
    ClapAudioConfig,
    ClapAudioModel,
    ClapConfig,
    ClapFeatureExtractor,
    ClapModel,
    Data2VecAudioConfig,
    Data2VecAudioModel,
    HubertConfig,
    HubertModel,
    UniSpeechConfig,
    UniSpeechModel,
    Wav2Vec2Config,
    Wav2Vec2FeatureExtractor,
    Wav2Vec2ForCTC,
    Wav2Vec2Model,
    WavLMConfig,
    WavLMModel,
    WhisperConfig,
    WhisperFeatureExtractor,
    WhisperForConditionalGeneration,
)

from plait.assembly.audio_towers import load_audio_tower
from plait.core.errors import CheckpointError, ConfigError, DataError
from plait.core.protocols import Encoder
from plait.core.tensors import Patches
from plait.models.hub import whisper
from plait.models.towers.pretrained_audio import PretrainedAudio
from plait.models.towers.whisper import WhisperEncoder

TINY: dict[str, Any] = {
    "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2,
}  # fmt: skip
SPEECH: dict[str, Any] = {**TINY, "conv_dim": [8, 8, 8], "conv_kernel": [10, 3, 2], "conv_stride": [5, 2, 2],
                          "num_conv_pos_embeddings": 8, "num_conv_pos_embedding_groups": 2}  # fmt: skip
STABLE = {"feat_extract_norm": "layer", "do_stable_layer_norm": True}


def wav2vec_like(model: Any, config: Any, **more: Any) -> tuple[Any, Any]:
    return model(config(**SPEECH, **more)), Wav2Vec2FeatureExtractor()


def whisper_like() -> tuple[Any, Any]:
    config = WhisperConfig(
        d_model=16, encoder_layers=2, decoder_layers=1, encoder_attention_heads=2, decoder_attention_heads=2,
        encoder_ffn_dim=24, decoder_ffn_dim=24, vocab_size=20, num_mel_bins=80, max_source_positions=50,
        max_target_positions=6, pad_token_id=0, bos_token_id=1, eos_token_id=2, decoder_start_token_id=3,
        suppress_tokens=None, begin_suppress_tokens=None,
    )  # fmt: skip
    return WhisperForConditionalGeneration(config), WhisperFeatureExtractor(chunk_length=1)


def ast_like() -> tuple[Any, Any]:
    config = ASTConfig(**TINY, patch_size=8, frequency_stride=5, time_stride=6, max_length=60, num_mel_bins=32)
    return ASTModel(config), ASTFeatureExtractor(max_length=60, num_mel_bins=32)


CLAP_AUDIO: dict[str, Any] = {
    "window_size": 2, "num_mel_bins": 16, "spec_size": 64, "patch_size": 4, "patch_stride": [4, 4], "depths": [1, 1],
    "num_attention_heads": [2, 2], "num_hidden_layers": 2, "patch_embeds_hidden_size": 8, "hidden_size": 16,
    "projection_dim": 8,
}  # fmt: skip


def clap_like() -> tuple[Any, Any]:
    text = {**TINY, "vocab_size": 20, "max_position_embeddings": 16}
    extractor = ClapFeatureExtractor(feature_size=16, max_length_s=1, truncation="rand_trunc", hop_length=480)
    return ClapModel(ClapConfig(text_config=text, audio_config=CLAP_AUDIO, projection_dim=8)), extractor


MAKERS = {
    "wav2vec2": lambda: wav2vec_like(Wav2Vec2Model, Wav2Vec2Config),
    "wav2vec2-stable": lambda: wav2vec_like(Wav2Vec2Model, Wav2Vec2Config, **STABLE),
    "hubert": lambda: wav2vec_like(HubertModel, HubertConfig),
    "wavlm": lambda: wav2vec_like(WavLMModel, WavLMConfig),
    "unispeech": lambda: wav2vec_like(UniSpeechModel, UniSpeechConfig),
    "data2vec-audio": lambda: wav2vec_like(Data2VecAudioModel, Data2VecAudioConfig, **STABLE),
    "whisper": whisper_like,
    "ast": ast_like,
    "clap": clap_like,
}
LENGTHS = {"whisper": (1, 800, 16_000, 801), "ast": (400, 1600, 9000, 9840, 9999), "clap": (1, 480, 30_000, 48_000)}


@pytest.fixture
def folder(tmp_path):
    def make(kind: str):
        torch.manual_seed(0)
        model, extractor = MAKERS[kind]()
        for name, value in model.named_parameters():
            if "parametrizations" not in name:
                torch.nn.init.normal_(value, std=0.2)
        model.save_pretrained(tmp_path / kind)
        extractor.save_pretrained(tmp_path / kind)
        return tmp_path / kind, model.eval(), extractor

    return make


def sounds(kind: str) -> tuple[list[torch.Tensor], Patches]:
    generator = torch.Generator().manual_seed(0)
    found = [torch.randn(n, 1, generator=generator) * 0.3 for n in LENGTHS.get(kind, (100, 30, 444, 100))]
    return found, Patches(values=torch.cat(found), grid=torch.tensor([[1, 1, len(s)] for s in found]))


def alone(kind: str, model: Any, extractor: Any, sound: torch.Tensor) -> torch.Tensor:
    """Tokens of one sound as transformers gives them, in raster order, time last."""
    given = extractor(sound[:, 0].numpy(), sampling_rate=extractor.sampling_rate, return_tensors="pt")
    if kind == "whisper":
        return model.get_encoder()(given["input_features"]).last_hidden_state[0]
    if kind == "clap":
        cells = model.audio_model(given["input_features"]).last_hidden_state[0]
        return cells.flatten(1).T
    hidden = model(given["input_values"]).last_hidden_state[0]
    return hidden[2:] if kind == "ast" else hidden


@pytest.mark.row("S4-41")
@pytest.mark.row("S4-42")
@torch.no_grad()
@pytest.mark.parametrize("kind", MAKERS)
def test_every_family_says_what_transformers_says(folder, kind):
    path, model, extractor = folder(kind)
    listed, media = sounds(kind)
    tower = load_audio_tower(str(path), keep="all", dtype="float32")
    assert isinstance(tower.encoder, Encoder)
    assert tower.rate == extractor.sampling_rate
    assert not any(p.requires_grad for p in tower.encoder.parameters())
    found = tower.encoder(media)
    assert torch.equal(found.grid, tower.encoder.grid_out(media.grid))
    wanted = [alone(kind, model, extractor, sound) for sound in listed]
    # Worst measured: 3e-7 of the largest number, where sounds of one length are computed together.
    torch.testing.assert_close(found.values, torch.cat(wanted), atol=1e-5, rtol=1e-4)
    assert found.values.shape[1] == tower.encoder.d_out
    # What is kept are the first columns of every row.
    real = load_audio_tower(str(path), dtype="float32").encoder(media)
    columns = zip(found.grid.tolist(), real.grid.tolist(), wanted, strict=True)
    cut = [w.view(g[1], g[2], -1)[:, : r[2]].flatten(0, 1) for g, r, w in columns]
    torch.testing.assert_close(real.values, torch.cat(cut), atol=1e-5, rtol=1e-4)


@pytest.mark.row("S4-42")
@torch.no_grad()
def test_accounts_of_what_is_filled_up(folder):
    path, _, _ = folder("whisper")
    assert load_audio_tower(str(path)).encoder.grid_out(sounds("whisper")[1].grid)[:, 2].tolist() == [1, 3, 50, 3]
    path, _, _ = folder("ast")
    tower = load_audio_tower(str(path))
    # 5 bands; frames 1, 8, 54, 60 and 60 of 60, a patch every 6
    grid = tower.encoder.grid_out(sounds("ast")[1].grid)
    assert grid.tolist() == [[1, 5, 1], [1, 5, 2], [1, 5, 9], [1, 5, 9], [1, 5, 9]]
    path, _, _ = folder("clap")
    assert load_audio_tower(str(path)).encoder.grid_out(torch.tensor([[1, 1, 7]])).tolist() == [[1, 2, 32]]


@torch.no_grad()
@pytest.mark.parametrize("kind", ["hubert", "whisper", "ast"])
def test_hidden_layers(folder, kind):
    path, model, extractor = folder(kind)
    listed, media = sounds(kind)
    given = extractor(listed[0][:, 0].numpy(), sampling_rate=16_000, return_tensors="pt")
    core = model.get_encoder() if kind == "whisper" else model
    states = core(**given, output_hidden_states=True).hidden_states
    one = Patches(values=listed[0], grid=media.grid[:1])
    for layer in (-2, -3):
        tower = load_audio_tower(str(path), layer=layer, keep="all", dtype="float32")
        wanted = states[layer][0][2 if kind == "ast" else 0 :]
        torch.testing.assert_close(tower.encoder(one).values, wanted, atol=1e-6, rtol=1e-5)
    with pytest.raises(ConfigError, match=r"layer is -4, \w+ has -1 to -3"):
        load_audio_tower(str(path), layer=-4)


@pytest.mark.row("S4-42")
@torch.no_grad()
def test_our_whisper_encoder_and_the_librarys_hear_the_same(folder):
    path, _, _ = folder("whisper")
    ours = WhisperEncoder(whisper.sizes_from(json.loads((path / "config.json").read_text()))).eval()
    ours.load_state_dict(whisper.to_ours(load_file(path / "model.safetensors")))
    _, media = sounds("whisper")
    theirs = load_audio_tower(str(path), dtype="float32").encoder(media)
    found = ours(media)
    assert torch.equal(found.grid, theirs.grid)
    torch.testing.assert_close(found.values, theirs.values, atol=1e-5, rtol=1e-4)  # worst measured: 1e-7


def test_a_fine_tuned_folder_gives_its_tower_and_lengths_outside_are_refused(folder, tmp_path):
    Wav2Vec2ForCTC(Wav2Vec2Config(**SPEECH, vocab_size=5)).save_pretrained(tmp_path / "ctc")
    Wav2Vec2FeatureExtractor().save_pretrained(tmp_path / "ctc")
    tower = load_audio_tower(str(tmp_path / "ctc"), dtype="float32").encoder
    with pytest.raises(DataError, match="sound 1 has 29 samples, expected 30 or more"):
        tower.grid_out(torch.tensor([[1, 1, 30], [1, 1, 29]]))
    for kind, short, long in (("whisper", 0, 16_001), ("ast", 399, 10_000), ("clap", 0, 48_001)):
        tower = load_audio_tower(str(folder(kind)[0]), dtype="float32").encoder
        for length in (short, long):
            with pytest.raises(DataError, match=rf"sound 0 has {length} samples, expected {short + 1} to {long - 1}"):
                tower(Patches(values=torch.zeros(length, 1), grid=torch.tensor([[1, 1, length]])))
    with pytest.raises(DataError, match="mono samples at 48000 Hz"):
        tower(Patches(values=torch.zeros(10, 2), grid=torch.tensor([[1, 1, 10]])))


def test_keys_tell_towers_apart(folder):
    path, _, _ = folder("hubert")
    keys = {load_audio_tower(str(path), dtype="float32", **more).key for more in ({}, {"layer": -2}, {"keep": "all"})}
    assert len(keys) == 3
    tower = load_audio_tower(str(path), dtype="float32")
    assert load_audio_tower(**tower.settings).key == tower.key in keys
    assert tower.cache_key != tower.key


def edited(path: Any, name: str, **fields: Any) -> str:
    record = json.loads((path / name).read_text())
    (path / name).write_text(json.dumps(record | fields))
    return str(path)


@pytest.mark.parametrize(
    ("kind", "file", "fields", "said"),
    [
        ("hubert", "config.json", {"model_type": "sew"}, "model_type is 'sew', which is no audio tower"),
        ("wav2vec2", "config.json", {"add_adapter": True}, "add_adapter is True, expected False|do not fit"),
        ("whisper", "preprocessor_config.json", {"feature_size": 128}, "feature_size .* 128, expected 80"),
        ("whisper", "preprocessor_config.json", {"chunk_length": 30}, "nb_max_frames .* 3000, expected 100"),
        ("whisper", "preprocessor_config.json", {"dither": 0.1}, "dither .* 0.1, expected 0.0"),
        ("ast", "preprocessor_config.json", {"max_length": 1024}, "max_length .* 1024, expected 60"),
        ("clap", "preprocessor_config.json", {"truncation": "fusion"}, "truncation .* 'fusion', expected 'rand_trunc'"),
        ("hubert", "preprocessor_config.json", {"feature_extractor_type": "ASTFeatureExtractor"},
         "is ASTFeatureExtractor, expected Wav2Vec2FeatureExtractor"),
    ],
)  # fmt: skip
def test_folders_that_do_not_fit_are_refused(folder, kind, file, fields, said):
    path, _, _ = folder(kind)
    with pytest.raises(CheckpointError, match=said):
        load_audio_tower(edited(path, file, **fields))


def test_damaged_folders_are_refused(folder, tmp_path):
    with pytest.raises(ConfigError, match=r"is no folder with a config\.json"):
        load_audio_tower(str(tmp_path / "nowhere"))
    path, _, _ = folder("hubert")
    state = load_file(path / "model.safetensors")
    name = next(n for n in state if n.endswith("layers.1.attention.q_proj.weight"))
    state.pop(name)
    save_file(state, path / "model.safetensors", {"format": "pt"})
    with pytest.raises(CheckpointError, match=r"1 missing: encoder\.layers\.1\.attention\.q_proj\.weight"):
        load_audio_tower(str(path))
    save_file(state | {name: torch.zeros(3, 3)}, path / "model.safetensors", {"format": "pt"})
    with pytest.raises(CheckpointError, match=r"1 of another shape: .*q_proj\.weight \(\["):
        load_audio_tower(str(path))
    (path / "preprocessor_config.json").unlink()
    (path / "model.safetensors").write_bytes(b"nothing")
    with pytest.raises(CheckpointError, match="no audio tower can be read"):
        load_audio_tower(str(path))
    (path / "config.json").write_text("{")
    with pytest.raises(CheckpointError, match="undamaged copy"):
        load_audio_tower(str(path))


def test_a_model_given_by_hand_is_looked_at_too():
    model = ClapAudioModel(ClapAudioConfig(**CLAP_AUDIO, enable_fusion=True))
    with pytest.raises(CheckpointError, match="enable_fusion is True, expected False"):
        PretrainedAudio(model, ClapFeatureExtractor(feature_size=16))
