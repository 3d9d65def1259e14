"""OpenAI's chat completions on the wire: what comes in, what goes out, and faults in their shape.

Source: https://platform.openai.com/docs/api-reference/chat. A field that would change the answer and is not supported
is refused by name, never ignored.
"""

from __future__ import annotations

import time
from collections.abc import Mapping
from typing import Annotated, Any, Literal, TypedDict

from pydantic import BaseModel, ConfigDict, Discriminator, Field, Tag, ValidationError
from pydantic_core import from_json

from plait.core.types import Completion

MAX_PICTURES = 16
"""Most pictures of a request."""

_NEUTRAL: Mapping[str, tuple[Any, ...]] = {
    "n": (1,),
    "top_p": (1,),
    "presence_penalty": (0,),
    "frequency_penalty": (0,),
    "logprobs": (False,),
    "top_logprobs": (0,),
    "logit_bias": ({},),
    "stop": ([],),
    "tools": ([],),
    "functions": ([],),
    "tool_choice": ("none", "auto"),
    "function_call": ("none", "auto"),
    "parallel_tool_calls": (True, False),
    "response_format": ({"type": "text"},),
    "modalities": (["text"],),
    "audio": (),
    "prediction": (),
    "reasoning_effort": ("none",),
    "verbosity": (),
    "web_search_options": (),
    "service_tier": ("auto", "default"),
    "store": (False,),
}
"""Fields that are known and not supported, and the values that ask for nothing (so does null)."""
_WITHOUT_EFFECT = frozenset({"user", "metadata", "safety_identifier", "prompt_cache_key", "prompt_cache_retention"})
"""Fields that are for book-keeping and change no answer."""
_ECHOED = frozenset({"annotations", "audio", "function_call", "refusal", "tool_calls"})
"""Fields of an answer that clients send back with it; null or empty they say nothing."""


class ApiError(Exception):
    """A fault to be answered in OpenAI's shape; its message goes to the client, so it holds no path of this machine.

    Args:
        status: Of HTTP.
        message: What was expected, what came, what to do.
        code: Stable name.
        param: The field it is about.
        headers: To send along.
    """

    def __init__(
        self,
        status: int,
        message: str,
        *,
        code: str,
        param: str | None = None,
        headers: Mapping[str, str] | None = None,
    ) -> None:
        super().__init__(message)
        self.status = status
        self.message = message
        self.code = code
        self.param = param
        self.headers = dict(headers or {})

    def as_dict(self) -> dict[str, Any]:
        """The body."""
        kind = (
            "server_error"
            if self.status >= 500
            else "rate_limit_error"
            if self.status == 429
            else "invalid_request_error"
        )
        return {"error": {"message": self.message, "type": kind, "param": self.param, "code": self.code}}


# --- what comes in ---------------------------------------------------------------------------------------------------


class _Strict(BaseModel):
    model_config = ConfigDict(strict=True, extra="forbid", frozen=True)


class TextPart(_Strict):
    """A piece of text."""

    type: Literal["text"]
    text: str


class ImageUrl(_Strict):
    """Where a picture is: a data URI. Pictures are seen at one size, so ``detail`` can only be ``auto``."""

    url: str
    detail: Literal["auto"] | None = None


class ImagePart(_Strict):
    """A picture."""

    type: Literal["image_url"]
    image_url: ImageUrl


def _kind_of_part(value: Any) -> str:
    return f"<{value.get('type')}>" if isinstance(value, dict) else "<>"


def _kind_of_content(value: Any) -> str:
    return "<text>" if isinstance(value, str) else "<parts>" if isinstance(value, list) else "<>"


Part = Annotated[
    Annotated[TextPart, Tag("<text>")] | Annotated[ImagePart, Tag("<image_url>")],
    Discriminator(
        _kind_of_part,
        custom_error_type="part",
        custom_error_message="a part has the type 'text' or 'image_url'; others are not supported",
    ),
]
Content = Annotated[
    Annotated[str, Tag("<text>")] | Annotated[list[Part], Field(min_length=1), Tag("<parts>")],
    Discriminator(
        _kind_of_content, custom_error_type="content", custom_error_message="content is a string or a list of parts"
    ),
]


class Message(_Strict):
    """One turn; ``developer`` is OpenAI's newer word for ``system``."""

    role: Literal["system", "developer", "user", "assistant"]
    content: Content


class StreamOptions(_Strict):
    """What a stream tells besides the answer."""

    include_usage: bool = False
    include_obfuscation: Literal[False] | None = None


class ChatRequest(_Strict):
    """Body of ``POST /v1/chat/completions``; ``temperature`` is 0 unless given, as in ``plait chat`` (OpenAI: 1)."""

    model: str
    messages: Annotated[list[Message], Field(min_length=1)]
    max_tokens: Annotated[int, Field(ge=1)] | None = None
    max_completion_tokens: Annotated[int, Field(ge=1)] | None = None
    temperature: Annotated[float, Field(ge=0, le=2)] | None = None
    seed: Annotated[int, Field(ge=-(2**63), lt=2**63)] | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None

    @property
    def include_usage(self) -> bool:
        """Whether a stream ends with the counts."""
        return self.stream_options is not None and self.stream_options.include_usage


