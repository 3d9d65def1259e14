"""Models that hear and watch, with towers from scratch and from folders: trained, saved, found again, asked."""

from __future__ import annotations

import hashlib
import io
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from pydantic import ValidationError
from tests.tiny_videos import sound_only, video
from transformers import VideoMAEConfig, VideoMAEModel

from plait.assembly import video_towers
from plait.assembly.compose import compose
from plait.assembly.language import language_of
from plait.assembly.media_towers import kept, read_media
from plait.assembly.multimodal import Multimodal, build_multimodal, load_multimodal, save_multimodal
from plait.assembly.towers import scratch_tower
from plait.assembly.video_towers import scratch_video_tower
from plait.core.errors import CheckpointError, ConfigError, DataError
from plait.core.events import Events
from plait.core.tensors import Batch
from plait.core.types import MediaRef, Request, Sample, Text, Turn
from plait.data.collate import collate
from plait.data.features import cached_features
from plait.data.media import MediaError
from plait.data.shards import ShardReader, write_shards
from plait.data.speech import encode_wav
from plait.inference.build import build_engine, encode_pictures
from plait.models.composition import Composition, Connectors, NewDecoder
from plait.models.specs import Linear, ViT
from plait.models.video_specs import FramesThenTime, SpaceTime
from plait.objectives.language import NextToken

RATE = 16_000
VIT = {"kind": "vit", "size": 16, "patch": 8, "d": 16, "depth": 1, "heads": 2, "position": "sincos"}
WHISPER = {"kind": "whisper", "d": 16, "depth": 1, "heads": 2, "mels": 8, "tokens": 50}
WAV2VEC2 = {"kind": "wav2vec2", "d": 16, "depth": 1, "heads": 2, "channels": 8, "position_kernel": 4}
WAV2VEC2 |= {"position_groups": 2, "vocabulary": 5}
FRAMES = {"kind": "frames", "tower": VIT, "frames": 3, "depth": 1, "heads": 2}
SPACE_TIME = {"kind": "space-time", "size": 16, "frames": 4, "patch": 8, "d": 16, "depth": 1, "heads": 2}
RESAMPLER = {"kind": "resampler", "queries": 3, "depth": 1, "heads": 2}
GATED = {"kind": "gated-cross-attention", "every": 1, "heads": 2, "resampler": None}
MLP = {"kind": "mlp", "d_hidden": 8}

BYTES: dict[str, bytes] = {f"v{n}": video(frames, seed=n) for n, frames in enumerate((12, 7, 2))}
BYTES |= {
    f"s{n}": encode_wav((0.3 * np.sin(np.arange(length) * 0.05)).astype(np.float32), RATE)
    for n, length in enumerate((8_000, 12_345))
}


def png() -> bytes:
    out = io.BytesIO()
    Image.effect_noise((40, 30), 60).convert("RGB").save(out, "PNG")
    return out.getvalue()


BYTES["p0"] = png()
P0 = MediaRef(modality="image", sha256="p0", uri="p0.png", width=40, height=30)
S0, S1 = (MediaRef(modality="audio", sha256=f"s{n}", uri=f"s{n}.wav", length=(8_000, 12_345)[n]) for n in (0, 1))
V0, V1, V2 = (MediaRef(modality="video", sha256=f"v{n}", uri=f"v{n}.mp4", length=(12, 7, 2)[n]) for n in (0, 1, 2))


