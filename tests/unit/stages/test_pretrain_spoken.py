"""Names said aloud in the pretrain stage: a third modality of the space, scored in all six directions."""

from __future__ import annotations

import json
from itertools import permutations
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from pydantic import ValidationError
from tests.tiny_towers import TinyTowers

from plait.assembly.dual import load_dual
from plait.cli.main import main as plait
from plait.core.errors import CheckpointError, ConfigError, DataError
from plait.core.estimate import Machine
from plait.core.events import Event, Events
from plait.core.files import read_json, read_jsonl
from plait.data.sounds import decode_sound
from plait.data.speech import encode_wav, speak
from plait.data.spoken import Saying
from plait.stages.pretrain import Pretrain, SpokenNames

MACHINE = Machine(cores=2, memory_bytes=2**33, disk_bytes=2**35, gemm_fp32=1e11, gemm_bf16=1e11, measured=True)
VIT = {"kind": "vit", "size": 16, "patch": 8, "d": 16, "depth": 1, "heads": 2}
WAYS = tuple(f"{one}-to-{other}" for one, other in permutations(("image", "text", "audio"), 2))


class Killed(BaseException):
    """What no handler expects, as little as kill -9."""


@pytest.fixture
def hears(tmp_path: Path) -> str:
    return str(TinyTowers(tmp_path).folder("wav2vec2"))


@pytest.fixture
def settings(tiny_folders: dict[str, Path], hears: str) -> dict[str, Any]:
    return {
        "image_tower": VIT,
        "text_tower": str(tiny_folders["text"]),
        "spoken": {"audio_tower": hears, "takes": 2},
        "max_tokens": 16,
        "steps": 4,
        "batch_size": 8,
        "d_hidden": 8,
        "d_shared": 4,
        "save_every": 2,
        "seed": 3,
    }


def pretrain(data: Path, folder: Path, settings: dict[str, Any], *, stop: str = "", **changes: Any) -> list[str]:
    said: list[str] = []

    def listener(event: Event) -> None:
        said.append(event.text)
        if stop and event.text.startswith(stop):
            raise Killed

    folder.mkdir(exist_ok=True)
    Pretrain.model_validate(settings | changes).run(data, folder, events=Events(listeners=(listener,)))
    return said


@pytest.mark.row("S3-11")
def test_pictures_texts_and_sounds_find_each_other_and_a_kill_changes_nothing(
    data_stage: Path, tmp_path: Path, settings: dict[str, Any], capsys: pytest.CaptureFixture[str]
) -> None:
    whole, stopped = tmp_path / "whole", tmp_path / "stopped"
    said = pretrain(data_stage, whole, settings)
    assert any(text.startswith("48 of 48 names said aloud: 84 sounds of ") for text in said)  # 36 twice, 12 once
    (told,) = [text for text in said if "a name said aloud finds its picture first" in text]
    assert told.count("chance 8.33%") == 3  # 1 of 12, of pictures, and of sounds both ways
    scores = {score["name"]: score for score in read_json(whole / "scores.json")}
    for way in WAYS:
        found, chance = (scores[f"retrieval/test-concept/{way}/R@1{end}"] for end in ("", "/chance"))
        assert found["n"] == 12
        assert chance["value"] == pytest.approx(1 / 12)
    for pair in ("", "image-audio/", "text-audio/"):
        assert {f"space/test-concept/{pair}{measure}" for measure in ("alignment", "modality-gap")} <= scores.keys()
    steps = read_jsonl(whole / "metrics.jsonl")
    terms = ("contrastive", "contrastive-image-audio", "contrastive-text-audio")
    assert all(step["loss"] == pytest.approx(sum(step[f"loss/{term}"] for term in terms)) for step in steps)
    with pytest.raises(Killed):
        pretrain(data_stage, stopped, settings, stop="checkpoint 000002 saved")
    pretrain(data_stage, stopped, settings)
    for name in ("scores.json", "predictions.jsonl", "checkpoints/000004/model.safetensors"):
        assert (stopped / name).read_bytes() == (whole / name).read_bytes(), name

    sound = tmp_path / "red.wav"
    sound.write_bytes(speak("red", voice="en-us", speed=160))
    model = whole / "checkpoints" / "000004"
    dual = load_dual(model)
    expected = dual.embed_sounds([decode_sound(sound.read_bytes(), place="red.wav")]) @ dual.embed_texts(["red", "b"]).T
    capsys.readouterr()
    words = ["embed", str(model), "--sound", str(sound), str(tmp_path / "none.wav"), "--text", "red", "b", "--json"]
    assert plait(words) == 4
    found = json.loads(capsys.readouterr().out)
    assert found["sounds"] == [str(sound)]
    torch.testing.assert_close(torch.tensor(found["cosines"]["text-audio"]), expected.T)


def test_a_model_that_does_not_hear_and_another_tower_are_refused(
    data_stage: Path, tmp_path: Path, settings: dict[str, Any]
) -> None:
    deaf, hearing = tmp_path / "deaf", tmp_path / "hearing"
    pretrain(data_stage, deaf, settings, spoken=None)
    sound = decode_sound(speak("red", voice="en-us", speed=160), place="red.wav")
    with pytest.raises(DataError, match="does not hear"):
        load_dual(deaf / "checkpoints" / "000004").embed_sounds([sound])
    pretrain(data_stage, hearing, settings)
    record = hearing / "checkpoints" / "000004" / "plait.json"
    plain = json.loads(record.read_text())
    plain["composition"]["audio"]["key"] = "0" * 64
    record.write_text(json.dumps(plain))
    (record.parent / "manifest.json").unlink()  # the change is on purpose
    with pytest.raises(CheckpointError, match="the audio tower"):
        load_dual(record.parent)


