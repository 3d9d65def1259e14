"""Models from settings: eyes and ears beside each other, pictures of any shape, and what is refused."""

from __future__ import annotations

import io
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from pydantic import ValidationError
from transformers import WhisperConfig, WhisperFeatureExtractor, WhisperModel

from plait.assembly.compose import compose
from plait.assembly.multimodal import Multimodal, load_multimodal, save_multimodal
from plait.core.errors import CheckpointError, ConfigError, DataError
from plait.core.tensors import Patches
from plait.core.types import MediaRef, Request, Sample, Text, Turn
from plait.data.collate import collate
from plait.data.speech import encode_wav
from plait.inference.build import build_engine, encode_pictures
from plait.models.composition import Composition
from plait.objectives.language import NextToken

RATE = 16_000
VIT = {"kind": "vit", "size": 32, "patch": 8, "d": 16, "depth": 1, "heads": 2, "position": "sincos"}
RESAMPLER = {"kind": "resampler", "queries": 3, "depth": 1, "heads": 2}
GATED = {"kind": "gated-cross-attention", "every": 1, "heads": 2, "resampler": None}


@pytest.fixture(scope="module")
def whisper(tmp_path_factory: pytest.TempPathFactory) -> str:
    """Folder of a tiny Whisper with windows of 2 s."""
    folder = tmp_path_factory.mktemp("whisper")
    torch.manual_seed(0)
    sizes = {"d_model": 16, "encoder_layers": 1, "decoder_layers": 1, "encoder_attention_heads": 2}
    sizes |= {"decoder_attention_heads": 2, "encoder_ffn_dim": 24, "decoder_ffn_dim": 24, "vocab_size": 20}
    special = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2, "decoder_start_token_id": 3}
    limits = {"max_source_positions": 100, "max_target_positions": 6, "num_mel_bins": 80}
    quiet = {"suppress_tokens": None, "begin_suppress_tokens": None}
    WhisperModel(WhisperConfig(**sizes, **special, **limits, **quiet)).save_pretrained(folder)
    WhisperFeatureExtractor(chunk_length=2).save_pretrained(folder)
    return str(folder)


def settings(decoder: Path, **given: Any) -> dict[str, Any]:
    new = {"kind": "new", "d": 32, "depth": 2, "heads": 4, "context": 256, "tokenizer": str(decoder)}
    return {"encoders": {"image": VIT}, "connectors": {"image": {"kind": "mlp"}}, "decoder": new} | given


def bytes_of(ref: MediaRef) -> bytes:
    """A picture of the size, or a sound of the length, that the reference says."""
    if ref.modality == "audio":
        steps = np.arange(ref.length) * (0.05 + 0.01 * len(ref.uri))
        return encode_wav((0.3 * np.sin(steps)).astype(np.float32), RATE)
    noise = np.random.default_rng(len(ref.uri)).integers(0, 255, (ref.height, ref.width, 3), dtype=np.uint8)
    drawn = Image.fromarray(noise)
    out = io.BytesIO()
    drawn.save(out, "PNG")
    return out.getvalue()


def picture(name: str, width: int = 40, height: int = 30) -> MediaRef:
    return MediaRef(modality="image", sha256=name, uri=name, width=width, height=height)


def sound(name: str, seconds: float) -> MediaRef:
    return MediaRef(modality="audio", sha256=name, uri=name, length=round(seconds * RATE))


def asked(*parts: MediaRef | Text) -> tuple[Turn, ...]:
    return (Turn(role="user", parts=parts),)


def scores(built: Multimodal, samples: dict[str, tuple[Turn, ...]]) -> Any:
    """Loss of trained answers about encoded media, packed into rows."""
    encode = encode_pictures(built, bytes_of)
    answer = Turn(role="assistant", parts=(Text(text="yes"),), trained=True)
    rendered = [(name, built.template.sample(Sample(id=name, turns=(*t, answer)))) for name, t in samples.items()]
    torch.manual_seed(0)
    features: dict[str, Patches] = {ref.sha256: encode([ref]) for _, found in rendered for ref in found.media}
    batch = collate(rendered, features, grid_out=built.accounts, encoded=True, row=240, pad=built.stop)
    return NextToken()(built.model, batch)["next_token"]