@pytest.fixture(scope="module")
def videomae(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder of a tiny VideoMAE."""
    folder = tmp_path_factory.mktemp("videomae")
    torch.manual_seed(0)
    sizes = {"hidden_size": 12, "intermediate_size": 24, "num_hidden_layers": 1, "num_attention_heads": 2}
    VideoMAEModel(VideoMAEConfig(**sizes, image_size=16, patch_size=8, num_frames=4)).save_pretrained(folder)
    steps = {"image_mean": [0.5, 0.4, 0.3], "image_std": [0.2, 0.3, 0.4], "resample": 3}
    steps |= {"size": {"height": 16, "width": 16}}
    (folder / "preprocessor_config.json").write_text(json.dumps(steps), encoding="utf-8")
    return folder


def settings(decoder: Path, encoders: dict[str, Any], connectors: dict[str, Any]) -> dict[str, Any]:
    new = {"kind": "new", "d": 32, "depth": 2, "heads": 4, "context": 256, "tokenizer": str(decoder)}
    return {"encoders": encoders, "connectors": connectors, "decoder": new}


def build(decoder: Path, encoders: dict[str, Any], connectors: dict[str, Any], seed: int = 0) -> Multimodal:
    torch.manual_seed(seed)
    return compose(Composition.model_validate(settings(decoder, encoders, connectors)))


def asked(*parts: MediaRef | Text) -> tuple[Turn, ...]:
    return (Turn(role="user", parts=(*parts, Text(text="what?"))),)


def raw_batch(built: Multimodal, questions: dict[str, tuple[Turn, ...]]) -> Batch:
    """Conversations with the bytes of their media prepared, not encoded: what a tower that learns is trained on."""
    answer = Turn(role="assistant", parts=(Text(text="yes"),), trained=True)
    rendered = [
        (name, built.template.sample(Sample(id=name, turns=(*turns, answer)))) for name, turns in questions.items()
    ]
    refs = {ref.sha256: ref for _, found in rendered for ref in found.media}
    media = {name: read_media(built.towers[r.modality], BYTES[name], place=r.uri) for name, r in refs.items()}
    return collate(rendered, media, grid_out=built.raw_accounts, encoded=False, row=240, pad=built.stop)


def two_steps(built: Multimodal, batch: Batch) -> set[str]:
    """Train; names of the weights that moved."""
    before = {name: value.clone() for name, value in built.model.state_dict().items()}
    learning = [weight for weight in built.model.parameters() if weight.requires_grad]
    optimizer = torch.optim.AdamW(learning, lr=1e-2)
    for _ in range(2):
        optimizer.zero_grad()
        NextToken()(built.model, batch)["next_token"].backward()
        optimizer.step()
    return {name for name, value in built.model.state_dict().items() if not torch.equal(before[name], value)}


def answers(built: Multimodal, questions: dict[str, tuple[Turn, ...]]) -> list[tuple[int, ...]]:
    engine = build_engine(built, encode_pictures(built, lambda ref: BYTES[ref.sha256]))
    found = engine([Request(id=name, turns=turns, max_new_tokens=3) for name, turns in questions.items()])
    return [(*one.token_ids, one.prompt_tokens) for one in found]


def walk(built: Multimodal, questions: dict[str, tuple[Turn, ...]], folder: Path) -> tuple[set[str], Multimodal]:
    """Train, save, load, ask: what moved, and what was loaded, whose scores and answers are the same."""
    batch = raw_batch(built, questions)
    moved = two_steps(built, batch)
    built.model.eval()
    save_multimodal(built, folder)
    loaded = load_multimodal(folder)
    with torch.inference_mode():
        ours, theirs = (one.model(batch).logits for one in (built, loaded))
    assert torch.equal(ours, theirs)
    assert answers(built, questions) == answers(loaded, questions)
    return moved, loaded


EVERYTHING = {
    "seen": asked(P0),
    "heard": asked(S0),
    "watched": asked(V0),
    "beside": asked(P0, V1),
    "all": asked(S1, V2, P0, V0),
    "read": asked(),
}


@pytest.mark.row("S4-44", "S4-43", "S4-41", "S2-09")
@pytest.mark.parametrize(
    ("audio", "video_", "inside"),
    [
        (WHISPER, FRAMES, ""),
        (WAV2VEC2, SPACE_TIME, ""),
        (WHISPER, FRAMES | {"cells": "all", "over_time": "mean"}, "video"),
        (WHISPER | {"longer": "windows", "keep": "all"}, SPACE_TIME | {"sampling": "every", "step": 3}, "audio"),
    ],
)
def test_a_model_that_sees_hears_and_watches(
    audio: dict[str, Any], video_: dict[str, Any], inside: str, tiny_folders: dict[str, Path], tmp_path: Path
) -> None:
    connectors = {"image": MLP, "audio": MLP | {"shuffle": 2}, "video": RESAMPLER} | ({inside: GATED} if inside else {})
    encoders = {"image": VIT, "audio": audio, "video": video_}
    built = build(tiny_folders["decoder"], encoders, connectors)
    first = built.model.placeholders["image"]
    assert built.model.placeholders == {"image": first, "audio": first + 1, "video": first + 2}
    moved, loaded = walk(built, EVERYTHING, tmp_path)
    for modality in ("image", "audio", "video"):
        part = "connectors" if modality != inside else "decoder"
        assert any(name.startswith(f"{part}.") for name in moved)
        assert any(name.startswith(f"encoders.{modality}.") for name in moved)
        assert (
            loaded.towers[modality].key
            == json.loads((tmp_path / "plait.json").read_text())["composition"]["towers"][modality]["key"]
        )
    assert loaded.video is not None
    assert built.video is not None
    assert loaded.video.sampling == built.video.sampling


@pytest.mark.row("S4-43")
def test_a_pretrained_video_tower_is_named_and_not_copied(
    videomae: Path, tiny_folders: dict[str, Path], tmp_path: Path
) -> None:
    encoders = {"video": {"kind": "pretrained", "name": str(videomae), "dtype": "float32"}}
    built = build(tiny_folders["decoder"], encoders, {"video": {"kind": "linear"}})
    moved, loaded = walk(built, {"one": asked(V0), "two": asked(V1, V2)}, tmp_path)
    assert not any(name.startswith("encoders.") for name in moved)
    assert not any(name.startswith("encoders.") for name in built.own_state())
    contract = json.loads((tmp_path / "plait.json").read_text())["media"]["video"]
    assert contract["sampling"] == {"policy": "uniform", "frames": 4, "step": 1}
    assert (contract["size"], contract["mean"], contract["tokens"]) == (16, [0.5, 0.4, 0.3], 8)
    assert built.template.turns(asked(V2), prompt=True).slots == (8,)
    assert loaded.video is not None
    assert not loaded.model.encoders["video"].training


@pytest.mark.row("S4-43")
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_of_a_frozen_frame_tower_only_what_learns_is_kept(
    dtype: str, tiny_folders: dict[str, Path], tmp_path: Path
) -> None:
    tower = {"kind": "pretrained", "name": str(tiny_folders["image"]), "dtype": dtype}
    encoders = {"video": FRAMES | {"tower": tower, "position": "learned"}}
    built = build(tiny_folders["decoder"], encoders, {"video": MLP})
    assert built.video is not None
    inner = built.model.encoders["video"].get_submodule("tower")
    assert not inner.training
    assert built.model.encoders["video"].training
    moved, loaded = walk(built, {"one": asked(V0), "two": asked(V1, V2)}, tmp_path)
    assert any(name.startswith("encoders.video.over_time.") for name in moved)
    assert not any(name.startswith("encoders.video.tower.") for name in moved)
    assert kept(built.video).keys() == {
        name for name in built.video.encoder.state_dict() if not name.startswith("tower.")
    }
    record = json.loads((tmp_path / "plait.json").read_text())
    frames = record["composition"]["towers"]["video"]["frames"]
    assert frames["name"] == str(tiny_folders["image"])
    # The folder of that tower may lie elsewhere, with the same weights; other weights are refused.
    moved_to = tmp_path / "elsewhere"
    moved_to.mkdir()
    for path in tiny_folders["image"].iterdir():
        (moved_to / path.name).write_bytes(path.read_bytes())
    frames["name"] = str(moved_to)
    (tmp_path / "plait.json").write_text(json.dumps(record))
    assert load_multimodal(tmp_path).towers["video"].key == loaded.towers["video"].key
    frames["key"] = "0" * 64
    (tmp_path / "plait.json").write_text(json.dumps(record))
    with pytest.raises(CheckpointError, match=r"the image tower has digest .*trained with 0000"):
        load_multimodal(tmp_path)


def test_a_video_takes_the_tokens_of_the_frames_that_are_looked_at(tiny_folders: dict[str, Path]) -> None:
    every = FRAMES | {"sampling": "every", "step": 4, "frames": 3}
    built = build(tiny_folders["decoder"], {"video": every}, {"video": {"kind": "linear"}})
    assert [built.template.turns(asked(ref), prompt=True).slots for ref in (V0, V1, V2)] == [(3,), (2,), (1,)]
    engine_media = encode_pictures(built, lambda ref: BYTES[ref.sha256])
    assert [len(engine_media([ref]).values) for ref in (V0, V1, V2)] == [3, 2, 1]
    unknown = MediaRef(modality="video", sha256="v0", uri="films/v0.mp4")
    with pytest.raises(DataError, match="the length of the video is not known") as refused:
        built.template.turns(asked(unknown), prompt=True)
    assert "films/v0.mp4" in refused.value.place
    always = build(tiny_folders["decoder"], {"video": FRAMES}, {"video": {"kind": "linear"}})
    assert always.template.turns(asked(unknown), prompt=True).slots == (3,)


def test_videos_are_kept_in_shards_and_their_features_in_a_cache(tiny_folders: dict[str, Path], tmp_path: Path) -> None:
    built = build(tiny_folders["decoder"], {"video": FRAMES}, {"video": {"kind": "linear"}})
    tower = built.video
    assert tower is not None
    built.model.eval()
    data = {hashlib.sha256(BYTES[name]).hexdigest(): BYTES[name] for name in ("v0", "v1")}
    refs = [MediaRef(modality="video", sha256=name, uri="") for name in data]
    samples = [(Sample(id=f"q{n}", turns=asked(ref)), data) for n, ref in enumerate(refs)]
    write_shards(tmp_path, "train", samples)
    with ShardReader(tmp_path, "train") as reader:
        stored = [ref for sample in reader for ref in sample.media()]
        assert [ref.uri.split("#")[1] for ref in stored] == ["q0.mp4", "q1.mp4"]
        store = cached_features(
            stored,
            read=reader.media,
            prepare=tower.prepare,
            encoder=tower.encoder,
            key=tower.cache_key,
            folder=tmp_path / "cache",
            events=Events(),
        )
    for name in data:
        with torch.no_grad():
            alone = tower.encoder(read_media(tower, data[name], place="a")).values
        assert torch.allclose(store([name]).values.float(), alone, atol=2e-3)  # cached in 16 bits
    broken = BYTES["s0"]
    ref = MediaRef(modality="video", sha256=hashlib.sha256(broken).hexdigest(), uri="")
    with pytest.raises(MediaError, match="not a video of a known container") as refused:
        write_shards(tmp_path, "other", [(Sample(id="q7", turns=asked(ref)), {ref.sha256: broken})])
    assert "q7" in refused.value.place


def test_a_frame_tower_that_learned_elsewhere_is_kept_with_the_model(
    tiny_folders: dict[str, Path], tmp_path: Path
) -> None:
    torch.manual_seed(0)
    inner = scratch_tower(ViT(size=16, patch=8, d=16, depth=1, heads=2), dtype="float32")
    spec = FramesThenTime(frames=2, depth=1, heads=2)
    tower = scratch_video_tower(spec, frame_tower=inner)
    assert {name.split(".")[0] for name in kept(tower)} == {"tower", "over_time"}
    connectors = Connectors(video=Linear())
    decoder = NewDecoder(d=32, depth=1, heads=4, context=256, tokenizer=str(tiny_folders["decoder"]))
    language = language_of(decoder, dtype="float32")
    built = build_multimodal({"video": tower}, language, connectors, decoder=decoder, whole=True)
    walk(built, {"one": asked(V0)}, tmp_path)


def test_the_order_of_frames_matters(tiny_folders: dict[str, Path]) -> None:
    built = build(tiny_folders["decoder"], {"video": FRAMES}, {"video": MLP})
    tower = built.video
    assert tower is not None
    clip = read_media(tower, BYTES["v0"], place="v0")
    backwards = clip.values.view(3, -1, 3).flip(0).reshape(-1, 3)
    with torch.no_grad():
        forth, back = (tower.encoder(type(clip)(values=v, grid=clip.grid)).values for v in (clip.values, backwards))
    assert not torch.allclose(forth, back.flip(0), atol=1e-4)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda r: r["media"]["video"]["sampling"].update(policy="every"), "the media contract is"),
        (lambda r: r["media"]["video"].update(mean=[0.5, 0.5, 0.4]), "the media contract is"),
        (lambda r: r["media"]["audio"].update(rate=8_000), "the media contract is"),
        (lambda r: r["composition"]["towers"]["audio"].update(key="x"), "audio tower has digest"),
        (lambda r: r["composition"]["towers"]["video"]["scratch"].update(depth=2), "do not fit"),
        (lambda r: r["composition"]["towers"]["video"]["scratch"].update(frames=5), "video tower has digest"),
        (lambda r: r["composition"]["towers"]["audio"]["scratch"].update(kind="foo"), "the audio tower's spec"),
        (lambda r: r["composition"]["towers"]["video"].pop("scratch"), "settings cannot be read"),
    ],
)
def test_a_record_that_was_changed_is_refused(
    change: Callable[[Any], Any], said: str, tiny_folders: dict[str, Path], tmp_path: Path
) -> None:
    built = build(tiny_folders["decoder"], {"audio": WHISPER, "video": FRAMES}, {"audio": MLP, "video": MLP})
    save_multimodal(built, tmp_path)
    record = json.loads((tmp_path / "plait.json").read_text(encoding="utf-8"))
    change(record)
    (tmp_path / "plait.json").write_text(json.dumps(record), encoding="utf-8")
    with pytest.raises(CheckpointError, match=said):
        load_multimodal(tmp_path)


def test_towers_are_told_apart_by_their_weights(tiny_folders: dict[str, Path], tmp_path: Path) -> None:
    keys: dict[str, set[str]] = {"audio": set(), "video": set()}
    for seed in (0, 1, 0):
        folder = tmp_path / f"{len(list(tmp_path.iterdir()))}"
        folder.mkdir()
        built = build(
            tiny_folders["decoder"], {"audio": WAV2VEC2, "video": SPACE_TIME}, {"audio": MLP, "video": MLP}, seed
        )
        save_multimodal(built, folder)
        for modality, tower in load_multimodal(folder).towers.items():
            keys[modality].add(tower.cache_key)
    assert {modality: len(found) for modality, found in keys.items()} == {"audio": 2, "video": 2}


def test_video_features_are_kept_apart_by_the_versions_of_libraries(monkeypatch: pytest.MonkeyPatch) -> None:
    tower = scratch_video_tower(SpaceTime.model_validate(SPACE_TIME))
    versions = {"torch": "2.13.0", "pillow": "12.1.0"}

    def version(name: str) -> str:
        if name not in versions:
            raise video_towers.metadata.PackageNotFoundError(name)
        return versions[name]

    monkeypatch.setattr(video_towers.metadata, "version", version)
    keys: list[str] = []
    for changed in ({}, {"av": "18.0.0"}, {"av": "18.0.1"}, {"av": "18.1.0"}, {"pillow": "12.2.0"}):
        versions |= changed
        keys.append(tower.cache_key)
    assert keys[1] == keys[2], "a patch release changes no bits"
    assert len(set(keys)) == 4


def test_an_output_layer_for_ctc_and_masked_frames_do_not_learn(tiny_folders: dict[str, Path]) -> None:
    built = build(tiny_folders["decoder"], {"audio": WAV2VEC2}, {"audio": MLP})
    still = {name for name, weight in built.towers["audio"].encoder.named_parameters() if not weight.requires_grad}
    assert still == {"head.weight", "head.bias", "mask_token"}


@pytest.mark.parametrize(
    ("ref", "data", "said", "remedy"),
    [
        (V0, b"", r"the video is empty \(0 bytes\)", "replace"),
        (V0, BYTES["v0"][:-9], "cut off: 9 bytes", "copy"),
        (V0, sound_only(), "no video stream, only audio", "moving pictures"),
        (V0, BYTES["s0"], "not a video of a known container", "ffmpeg"),
        (
            S0,
            encode_wav(np.zeros(4_000, np.float32), 8_000),
            "8,000 samples a second, the tower takes 16,000",
            "-ar 16000",
        ),
        (S0, encode_wav(np.zeros(17_000, np.float32), RATE), "17000 samples, expected 1 to 16000", "cut it"),
        (S0, BYTES["v0"], "not a sound of a known format", "WAV"),
    ],
)
def test_media_that_cannot_be_read_are_named(
    ref: MediaRef, data: bytes, said: str, remedy: str, tiny_folders: dict[str, Path]
) -> None:
    built = build(tiny_folders["decoder"], {"audio": WHISPER, "video": FRAMES}, {"audio": MLP, "video": MLP})
    built.model.eval()
    engine = build_engine(built, encode_pictures(built, lambda _: data))
    with pytest.raises((DataError, MediaError), match=said) as refused:
        engine([Request(id="a", turns=asked(ref), max_new_tokens=1)])
    assert ref.uri in refused.value.place
    assert remedy in refused.value.remedy


def test_a_sound_that_is_too_long_by_its_reference_is_named(tiny_folders: dict[str, Path]) -> None:
    built = build(tiny_folders["decoder"], {"audio": WHISPER}, {"audio": MLP})
    for length, said in ((0, "length of the sound is not known"), (20_000, "20000 samples, expected 1 to 16000")):
        ref = MediaRef(modality="audio", sha256="s9", uri="long.wav", length=length)
        with pytest.raises(DataError, match=said) as refused:
            built.template.turns(asked(ref), prompt=True)
        assert "long.wav" in refused.value.place


@pytest.mark.parametrize(
    ("encoders", "connectors", "said"),
    [
        ({"video": FRAMES}, {"image": MLP}, "encoders for video and connectors for image"),
        ({"audio": WHISPER, "video": FRAMES}, {"audio": GATED, "video": GATED}, "audio and video are both read inside"),
        ({"video": SPACE_TIME | {"position": "sequence", "sampling": "every"}}, {"video": MLP}, "made for 4 frames"),
        ({"video": SPACE_TIME | {"position": "learned", "sampling": "every"}}, {"video": MLP}, "position is learned"),
        (
            {"video": FRAMES | {"tower": {"kind": "pretrained", "fit": {"kind": "native"}}}},
            {"video": MLP},
            "frames are fitted into squares",
        ),
    ],
)
def test_settings_that_make_no_model_are_refused(
    encoders: dict[str, Any], connectors: dict[str, Any], said: str, tmp_path: Path
) -> None:
    with pytest.raises(ValidationError, match=said):
        Composition.model_validate(settings(tmp_path, encoders, connectors))


def test_a_folder_that_is_none_is_said(tiny_folders: dict[str, Path]) -> None:
    with pytest.raises(ConfigError, match=r"no folder with a config\.json"):
        build(tiny_folders["decoder"], {"video": {"kind": "pretrained", "name": "none"}}, {"video": MLP})


def test_sounds_need_not_say_that_their_tower_is_pretrained() -> None:
    found = Composition.model_validate(
        {"encoders": {"audio": {"name": "whisper-tiny-en"}}, "connectors": {"audio": {"kind": "linear"}}}
    )
    assert found.encoders.audio is not None
    assert found.encoders.audio.kind == "pretrained"
