"""The server answers as ``plait chat`` does, whole or streamed, and refuses in OpenAI's shape."""

from __future__ import annotations

import asyncio
import base64
import io
import json
import struct
from collections.abc import Awaitable, Callable
from typing import Any

import httpx
import numpy as np
import pytest
from PIL import Image

from plait.core.errors import NumericsError
from plait.core.types import MediaRef, Text, Turn
from plait.inference.build import build_engine, encode_pictures
from plait.inference.converse import Attachments, Conversation, Decoding, next_piece
from plait.inference.engine import Engine
from plait.serving.app import create_app

KEY = "0123456789abcdef-KEY"
CHAT = "/v1/chat/completions"


def png(seed: int = 0) -> bytes:
    out = io.BytesIO()
    Image.fromarray(np.random.default_rng(seed).integers(0, 256, (20, 30, 3), dtype=np.uint8)).save(out, "PNG")
    return out.getvalue()


def huge() -> bytes:
    """A small GIF that claims 60,000 x 60,000 pixels."""
    out = io.BytesIO()
    Image.new("P", (4, 4)).save(out, "GIF")
    data = bytearray(out.getvalue())
    data[6:10] = struct.pack("<2H", 60_000, 60_000)
    return bytes(data)


def picture(data: bytes) -> dict[str, Any]:
    return {"type": "image_url", "image_url": {"url": f"data:image/png;base64,{base64.b64encode(data).decode()}"}}


def asked(*parts: Any, **fields: Any) -> dict[str, Any]:
    content = parts[0] if len(parts) == 1 and isinstance(parts[0], str) else list(parts)
    return {"model": "tiny", "messages": [{"role": "user", "content": content}], "max_tokens": 12, **fields}


@pytest.fixture
def app(tiny_model):
    return create_app(tiny_model, name="tiny", key=KEY)


def talk(app: Any, use: Callable[[httpx.AsyncClient], Awaitable[Any]], *, key: str = KEY) -> Any:
    async def main() -> Any:
        transport = httpx.ASGITransport(app)
        headers = {"Authorization": f"Bearer {key}"}
        async with httpx.AsyncClient(transport=transport, base_url="http://127.0.0.1", headers=headers) as client:
            return await use(client)

    return asyncio.run(main())


def post(app: Any, body: Any) -> httpx.Response:
    content = body if isinstance(body, bytes) else json.dumps(body).encode()
    return talk(app, lambda client: client.post(CHAT, content=content))


def events(response: httpx.Response) -> list[Any]:
    lines = response.text.split("\n\n")
    assert lines[-2:] == ["data: [DONE]", ""]
    return [json.loads(line.removeprefix("data: ")) for line in lines[:-2]]


def chat(tiny_model: Any, question: str, *images: bytes) -> tuple[str, Any]:
    """What ``plait chat`` says."""
    pictures = Attachments()
    engine = build_engine(tiny_model, encode_pictures(tiny_model, pictures.read))
    conversation = Conversation(engine=engine, decoding=Decoding(max_new_tokens=12))
    conversation.pictures = [pictures.add(data, place="a.png")[0] for data in images]
    pieces, said = conversation.ask(question), ""
    while isinstance(piece := next_piece(pieces), str):
        said += piece
    return said, piece


@pytest.mark.row("S4-117")
@pytest.mark.row("S4-226")
@pytest.mark.parametrize("images", [(), (png(1),), (png(1), png(2))])
def test_whole_streamed_and_in_the_terminal_the_answer_is_one(app, tiny_model, images) -> None:
    said, done = chat(tiny_model, "what is this?", *images)
    parts = [*(picture(data) for data in images), {"type": "text", "text": "what is this?"}]
    whole = post(app, asked(*parts)).json()
    assert whole["choices"][0]["message"]["content"] == said
    assert whole["choices"][0]["finish_reason"] == done.finish
    used = {"prompt_tokens": done.prompt_tokens, "completion_tokens": len(done.token_ids)}
    assert whole["usage"] == used | {"total_tokens": sum(used.values())}
    streamed = post(app, asked(*parts, stream=True, stream_options={"include_usage": True}))
    assert streamed.headers["content-type"].startswith("text/event-stream")
    chunks = events(streamed)
    assert "".join(c["choices"][0]["delta"].get("content", "") for c in chunks[:-1]) == said
    assert chunks[0]["choices"][0]["delta"]["role"] == "assistant"
    assert [c["choices"][0]["finish_reason"] for c in chunks[:-1]] == [None] * (len(chunks) - 2) + [done.finish]
    assert (chunks[-1]["usage"], chunks[-1]["choices"]) == (whole["usage"], [])
    plain = events(post(app, asked(*parts, stream=True)))
    assert len(plain) == len(chunks) - 1
    assert "usage" not in plain[0]