@pytest.mark.row("S4-44", "S2-09")
@pytest.mark.parametrize(
    ("image", "audio"),
    [("mlp", "linear"), ("resampler", "resampler"), ("gated", "resampler"), ("mlp", "gated"), ("mlp", "qformer")],
)
def test_a_model_that_sees_and_hears_is_saved_and_answers(
    image: str, audio: str, whisper: str, tiny_folders: dict[str, Path], tmp_path: Path
) -> None:
    kinds: dict[str, dict[str, Any]] = {
        "mlp": {"kind": "mlp", "shuffle": 2},
        "linear": {"kind": "linear"},
        "resampler": RESAMPLER,
        "gated": GATED,
        "qformer": {"kind": "qformer", "queries": 3, "d": 16, "depth": 2, "heads": 2, "dropout": 0.0},
    }
    given = settings(
        tiny_folders["decoder"],
        encoders={"image": VIT, "audio": {"name": whisper, "dtype": "float32"}},
        connectors={"image": kinds[image], "audio": kinds[audio]},
    )
    torch.manual_seed(0)
    built = compose(Composition.model_validate(given))
    built.model.eval()
    both = {
        "both": asked(picture("a"), sound("b", 0.5)),
        "heard": asked(sound("c", 1.2), Text(text="and?")),
        "seen": asked(Text(text="what?"), picture("d"), picture("ee")),
        "read": asked(Text(text="what?")),
    }
    loss = scores(built, both)
    loss.backward()
    learning = [weight for name, weight in built.model.named_parameters() if name.startswith("connectors.")]
    assert all(weight.grad is not None for weight in learning)
    assert built.model.placeholders["audio"] == built.model.placeholders["image"] + 1
    save_multimodal(built, tmp_path)
    loaded = load_multimodal(tmp_path)
    with torch.inference_mode():
        assert torch.equal(scores(built, both), scores(loaded, both))
    said = []
    for one in (built, loaded):
        engine = build_engine(one, encode_pictures(one, lambda ref: bytes_of(ref) if ref.modality == "audio" else PNG))
        found = engine([Request(id=name, turns=turns, max_new_tokens=3) for name, turns in both.items()])
        said.append([one.token_ids for one in found])
    assert said[0] == said[1]


PNG = bytes_of(picture("all"))


@pytest.mark.row("S2-05")
@pytest.mark.parametrize("fit", [{"kind": "native"}, {"kind": "tiles", "max_tiles": 4}])
def test_pictures_of_any_shape_from_settings_to_answers(
    fit: dict[str, Any], tiny_folders: dict[str, Path], tmp_path: Path
) -> None:
    tower = {"kind": "pretrained", "name": str(tiny_folders["image"]), "fit": fit, "dtype": "float32"}
    torch.manual_seed(0)
    built = compose(Composition.model_validate(settings(tiny_folders["decoder"], encoders={"image": tower})))
    built.model.eval()
    wide, small = asked(picture("w", 90, 20), Text(text="?")), asked(picture("s", 16, 16), picture("t", 20, 70))
    turns = {"wide": wide, "small": small}
    slots = [built.template.turns(t, prompt=True).slots for t in turns.values()]
    assert len({count for found in slots for count in found}) > 1, "all pictures take as many places"
    save_multimodal(built, tmp_path)
    loaded = load_multimodal(tmp_path)
    assert loaded.image.contract == built.image.contract
    said = []
    for one in (built, loaded):
        engine = build_engine(one, encode_pictures(one, lambda ref: SIZED[ref.width, ref.height]))
        found = engine([Request(id=name, turns=t, max_new_tokens=3) for name, t in turns.items()])
        said.append([(answer.token_ids, answer.image_tokens) for answer in found])
    assert said[0] == said[1]
    assert [tokens for _, tokens in said[0]] == [sum(found) for found in slots]


