"""Questions asked aloud go through tune, its sealed model and evaluate."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import WhisperConfig, WhisperFeatureExtractor, WhisperModel

from plait.assembly.multimodal import load_multimodal
from plait.core.errors import ConfigError, DataError
from plait.core.estimate import Machine
from plait.core.events import Events
from plait.core.files import find_model, read_done, read_json
from plait.core.types import Request
from plait.data.shards import ShardReader
from plait.inference.build import build_engine, encode_pictures
from plait.stages.data import Data
from plait.stages.evaluate import Evaluate
from plait.stages.tune import Tune

MACHINE = Machine(cores=2, memory_bytes=2**33, disk_bytes=2**35, gemm_fp32=1e11, gemm_bf16=1e11, measured=True)


@pytest.fixture
def whisper(tmp_path: Path) -> Path:
    """A random Whisper that hears windows of 6 s."""
    folder = tmp_path / "whisper"
    torch.manual_seed(0)
    sizes = {"d_model": 16, "encoder_layers": 1, "decoder_layers": 1, "encoder_attention_heads": 2}
    sizes |= {"decoder_attention_heads": 2, "encoder_ffn_dim": 24, "decoder_ffn_dim": 24, "vocab_size": 8}
    special = dict.fromkeys(("pad_token_id", "bos_token_id", "eos_token_id", "decoder_start_token_id"), 1)
    limits = {"max_source_positions": 300, "max_target_positions": 8, "num_mel_bins": 80}
    WhisperModel(WhisperConfig(**sizes, **special, **limits)).save_pretrained(folder)
    WhisperFeatureExtractor(chunk_length=6).save_pretrained(folder)
    return folder


@pytest.fixture
def spoken_stage(data_stage: Path) -> Path:
    """The data stage again, with its questions asked aloud."""
    stage = data_stage.parent / "02-data"
    stage.mkdir()
    source = {"kind": "pairs", "path": str(data_stage.parent / "own" / "pairs.csv"), "test_fraction": 0.25}
    spoken = {"takes": 1, "voices": ["en-us"], "test_voices": ["en-us+m5"], "speeds": [300], "share": 0.7}
    questions = {"yes_no": 1, "yes_no_easy": 0, "canvases": 0, "test_canvases": 0, "spoken": spoken}
    Data.model_validate({"source": source, "questions": questions}).run(None, stage, events=Events())
    return stage


def spec(folders: dict[str, Path], **settings: Any) -> Tune:
    sizes: dict[str, Any] = {
        "image_tower": str(folders["image"]),
        "resolution": 0,
        "views": 1,
        "decoder": str(folders["decoder"]),
        "dtype": "float32",
        "connector": {"kind": "mlp", "shuffle": 2},
        "audio_connector": {"kind": "resampler", "queries": 2, "depth": 1, "heads": 2},
        "frozen": {"steps": 2},
        "adapt": {"steps": 2, "rank": 2, "targets": ["q_proj"], "lr_connector": 1e-3},
        "batch_size": 4,
        "device": "cpu",
    }
    return Tune.model_validate(sizes | settings)


def test_a_spoken_question_is_trained_answered_and_scored(
    spoken_stage: Path, whisper: Path, tiny_folders: dict[str, Path]
) -> None:
    folder = spoken_stage.parent / "03-tune"
    folder.mkdir()
    spec(tiny_folders, audio_tower=str(whisper)).run(spoken_stage, folder, events=Events())
    done = read_done(folder)
    assert done is not None
    assert f"mlp + {whisper} + resampler" in done["summary"]["lines"][0]
    built = load_multimodal(find_model(folder))
    assert built.audio is not None
    with ShardReader(spoken_stage / "shards", "instruct-test-concept") as asked:
        of_id = {sample.id: sample for sample in asked}
        heard = [sample for sample in of_id.values() if [ref.modality for ref in sample.media()] == ["image", "audio"]]
        assert heard
        last = sorted((folder / "samples").glob("*.json"))[-1]
        samples = read_json(last)["samples"]
        assert all(sample["question"] for sample in samples), "a spoken question is shown as its text"
        with ShardReader(spoken_stage / "shards", "test-concept") as pictures:

            def read(ref: Any) -> bytes:
                return (asked if ref.modality == "audio" else pictures).media(ref)

            engine = build_engine(built, encode_pictures(built, read))
            answers = engine([Request(id=s["id"], turns=of_id[s["id"]].turns[:-1], max_new_tokens=10) for s in samples])
    assert [answer.text.strip() for answer in answers] == [sample["answer"] for sample in samples]
    scored = spoken_stage.parent / "04-evaluate"
    scored.mkdir()
    settings = {"tasks": ["name.en"], "baseline_tasks": ["name.en"], "max_names": 4, "max_new_tokens": 4}
    Evaluate.model_validate(settings).run(folder, scored, events=Events())
    assert read_done(scored) is not None


def test_what_cannot_be_heard_is_said(
    spoken_stage: Path, whisper: Path, tiny_folders: dict[str, Path], tmp_path: Path
) -> None:
    deaf = tmp_path / "deaf"
    deaf.mkdir()
    with pytest.raises(DataError, match=r"sounds, and no tower that hears them.*name an audio tower"):
        spec(tiny_folders).run(spoken_stage, deaf, events=Events())
    with pytest.raises(ConfigError, match="no audio tower called 'none'") as caught:
        spec(tiny_folders, audio_tower="none").check(MACHINE)
    assert caught.value.place == "stages.tune.audio_tower"
    spec(tiny_folders, audio_tower=str(whisper)).check(MACHINE)
    for kind in ("words", "gated-cross-attention"):
        with pytest.raises(ValueError, match=f"audio_connector is `{kind}`: sounds are spliced in"):
            spec(tiny_folders, audio_connector={"kind": kind})
    with pytest.raises(ValueError, match="fit is `tiles`: the first phase of the connector `words`"):
        spec(tiny_folders, connector={"kind": "words"}, fit={"kind": "tiles"})
