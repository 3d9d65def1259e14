"""``plait chat`` and ``plait serve`` on folders of Hugging Face's: the answers are those of ``generate``."""

from __future__ import annotations

import asyncio
import base64
import io
import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest
from PIL import Image
from transformers import AutoModelForImageTextToText

from plait.assembly.vlm import Vlm, load_processor
from plait.cli.main import main as plait
from plait.core.errors import CheckpointError, DataError
from plait.core.types import MediaRef, Request, Text, Turn
from plait.inference.load import find_model_folder, load
from plait.inference.wrapped import engine_for
from plait.serving.app import create_app

TALKING = ("llava", "smolvlm", "qwen2_5_vl", "internvl", "llava_onevision", "gemma3")
ONE_QUESTION = ("paligemma", "blip-2")
KEY = "0123456789abcdef-KEY"


def png(width: int = 50, height: int = 40, seed: int = 0) -> bytes:
    out = io.BytesIO()
    Image.fromarray(np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)).save(out, "PNG")
    return out.getvalue()


def generated(folder: Path, question: str, *pictures: bytes, tokens: int = 8) -> str:
    """What transformers itself answers."""
    vlm = load(folder, say=print)
    assert isinstance(vlm, Vlm)
    content = [*({"type": "image"} for _ in pictures), {"type": "text", "text": question}]
    processor = load_processor(folder)
    text = vlm.reader.compose([{"role": "user", "content": content}], True)
    images = [Image.open(io.BytesIO(data)).convert("RGB") for data in pictures]
    inputs = processor(text=text, images=[images] if images else None, return_tensors="pt")
    auto: Any = AutoModelForImageTextToText
    model = auto.from_pretrained(folder).eval()
    out = model.generate(**inputs, max_new_tokens=tokens, do_sample=False, eos_token_id=vlm.stop)
    return processor.tokenizer.decode(out[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True)


@pytest.fixture
def chat(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Callable[..., tuple[int, str, str]]:
    def run(folder: Path, *words: object, lines: str = "") -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "stdin", io.StringIO(lines))
        code = plait(["chat", str(folder), "--max-tokens", "8", *map(str, words)])
        out, err = capsys.readouterr()
        return code, out, err

    return run


@pytest.mark.parametrize("name", TALKING)
def test_chat_answers_as_generate_does(name: str, vlm_folder: Any, chat: Any, tmp_path: Path) -> None:
    (tmp_path / "a.png").write_bytes(png())
    folder = vlm_folder(name)
    wanted = generated(folder, "what is in the picture?", png())
    code, out, err = chat(folder, "--image", tmp_path / "a.png", "--prompt", "what is in the picture?", "--json")
    assert code == 0, err
    assert json.loads(out)["answer"] == wanted
    assert json.loads(out)["image_tokens"] > 0


def test_a_conversation_goes_on_and_needs_no_picture(vlm_folder: Any, chat: Any, tmp_path: Path) -> None:
    (tmp_path / "a.png").write_bytes(png())
    folder = vlm_folder("qwen2_vl")
    code, out, err = chat(folder, "--json", lines=f"how many cats?\n/image {tmp_path / 'a.png'}\nand here?\n/quit\n")
    assert code == 0, err
    first, second = json.loads(out)
    assert first["answer"] == generated(folder, "how many cats?")
    assert (first["image_tokens"], second["prompt_tokens"] > first["prompt_tokens"]) == (0, True)
    assert second["image_tokens"] > 0


@pytest.mark.parametrize("name", ONE_QUESTION)
def test_families_without_a_chat_template_answer_one_question_and_say_so(
    name: str, vlm_folder: Any, chat: Any, tmp_path: Path
) -> None:
    (tmp_path / "a.png").write_bytes(png())
    folder = vlm_folder(name)
    code, out, err = chat(folder, "--image", tmp_path / "a.png", "--prompt", "a cat", "--json")
    assert code == 0, err
    assert json.loads(out)["image_tokens"] == (16 if name == "paligemma" else 4)
    twice = ("--image", tmp_path / "a.png") * 2
    code, out, err = chat(folder, *twice, "--prompt", "a cat", "--json")
    assert (code, json.loads(out)["image_tokens"]) == (0, 32 if name == "paligemma" else 8), err
    code, _, err = chat(folder, lines="a cat\na dog\n")
    assert code == 4
    assert "has no chat template and takes one question: roles user, assistant, user" in err


def test_several_pictures_of_one_question_are_prepared_as_several(vlm_folder: Any, tmp_path: Path) -> None:
    folder = vlm_folder("llava_onevision")
    data = [png(seed=0), png(90, 30, seed=1)]
    refs = [
        MediaRef(modality="image", sha256=str(n), uri=f"{n}.png", width=size[0], height=size[1])
        for n, size in enumerate([(50, 40), (90, 30)])
    ]
    engine = engine_for(load(folder, say=print), lambda ref: data[int(ref.sha256)])
    turn = Turn(role="user", parts=(*refs, Text(text="which?")))
    alone = Turn(role="user", parts=(refs[0], Text(text="which?")))
    both, one = engine([Request(id=f"{n}", turns=(t,), max_new_tokens=6) for n, t in enumerate((turn, alone))])
    assert both.text == generated(folder, "which?", *data, tokens=6)
    assert one.text == generated(folder, "which?", data[0], tokens=6)
    assert both.image_tokens == 2 * (16 + 1) != one.image_tokens  # each one square, with the end of its picture


def post(app: Any, body: Any) -> httpx.Response:
    async def send() -> httpx.Response:
        headers = {"Authorization": f"Bearer {KEY}"}
        transport = httpx.ASGITransport(app)
        async with httpx.AsyncClient(transport=transport, base_url="http://127.0.0.1", headers=headers) as client:
            return await client.post("/v1/chat/completions", content=json.dumps(body).encode())

    return asyncio.run(send())


def asked(text: str, *pictures: bytes, **fields: Any) -> dict[str, Any]:
    parts: list[Any] = [
        {"type": "image_url", "image_url": {"url": f"data:image/png;base64,{base64.b64encode(data).decode()}"}}
        for data in pictures
    ]
    content = [*parts, {"type": "text", "text": text}]
    return {"model": "tiny", "messages": [{"role": "user", "content": content}], "max_tokens": 8, **fields}


@pytest.mark.parametrize("name", ["llava", "qwen3_vl"])
def test_the_server_answers_as_generate_does_whole_and_streamed(name: str, vlm_folder: Any) -> None:
    folder = vlm_folder(name)
    app = create_app(load(folder, say=print), name="tiny", key=KEY)
    wanted = generated(folder, "what is in the picture?", png())
    answer = post(app, asked("what is in the picture?", png()))
    assert answer.status_code == 200
    assert answer.json()["choices"][0]["message"]["content"] == wanted
    lines = post(app, asked("what is in the picture?", png(), stream=True)).text.split("\n\n")
    events = [json.loads(line.removeprefix("data: ")) for line in lines[:-2]]
    assert "".join(event["choices"][0]["delta"].get("content", "") for event in events) == wanted


def test_the_server_refuses_what_the_model_lacks(vlm_folder: Any) -> None:
    app = create_app(load(vlm_folder("paligemma"), say=print), name="tiny", key=KEY)
    body = asked("a cat", png())
    body["messages"].insert(0, {"role": "system", "content": "be short"})
    answer = post(app, body)
    assert answer.status_code == 400
    assert "PaliGemma has no chat template and takes one question: roles system, user" in answer.text
    assert post(app, asked("a cat", png())).status_code == 200


def test_folders_that_are_no_such_model_say_what_they_are(
    tiny_folders: dict[str, Path], chat: Any, vlm_folder: Any, tmp_path: Path
) -> None:
    assert find_model_folder(str(vlm_folder("llava"))) == vlm_folder("llava").resolve()
    with pytest.raises(CheckpointError, match="model_type is 'llama', which is no vision-language model"):
        load(tiny_folders["decoder"], say=print)
    code, _, err = chat(tiny_folders["decoder"], "--prompt", "a")
    assert (code, "use a folder of one of: llava" in err) == (7, True)
    engine = engine_for(load(vlm_folder("llava"), say=print), lambda _: b"")
    ref = MediaRef(modality="audio", sha256="0", uri="a.wav")
    with pytest.raises(DataError, match="reads pictures, came audio"):
        engine([Request(id="r", turns=(Turn(role="user", parts=(ref, Text(text="a"))),), max_new_tokens=2)])