SIZED = {size: bytes_of(picture("sized", *size)) for size in ((90, 20), (16, 16), (20, 70))}


def test_towers_that_learned_other_weights_are_other_towers(tiny_folders: dict[str, Path], tmp_path: Path) -> None:
    keys = []
    for seed in (0, 1):
        torch.manual_seed(seed)
        built = compose(Composition.model_validate(settings(tiny_folders["decoder"])))
        (tmp_path / str(seed)).mkdir()
        save_multimodal(built, tmp_path / str(seed))
        keys.append(load_multimodal(tmp_path / str(seed)).image.cache_key)
    assert keys[0] != keys[1], "their features would be shared"
    assert load_multimodal(tmp_path / "0").image.cache_key == keys[0]


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda record: record["media"]["image"].update(size=64), "the media contract is"),
        (lambda record: record.update(media={}), "the media contract is"),
        (lambda record: record["composition"]["towers"]["image"].pop("scratch"), "settings cannot be read"),
        (lambda record: record["composition"]["towers"]["image"].update(key="x"), "image tower has digest"),
        (lambda record: record["composition"]["decoder"].update(dtype="float7"), "dtype 'float7'"),
        (lambda record: record["composition"].update(placeholders=7), "cannot be read"),
    ],
)
def test_a_record_that_was_changed_is_refused(
    change: Any, said: str, tiny_folders: dict[str, Path], tmp_path: Path
) -> None:
    built = compose(Composition.model_validate(settings(tiny_folders["decoder"])))
    save_multimodal(built, tmp_path)
    record = json.loads((tmp_path / "plait.json").read_text(encoding="utf-8"))
    change(record)
    (tmp_path / "plait.json").write_text(json.dumps(record), encoding="utf-8")
    with pytest.raises(CheckpointError, match=said):
        load_multimodal(tmp_path)


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ({"connectors": {"image": {"kind": "mlp"}, "audio": RESAMPLER}}, "encoders for image and connectors for image"),
        ({"encoders": {}, "connectors": {}}, "encoders for nothing"),
        ({"encoders": {"image": VIT, "audio": {}}, "connectors": {"image": GATED, "audio": GATED}}, "are both read"),
        ({"decoder": {"kind": "new", "model_type": "gpt2", "heads": 4, "kv_heads": 2}}, "gpt2 has as many heads"),
        ({"decoder": {"kind": "new", "model_type": "mixtral"}}, "mixtral has experts: give mixture"),
        ({"decoder": {"kind": "new", "mixture": {}}}, "llama has no mixture"),
        (
            {"decoder": {"kind": "new", "model_type": "mixtral", "mixture": {"experts": 2, "top_k": 3}}},
            "top_k is 3 of 2 experts",
        ),
    ],
)
def test_settings_that_make_no_model_are_refused(given: dict[str, Any], said: str) -> None:
    with pytest.raises(ValidationError, match=said):
        Composition.model_validate({"encoders": {"image": VIT}, "connectors": {"image": {"kind": "mlp"}}} | given)


def test_a_model_without_ears_says_so(tiny_folders: dict[str, Path]) -> None:
    built = compose(Composition.model_validate(settings(tiny_folders["decoder"])))
    with pytest.raises(DataError, match="a turn holds audio, this model reads image"):
        built.template.turns(asked(sound("x", 1.0)), prompt=True)


def test_a_model_without_eyes_says_so(whisper: str, tiny_folders: dict[str, Path]) -> None:
    given = settings(
        tiny_folders["decoder"],
        encoders={"audio": {"name": whisper, "dtype": "float32"}},
        connectors={"audio": {"kind": "linear"}},
    )
    built = compose(Composition.model_validate(given))
    with pytest.raises(ConfigError, match="this model reads audio, no pictures"):
        _ = built.image
    assert built.template.turns(asked(sound("x", 1.0)), prompt=True).slots == (50,)