def test_pictures_change_the_answer_and_may_follow_the_text(app) -> None:
    text = {"type": "text", "text": "what is this?"}
    answers = [post(app, asked(*parts)).json() for parts in ((text,), (picture(png(1)), text), (text, picture(png(1))))]
    contents = [answer["choices"][0]["message"]["content"] for answer in answers]
    assert contents[0] != contents[1] == contents[2]


def test_sampling_repeats_with_a_seed_and_differs_without(app) -> None:
    def say(**fields: Any) -> str:
        return post(app, asked("hi", temperature=1.5, **fields)).json()["choices"][0]["message"]["content"]

    assert say(seed=1) == say(seed=1)
    assert len({say() for _ in range(4)}) > 1


@pytest.mark.row("S4-226")
def test_openais_own_client_is_content(app, tiny_model) -> None:
    import httpx2
    from openai import AsyncOpenAI, AuthenticationError, BadRequestError, NotFoundError

    messages: Any = [{"role": "user", "content": [{"type": "text", "text": "what?"}, picture(png())]}]

    async def main() -> tuple[str, str, list[str]]:
        http = httpx2.AsyncClient(transport=httpx2.ASGITransport(app))
        async with AsyncOpenAI(base_url="http://127.0.0.1/v1", api_key=KEY, http_client=http, max_retries=0) as client:
            whole = await client.chat.completions.create(model="tiny", messages=messages, max_tokens=12)
            stream = await client.chat.completions.create(model="tiny", messages=messages, max_tokens=12, stream=True)
            pieces = [chunk.choices[0].delta.content or "" async for chunk in stream]
            again = [*messages, whole.choices[0].message, {"role": "user", "content": "sure?"}]
            await client.chat.completions.create(model="tiny", messages=again, max_tokens=2)
            with pytest.raises(BadRequestError, match="'top_p' is not supported"):
                await client.chat.completions.create(model="tiny", messages=messages, top_p=0.5)
            with pytest.raises(NotFoundError, match="this server has 'tiny'"):
                await client.chat.completions.create(model="gpt-5", messages=messages)
            with pytest.raises(AuthenticationError):
                await client.with_options(api_key="wrong").models.list()
            listed = [model.id async for model in client.models.list()]
            return whole.choices[0].message.content or "", "".join(pieces), listed

    said, _ = chat(tiny_model, "what?", png())
    assert asyncio.run(main()) == (said, said, ["tiny"])


def test_health_needs_no_key_and_all_else_does(app) -> None:
    for path, status in (("/health", 200), ("/v1/models", 401), ("/docs", 401), ("/openapi.json", 401)):
        response = talk(app, lambda client, path=path: client.get(path), key="wrong")
        assert response.status_code == status
        if status == 401:
            assert response.json()["error"]["code"] == "invalid_api_key"
            assert response.headers["www-authenticate"] == "Bearer"
    assert talk(app, lambda client: client.post(CHAT, content=b"{}"), key="wrong").status_code == 401


def test_unknown_paths_methods_and_models_are_said_in_the_same_shape(app) -> None:
    for method, path, status in (("GET", "/v1/x", 404), ("GET", CHAT, 405), ("GET", "/v1/models/x/y", 404)):
        response = talk(app, lambda client, method=method, path=path: client.request(method, path))
        assert response.status_code == status
        assert response.json()["error"]["message"]
    assert talk(app, lambda client: client.get("/v1/models/tiny")).json()["id"] == "tiny"


BAD_PICTURES = {
    "empty": (b"", "0 bytes", "invalid_image"),
    "cut off": (png()[:200], "cut off", "invalid_image"),
    "no picture": (b"#!/bin/sh", "not a picture of a known format", "invalid_image"),
    "bomb": (huge(), "decompression bomb", "image_too_large"),
}


@pytest.mark.parametrize("case", BAD_PICTURES)
def test_a_bad_picture_is_refused_where_it_stands(app, case: str) -> None:
    data, cause, code = BAD_PICTURES[case]
    for stream in (False, True):  # before the stream begins: the status tells
        response = post(app, asked({"type": "text", "text": "?"}, picture(data), stream=stream))
        assert response.status_code == 400
        error = response.json()["error"]
        assert error["param"] == "messages[0].content[1]"
        assert cause in error["message"]
        assert error["code"] == code


def test_a_prompt_that_is_too_long_says_by_how_much(app) -> None:
    for stream in (False, True):
        response = post(app, asked("x" * 300, stream=stream))
        error = response.json()["error"]
        assert (response.status_code, error["code"]) == (400, "context_length_exceeded")
        assert "more than the 256 the model can hold" in error["message"]
    body = {"model": "tiny", "messages": [{"role": "user", "content": "x" * 200}]}
    assert post(app, body).json()["usage"]["total_tokens"] <= 256  # no length asked for: what is left


