"""``plait chat`` about sounds and videos, alone and beside pictures."""

from __future__ import annotations

import io
import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from tests.tiny_videos import video

from plait.assembly.compose import compose
from plait.assembly.multimodal import Multimodal, load_multimodal, save_multimodal
from plait.cli.chat import Desk
from plait.cli.main import main as plait
from plait.core.errors import DataError
from plait.core.types import MediaRef, Request, Text, Turn
from plait.data.speech import encode_wav
from plait.inference.build import build_engine, encode_pictures
from plait.inference.converse import Attachments, Conversation, Decoding
from plait.models.composition import Composition

VIT: dict[str, Any] = {"kind": "vit", "size": 16, "patch": 8, "d": 16, "depth": 1, "heads": 2}
WHISPER = {"kind": "whisper", "d": 16, "depth": 1, "heads": 2, "mels": 8, "tokens": 50}
FRAMES = {"kind": "frames", "tower": VIT, "frames": 3, "depth": 1, "heads": 2}

Run = Callable[..., tuple[int, str, str]]


@pytest.fixture
def files(tmp_path: Path) -> dict[str, Path]:
    """A picture, a sound and a video, and some that are none."""
    Image.effect_noise((30, 20), 50).convert("RGB").save(tmp_path / "a.png")
    tone = (0.3 * np.sin(np.arange(6_000) * 0.05)).astype(np.float32)
    made = {"a.wav": encode_wav(tone, 16_000), "slow.wav": encode_wav(tone, 8_000), "a.mp4": video(9)}
    made |= {"cut.mp4": video(9)[:-20], "b.mp4": video(5, seed=1)}
    for name, data in made.items():
        (tmp_path / name).write_bytes(data)
    return {name: tmp_path / name for name in ("a.png", *made)}


@pytest.fixture
def model(tiny_folders: dict[str, Path], tmp_path: Path) -> Path:
    given = {
        "encoders": {"image": VIT, "audio": WHISPER, "video": FRAMES},
        "connectors": {name: {"kind": "linear"} for name in ("image", "audio", "video")},
        "decoder": {"kind": "new", "d": 32, "depth": 1, "heads": 4, "context": 256}
        | {"tokenizer": str(tiny_folders["decoder"])},
    }
    torch.manual_seed(0)
    (tmp_path / "model").mkdir()
    save_multimodal(compose(Composition.model_validate(given)), tmp_path / "model")
    return tmp_path / "model"


@pytest.fixture
def run(model: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Run:
    def run(*words: object, lines: str = "", name: object = model) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "stdin", io.StringIO(lines))
        code = plait(["chat", str(name), "--max-tokens", "4", *map(str, words)])
        return code, *capsys.readouterr()

    return run


def expected(built: Multimodal, files: dict[str, Path], *names: str) -> str:
    """What the engine says about these files."""
    kinds = {".png": "image", ".wav": "audio", ".mp4": "video"}
    sizes = {"a.png": {"width": 30, "height": 20}, "a.wav": {"length": 6_000}, "a.mp4": {"length": 9}}
    sizes["b.mp4"] = {"length": 5}
    refs = [MediaRef(modality=kinds[Path(n).suffix], sha256=n, uri=n, **sizes[n]) for n in names]  # pyright: ignore[reportArgumentType]
    engine = build_engine(built, encode_pictures(built, lambda ref: files[ref.uri].read_bytes()))
    turn = Turn(role="user", parts=(*refs, Text(text="what?")))
    return engine([Request(id="r", turns=(turn,), max_new_tokens=4)])[0].text


def test_a_video_a_sound_and_a_picture_beside_a_video(run: Run, model: Path, files: dict[str, Path]) -> None:
    built = load_multimodal(model)
    for names in (("a.mp4",), ("a.wav",), ("a.png", "a.mp4"), ("a.png", "a.wav", "a.mp4")):
        options = [
            word
            for name in names
            for word in ({".png": "--image", ".wav": "--sound", ".mp4": "--video"}[Path(name).suffix], files[name])
        ]
        code, out, err = run(*options, "--prompt", "what?")
        assert (code, out) == (0, expected(built, files, *names) + "\n")
        assert "no picture" not in err
        assert ("of 9 frames of the video will be looked at" in err) == ("a.mp4" in names)
        kinds = {".png": "image", ".wav": "sound", ".mp4": "video"}
        lines = [f"/{kinds[Path(name).suffix]} {files[name]}" for name in names]
        assert run(lines="\n".join([*lines, "what?"]))[1] == out
    code, out, _ = run(lines=f"/video {files['a.mp4']}\n/video {files['b.mp4']}\nwhat?\n")
    assert out == expected(built, files, "b.mp4") + "\n"


@pytest.mark.parametrize(
    ("line", "said", "code"),
    [
        ("/video {cut.mp4}", "the MP4 video is cut off: 20 bytes are missing", 4),
        ("/video {a.wav}", "not a video of a known container", 4),
        ("/video {a.png}.none", "cannot find the file", 4),
        ("/sound {a.mp4}", "not a sound of a known format", 4),
        ("/sound {slow.wav}\nwhat?", "8,000 samples a second, the tower takes 16,000", 4),
        ("/movie {a.mp4}", "/sound PATH, /video PATH", 2),
    ],
)
def test_media_that_cannot_be_read_are_named(line: str, said: str, code: int, run: Run, files: dict[str, Path]) -> None:
    for name, path in files.items():
        line = line.replace(f"{{{name}}}", str(path))
    found, _, err = run(lines=line + "\n")
    assert found == code
    assert said in err
    assert line.split()[1] in err
    assert "fix:" in err


def test_a_model_that_does_not_watch_says_so_at_once(
    run: Run, files: dict[str, Path], tiny_model: Multimodal, tmp_path: Path
) -> None:
    (tmp_path / "blind").mkdir()
    save_multimodal(tiny_model, tmp_path / "blind")
    code, _, err = run(lines=f"/video {files['a.mp4']}\n", name=tmp_path / "blind")
    assert code == 4
    assert "a turn holds video, this model reads image" in err
    code, out, _ = run("--video", files["a.mp4"], "--prompt", "what?", "--json", name=tmp_path / "blind")
    assert code == 4
    assert "this model reads image" in json.loads(out)["error"]["cause"]


def test_what_the_model_refuses_is_not_kept_for_the_questions_after_it(
    model: Path, files: dict[str, Path], tiny_model: Multimodal, capsys: pytest.CaptureFixture[str]
) -> None:
    def desk(built: Multimodal) -> Desk:
        shown = Attachments()
        engine = build_engine(built, encode_pictures(built, shown.read))
        talk = Conversation(engine=engine, decoding=Decoding(max_new_tokens=2))
        return Desk(conversation=talk, pictures=shown, root=None)

    hearing, seeing = desk(load_multimodal(model)), desk(tiny_model)
    hearing.show(str(files["a.wav"]), "audio")
    with pytest.raises(DataError, match="8,000 samples a second") as caught:
        hearing.show(str(files["slow.wav"]), "audio")
    assert "slow.wav" in caught.value.place
    with pytest.raises(DataError, match="this model reads image"):
        seeing.show(str(files["a.wav"]), "audio")
    assert [ref.uri for ref in hearing.conversation.pictures] == [str(files["a.wav"])]
    assert seeing.conversation.pictures == []
    for one in (hearing, seeing):
        assert one.answer("what?", show=False)["finish"] in ("stop", "length")
    capsys.readouterr()