def test_what_cannot_be_said_is_counted_and_takes_part_without_a_sound(
    tmp_path: Path, settings: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    from PIL import Image

    from plait.stages.data import Data, PairsSource

    monkeypatch.setenv("PLAIT_HOME", str(tmp_path / "home"))
    own, data = tmp_path / "own", tmp_path / "01-data"
    for path in (own, data):
        path.mkdir()
    names = [f"cat {number}" if number % 3 else f"红色{number}" for number in range(24)]
    for number in range(24):
        noise = np.random.default_rng(number).integers(0, 256, (32, 32, 3), dtype=np.uint8)
        Image.fromarray(noise).save(own / f"{number}.png")
    lines = [f"{number}.png,{name}" for number, name in enumerate(names)]
    (own / "pairs.csv").write_text("\n".join(["image,text", *lines]) + "\n")
    Data(source=PairsSource(path=own / "pairs.csv", test_fraction=0.3)).run(None, data, events=Events())
    said = pretrain(data, tmp_path / "run", settings)
    assert any("16 of 24 names said aloud" in text and "8 because a letter is not Latin" in text for text in said)
    scores = {score["name"]: score for score in read_json(tmp_path / "run" / "scores.json")}
    heard = scores["retrieval/test-concept/audio-to-image/R@1"]["n"]
    assert 0 < heard < scores["retrieval/test-concept/image-to-text/R@1"]["n"]
    assert scores["retrieval/test-concept/image-to-audio/R@1"]["n"] == heard
    none = tmp_path / "none.csv"
    none.write_text("\n".join(["image,text", *(f"own/{n}.png,红{n}" for n in range(24))]) + "\n")
    (tmp_path / "02-data").mkdir()
    Data(source=PairsSource(path=none, test_fraction=0.3)).run(None, tmp_path / "02-data", events=Events())
    with pytest.raises(DataError, match="no name can be said") as caught:
        pretrain(tmp_path / "02-data", tmp_path / "never", settings)
    assert caught.value.place == "stages.pretrain.spoken"


def test_takes_differ_and_test_voices_are_others() -> None:
    spoken = SpokenNames()
    saying = Saying(**spoken.model_dump(exclude={"audio_tower", "window_s"}), seed=0)
    takes = saying.takes_of("red apple", trained=True)
    assert len(set(takes)) == spoken.takes
    assert {voice for voice, _ in takes} <= {*spoken.voices}
    ((voice, _),) = saying.takes_of("red apple", trained=False)
    assert voice in spoken.test_voices
    assert saying.takes_of("red apple", trained=True) == takes


def test_settings_that_contradict_each_other_are_refused() -> None:
    for given, says in (
        ({"spoken": {"window_s": 2.0}}, "raise window_s"),
        ({"spoken": {"takes": 16}}, "5 voices at 3 speeds are 15"),
        ({"spoken": {"test_voices": ["en"]}}, "must not be trained on: en"),
        ({"spoken": {}, "qformer": {}}, "here a Q-Former learns"),
    ):
        with pytest.raises(ValidationError, match=says):
            Pretrain.model_validate(given)


def test_the_packaged_tower_hears_short_windows_and_others_their_own(hears: str) -> None:
    assert SpokenNames().window_s == 4.0
    assert SpokenNames(audio_tower=hears).window_s == 0.0
    assert SpokenNames(window_s=10.0).window_s == 10.0


@pytest.mark.parametrize("change", [{}, {"window_s": 5.0}, {"rate": 48_000}])
def test_what_a_tower_cannot_hear_is_seen_before_anything_runs(
    change: dict[str, Any], hears: str, settings: dict[str, Any]
) -> None:
    if "rate" in change:
        path = Path(hears) / "preprocessor_config.json"
        path.write_text(json.dumps(json.loads(path.read_text()) | {"sampling_rate": change["rate"]}))
    window = {key: value for key, value in change.items() if key != "rate"}
    stage = Pretrain.model_validate(settings | {"spoken": settings["spoken"] | window})
    if not change:
        stage.check(MACHINE)
        return
    says = "48,000 samples a second" if "rate" in change else "hears sounds of any length"
    with pytest.raises(ConfigError, match=says):
        stage.check(MACHINE)


def test_takes_that_are_too_long_leave_the_others(data_stage: Path, tmp_path: Path, settings: dict[str, Any]) -> None:
    lengths = [len(decode_sound(speak("red apple", voice="en", speed=speed), place="").samples) for speed in (80, 450)]
    most = sum(lengths) / 2 / 16_000
    spoken = settings["spoken"] | {"voices": ["en"], "speeds": [80, 450], "max_seconds": round(most, 3)}
    said = pretrain(data_stage, tmp_path / "run", settings | {"spoken": spoken})
    (told,) = [text for text in said if "names said aloud" in text]
    assert "further takes are left out, because they take too long" in told


def test_a_sound_of_another_rate_is_left_out_alone(
    data_stage: Path, tmp_path: Path, settings: dict[str, Any], capsys: pytest.CaptureFixture[str]
) -> None:
    pretrain(data_stage, tmp_path / "run", settings)
    good, other = tmp_path / "good.wav", tmp_path / "other.wav"
    good.write_bytes(speak("red", voice="en-us", speed=160))
    other.write_bytes(encode_wav(np.zeros(4000, np.int16), 44_100))
    capsys.readouterr()
    model = str(tmp_path / "run" / "checkpoints" / "000004")
    assert plait(["embed", model, "--sound", str(good), str(other), "--text", "red", "--json"]) == 4
    found = json.loads(capsys.readouterr().out)
    assert found["sounds"] == [str(good)]
    assert "44,100 samples a second" in found["refused"][0]["cause"]
