"""Requests in OpenAI's shape: what is used, what may be ignored, and what is refused by name."""

from __future__ import annotations

import json
from typing import Any

import pytest

from plait.core.types import Completion
from plait.serving.schema import ApiError, chunk, head, parse_chat, usage_chunk, whole

pytestmark = pytest.mark.light

PICTURE = {"type": "image_url", "image_url": {"url": "data:image/png;base64,AAAA"}}


def body(**fields: Any) -> bytes:
    base = {"model": "m", "messages": [{"role": "user", "content": "hi"}]}
    return json.dumps({k: v for k, v in (base | fields).items() if v is not ...}).encode()


def test_what_is_used_arrives() -> None:
    parts = [{"type": "text", "text": "what?"}, {**PICTURE, "image_url": {"url": "data:x", "detail": "auto"}}]
    asked = parse_chat(
        body(
            messages=[{"role": "developer", "content": "be short"}, {"role": "user", "content": parts}],
            temperature=1,
            seed=7,
            max_completion_tokens=5,
            stream=True,
            stream_options={"include_usage": True},
        )
    )
    assert (asked.temperature, asked.seed, asked.max_completion_tokens, asked.include_usage) == (1, 7, 5, True)
    assert asked.messages[1].content[1].image_url.url == "data:x"


@pytest.mark.parametrize(
    "field",
    [
        {"n": 1},
        {"top_p": 1.0},
        {"presence_penalty": 0, "frequency_penalty": 0.0},
        {"logprobs": False},
        {"stop": None, "tools": None, "logit_bias": None},
        {"tools": [], "tool_choice": "auto", "parallel_tool_calls": True},
        {"response_format": {"type": "text"}},
        {"user": "u", "metadata": {"a": "b"}, "safety_identifier": "s"},
        {"temperature": None, "max_tokens": None, "seed": None, "stream": None},
        {"max_tokens": 3, "max_completion_tokens": 3},
    ],
)
def test_what_asks_for_nothing_passes(field: dict[str, Any]) -> None:
    parse_chat(body(**field))


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"n": 2}, "n"),
        ({"n": True}, "n"),
        ({"top_p": 0.9}, "top_p"),
        ({"presence_penalty": 0.1}, "presence_penalty"),
        ({"frequency_penalty": -1}, "frequency_penalty"),
        ({"logprobs": True}, "logprobs"),
        ({"stop": ["\n"]}, "stop"),
        ({"stop": "x"}, "stop"),
        ({"tools": [{"type": "function"}]}, "tools"),
        ({"response_format": {"type": "json_object"}}, "response_format"),
        ({"logit_bias": {"5": 1}}, "logit_bias"),
        ({"reasoning_effort": "high"}, "reasoning_effort"),
        ({"tepmerature": 0}, "tepmerature"),
        ({"temperature": 3}, "temperature"),
        ({"temperature": "1"}, "temperature"),
        ({"max_tokens": 0}, "max_tokens"),
        ({"max_tokens": 3, "max_completion_tokens": 4}, "max_completion_tokens"),
        ({"seed": 2**63}, "seed"),
        ({"stream_options": {"include_usage": True}}, "stream_options"),
        ({"model": ...}, "model"),
        ({"messages": ...}, "messages"),
        ({"messages": []}, "messages"),
        ({"messages": [{"role": "tool", "content": "x"}]}, "messages[0].role"),
        ({"messages": [{"role": "user"}]}, "messages[0].content"),
        ({"messages": [{"role": "user", "content": None}]}, "messages[0].content"),
        ({"messages": [{"role": "user", "content": []}]}, "messages[0].content"),
        ({"messages": [{"role": "user", "content": "x", "name": "bob"}]}, "messages[0].name"),
        ({"messages": [{"role": "user", "content": [{"type": "input_audio"}]}]}, "messages[0].content[0]"),
        ({"messages": [{"role": "user", "content": [{"type": "text"}]}]}, "messages[0].content[0].text"),
        (
            {"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": "data:"}]}]},
            "messages[0].content[0].image_url",
        ),
        (
            {
                "messages": [
                    {
                        "role": "user",
                        "content": [{"type": "image_url", "image_url": {"url": "data:", "detail": "high"}}],
                    }
                ]
            },
            "messages[0].content[0].image_url.detail",
        ),
        (
            {"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]},
            "messages[1].role",
        ),
        (
            {"messages": [{"role": "system", "content": [PICTURE]}, {"role": "user", "content": "b"}]},
            "messages[0].content",
        ),
        ({"messages": [{"role": "user", "content": [PICTURE] * 17}]}, "messages[0].content"),
    ],
)
def test_what_would_change_the_answer_or_is_wrong_is_refused_by_name(fields: dict[str, Any], param: str) -> None:
    with pytest.raises(ApiError) as caught:
        parse_chat(body(**fields))
    assert (caught.value.status, caught.value.param) == (400, param)
    assert param in caught.value.message
    assert caught.value.as_dict()["error"]["type"] == "invalid_request_error"


@pytest.mark.parametrize("data", [b"", b"{", b"[]", b'"x"', b"\xff", b'{"a": NaN}', b"[" * 5000, b'{"a": "\\ud800"}'])
def test_what_is_no_json_object_is_refused(data: bytes) -> None:
    with pytest.raises(ApiError) as caught:
        parse_chat(data)
    assert caught.value.code == "invalid_json"


def test_an_answer_sent_back_as_clients_do_is_taken() -> None:
    echoed = {"role": "assistant", "content": "b", "refusal": None, "tool_calls": None, "annotations": []}
    asked = parse_chat(body(messages=[{"role": "user", "content": "a"}, echoed, {"role": "user", "content": "c"}]))
    assert [m.content for m in asked.messages] == ["a", "b", "c"]
    with pytest.raises(ApiError, match="leave it out"):
        parse_chat(body(messages=[echoed | {"tool_calls": [{"id": "1"}]}, {"role": "user", "content": "c"}]))


def test_answers_are_what_openais_own_types_expect() -> None:
    from openai.types.chat import ChatCompletion, ChatCompletionChunk

    done = Completion(id="r", text="a cat", token_ids=(5, 6), finish="stop", prompt_tokens=9, image_tokens=4)
    start = head("1", "m")
    answer = ChatCompletion.model_validate(whole(start, done), strict=True)
    assert (answer.choices[0].message.content, answer.choices[0].finish_reason) == ("a cat", "stop")
    assert answer.usage is not None
    assert (answer.usage.prompt_tokens, answer.usage.completion_tokens, answer.usage.total_tokens) == (9, 2, 11)
    for piece in (chunk(start, {"content": "a"}), chunk(start, {}, finish="stop"), usage_chunk(start, done)):
        ChatCompletionChunk.model_validate(piece, strict=True)