@pytest.mark.parametrize(
    "body",
    [b"{", asked({"type": "image_url", "image_url": {"url": "file:///etc/passwd"}}), asked("a\ue0000\ue001")],
)
def test_bad_requests_are_400(app, body: Any) -> None:
    response = post(app, body)
    assert response.status_code == 400
    assert set(response.json()["error"]) == {"message", "type", "param", "code"}


def test_a_body_over_the_limit_is_413(app) -> None:
    response = post(app, b" " * (33 * 2**20))
    assert (response.status_code, response.json()["error"]["code"]) == (413, "request_too_large")


def test_a_fault_of_the_server_leaks_nothing_and_frees_the_model(app, monkeypatch, caplog) -> None:
    def broken(*_: Any) -> Any:
        raise NumericsError("scores are not numbers", place="/home/secret/model", remedy="look at /home/secret")
        yield

    good = Engine._answer
    monkeypatch.setattr(Engine, "_answer", broken)
    for stream in (False, True):
        response = talk(app, lambda client, s=stream: _post_quietly(app, asked("hi", stream=s)))
        assert response.status_code == (200 if stream else 500)
        assert "secret" not in response.text
        assert "Traceback" not in response.text
        assert '"internal_error"' in response.text
        assert "[DONE]" not in response.text
    assert "/home/secret/model" in caplog.text  # the operator's log has it
    monkeypatch.setattr(Engine, "_answer", good)
    assert post(app, asked("hi")).status_code == 200


async def _post_quietly(app: Any, body: Any) -> httpx.Response:
    transport = httpx.ASGITransport(app, raise_app_exceptions=False)
    headers = {"Authorization": f"Bearer {KEY}"}
    async with httpx.AsyncClient(transport=transport, base_url="http://127.0.0.1", headers=headers) as client:
        return await client.post(CHAT, json=body)


def test_too_many_waiting_requests_are_turned_away(tiny_model) -> None:
    app = create_app(tiny_model, name="tiny", key=KEY, waiting=1)

    async def use(client: httpx.AsyncClient) -> list[httpx.Response]:
        return await asyncio.gather(*(client.post(CHAT, json=asked("hi", max_tokens=40)) for _ in range(4)))

    responses = talk(app, use)
    assert sorted(r.status_code for r in responses) == [200, 200, 429, 429]
    turned = next(r for r in responses if r.status_code == 429)
    assert int(turned.headers["retry-after"]) > 0
    assert turned.json()["error"]["type"] == "rate_limit_error"
    assert len({r.json()["choices"][0]["message"]["content"] for r in responses if r.status_code == 200}) == 1


@pytest.mark.parametrize("stream", [True, False])
def test_a_client_who_leaves_stops_the_answer(app, monkeypatch, stream: bool) -> None:
    steps = 0
    choose = Engine._choose

    def counted(self: Engine, row: Any, logits: Any) -> int:
        nonlocal steps
        steps += 1
        return choose(self, row, logits)

    monkeypatch.setattr(Engine, "_choose", counted)
    body = json.dumps(asked("hi", max_tokens=200, stream=stream)).encode()
    headers = [(b"authorization", f"Bearer {KEY}".encode())]
    scope = {"type": "http", "method": "POST", "path": CHAT, "raw_path": CHAT.encode(), "query_string": b""}
    scope |= {"headers": headers, "asgi": {"spec_version": "2.3"}, "http_version": "1.1", "scheme": "http"}
    given = False

    async def receive() -> Any:
        nonlocal given
        if not given:
            given = True
            return {"type": "http.request", "body": body}
        while steps < 5:
            await asyncio.sleep(0.001)
        return {"type": "http.disconnect"}

    async def send(message: Any) -> None:
        pass

    asyncio.run(app(scope, receive, send))
    assert 5 <= steps < 100
    assert post(app, asked("hi")).status_code == 200


def test_roles_and_turns_are_rendered_as_they_stand(app, tiny_model) -> None:
    messages = [
        {"role": "system", "content": "be short"},
        {"role": "user", "content": [picture(png()), {"type": "text", "text": "what?"}]},
        {"role": "assistant", "content": "a cat"},
        {"role": "user", "content": "sure?"},
    ]
    answer = post(app, asked("x") | {"messages": messages}).json()
    text = "be short" + "what?" + "a cat" + "sure?"
    ref = MediaRef(modality="image", sha256="0", uri="")
    turns = [
        Turn(role="system", parts=(Text(text="be short"),)),
        Turn(role="user", parts=(ref, Text(text="what?"))),
        Turn(role="assistant", parts=(Text(text="a cat"),)),
        Turn(role="user", parts=(Text(text="sure?"),)),
    ]
    assert answer["usage"]["prompt_tokens"] == len(tiny_model.template.turns(turns, prompt=True)) > len(text)
    developer = [messages[0] | {"role": "developer"}, *messages[1:]]
    assert post(app, asked("x") | {"messages": developer}).json()["choices"] == answer["choices"]