def parse_chat(body: bytes) -> ChatRequest:
    """Read and check a request.

    Raises:
        ApiError: 400, naming the field.
    """
    try:
        fields = from_json(body, allow_inf_nan=False)
    except ValueError as error:
        raise ApiError(400, f"the body is not valid JSON: {error}", code="invalid_json") from error
    if not isinstance(fields, dict):
        raise ApiError(400, "the body must be a JSON object", code="invalid_json")
    for name in fields.keys() - ChatRequest.model_fields.keys() - _WITHOUT_EFFECT:
        _refuse(name, fields[name])
    known = {name: value for name, value in fields.items() if name in ChatRequest.model_fields}
    if "messages" in known:
        known["messages"] = _without_echoes(known["messages"])
    try:
        request = ChatRequest.model_validate(known)
    except ValidationError as error:
        raise _as_api_error(error) from error
    _check_together(request)
    return request


def _refuse(name: str, value: Any) -> None:
    """Refuse a field that asks for something.

    Raises:
        ApiError: It does.
    """
    if name not in _NEUTRAL:
        raise ApiError(400, f"unknown field '{name}'", code="unknown_parameter", param=name)
    # 0 and False are equal to Python, and so are 1 and True; to a client they are not.
    neutral = any(value == one and isinstance(value, bool) == isinstance(one, bool) for one in _NEUTRAL[name])
    if value is not None and not neutral:
        raise ApiError(400, f"'{name}' is not supported: leave it out", code="unsupported_parameter", param=name)


def _without_echoes(messages: Any) -> Any:
    if not isinstance(messages, list):
        return messages
    return [
        {k: v for k, v in message.items() if not (k in _ECHOED and (v is None or v == []))}
        if isinstance(message, dict)
        else message
        for message in messages
    ]


def _as_api_error(error: ValidationError) -> ApiError:
    """The first fault, at a place a client can find: ``messages[0].content[1].image_url.url``."""
    first = error.errors(include_url=False, include_input=False, include_context=False)[0]
    place = ""
    for step in first["loc"]:
        if isinstance(step, int):
            place += f"[{step}]"
        elif not step.startswith("<"):  # a tag of ours
            place += f".{step}" if place else step
    message = {
        "extra_forbidden": "this field is not supported here: leave it out",
        "missing": "this field is missing",
    }.get(first["type"], first["msg"])
    return ApiError(400, f"{place}: {message}", code="invalid_value", param=place)


def _check_together(request: ChatRequest) -> None:
    """What no field can tell alone.

    Raises:
        ApiError: 400, naming the field.
    """
    if request.max_tokens is not None and request.max_completion_tokens not in (None, request.max_tokens):
        cause = f"max_tokens is {request.max_tokens}, max_completion_tokens {request.max_completion_tokens}: give one"
        raise ApiError(400, cause, code="invalid_value", param="max_completion_tokens")
    if request.stream_options is not None and not request.stream:
        raise ApiError(400, "stream_options needs stream: true", code="invalid_value", param="stream_options")
    if request.messages[-1].role != "user":
        place = f"messages[{len(request.messages) - 1}].role"
        cause = f"{place}: the last message is the {request.messages[-1].role}'s; the model answers a user"
        raise ApiError(400, cause, code="invalid_value", param=place)
    pictures = 0
    for number, message in enumerate(request.messages):
        here = sum(isinstance(part, ImagePart) for part in message.content)
        pictures += here
        place = f"messages[{number}].content"
        if here and message.role != "user":
            cause = f"{place}: a picture in a {message.role} message; only a user shows pictures"
            raise ApiError(400, cause, code="invalid_value", param=place)
        if pictures > MAX_PICTURES:
            cause = f"{place}: more than {MAX_PICTURES} pictures in one request"
            raise ApiError(400, cause, code="too_many_images", param=place)


# --- what goes out ---------------------------------------------------------------------------------------------------


class Head(TypedDict):
    """What all chunks of an answer share."""

    id: str
    created: int
    model: str


def head(name: str, model: str) -> Head:
    """Of a new answer."""
    return {"id": f"chatcmpl-{name}", "created": int(time.time()), "model": model}


def usage(completion: Completion) -> dict[str, Any]:
    """Tokens: of the prompt with its pictures, and of the answer without the token that ended it."""
    prompt, answer = completion.prompt_tokens, len(completion.token_ids)
    return {"prompt_tokens": prompt, "completion_tokens": answer, "total_tokens": prompt + answer}


def whole(start: Head, completion: Completion) -> dict[str, Any]:
    """An answer in one piece."""
    message = {"role": "assistant", "content": completion.text, "refusal": None}
    choice = {"index": 0, "message": message, "logprobs": None, "finish_reason": completion.finish}
    return {**start, "object": "chat.completion", "choices": [choice], "usage": usage(completion)}


def chunk(start: Head, delta: Mapping[str, str], *, finish: str | None = None) -> dict[str, Any]:
    """A piece of a streamed answer."""
    choice = {"index": 0, "delta": dict(delta), "logprobs": None, "finish_reason": finish}
    return {**start, "object": "chat.completion.chunk", "choices": [choice]}


def usage_chunk(start: Head, completion: Completion) -> dict[str, Any]:
    """The last chunk, where the client asked for counts."""
    return {**start, "object": "chat.completion.chunk", "choices": [], "usage": usage(completion)}


def model_card(model: str, created: int) -> dict[str, Any]:
    """A model, as ``GET /v1/models`` lists it."""
    return {"id": model, "object": "model", "created": created, "owned_by": "plait"}
