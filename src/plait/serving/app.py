"""The HTTP server: OpenAI's chat completions over one model, on FastAPI."""

from __future__ import annotations

import asyncio
import json
import logging
import secrets
import time
from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager
from typing import Any

from fastapi import FastAPI, Request
from fastapi.responses import JSONResponse, Response, StreamingResponse
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect
from starlette.types import Receive, Scope, Send

from plait.assembly.multimodal import Multimodal
from plait.assembly.vlm import Vlm
from plait.core.errors import DataError
from plait.core.types import MediaRef, Text, Turn
from plait.data.media import MediaError
from plait.inference.converse import Attachments, Decoding, build_request, user_turn
from plait.inference.engine import ContextError
from plait.inference.wrapped import engine_for
from plait.serving import schema
from plait.serving.auth import RequireKey
from plait.serving.schema import ApiError, ChatRequest, Message, TextPart
from plait.serving.uploads import picture_bytes, read_body
from plait.serving.worker import BusyError, GoneError, Job, Pieces, Worker

_LOG = logging.getLogger("plait.serving")
_RETRY_AFTER_S = 5
_CLIENT_LEFT = 499
"""Nobody reads it; the number is nginx's."""


def create_app(model: Multimodal | Vlm, *, name: str, key: str, waiting: int = 16) -> FastAPI:
    """A server for one model.

    Args:
        model: In eval mode.
        name: What clients call it.
        key: That clients must send.
        waiting: Most requests that wait while one is answered; more get 429.
    """
    worker = Worker(waiting)
    created = int(time.time())

    @asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncIterator[None]:
        yield
        worker.shut()

    app = FastAPI(title="Plait", docs_url=None, redoc_url=None, openapi_url=None, lifespan=lifespan)
    app.add_middleware(RequireKey, key=key)
    for kind, handler in ((ApiError, _on_fault), (HTTPException, _on_http), (Exception, _on_bug)):
        app.add_exception_handler(kind, handler)
    for left in (ClientDisconnect, GoneError):
        app.add_exception_handler(left, _on_left)

    @app.get("/health")
    async def health() -> dict[str, str]:
        return {"status": "ok"}

    @app.get("/v1/models")
    async def models() -> dict[str, Any]:
        return {"object": "list", "data": [schema.model_card(name, created)]}

    @app.get("/v1/models/{wanted:path}")
    async def one_model(wanted: str) -> dict[str, Any]:
        _check_model(wanted, name)
        return schema.model_card(name, created)

    @app.post("/v1/chat/completions", response_model=None)
    async def chat_completions(request: Request) -> Response:
        asked = schema.parse_chat(await read_body(request))
        _check_model(asked.model, name)
        start = schema.head(secrets.token_hex(12), name)
        try:
            job = await worker.begin(lambda: prepare(model, asked, start["id"]), gone=request.is_disconnected)
        except BusyError as error:
            message = f"{worker.waiting} requests wait for the model already: try again in {_RETRY_AFTER_S} s"
            headers = {"Retry-After": str(_RETRY_AFTER_S)}
            raise ApiError(429, message, code="server_busy", headers=headers) from error
        if asked.stream:
            return _Stream(job, start, include_usage=asked.include_usage)
        return await _whole(job, start, request)

    return app


def prepare(model: Multimodal | Vlm, asked: ChatRequest, name: str) -> Pieces:
    """The pieces of an answer, all faults of the request raised.

    Raises:
        ApiError: 400: a picture is refused, the turns do not fit the chat template, or they are too long.
    """
    pictures = Attachments()
    engine = engine_for(model, pictures.read)
    sampled = secrets.randbits(63) if asked.temperature else 0
    decoding = Decoding(
        max_new_tokens=asked.max_tokens or asked.max_completion_tokens,
        temperature=asked.temperature or 0.0,
        seed=sampled if asked.seed is None else asked.seed,
    )
    try:
        turns = [_turn(message, f"messages[{n}]", pictures) for n, message in enumerate(asked.messages)]
        return engine.stream(build_request(engine, turns, decoding, name=name))
    except MediaError as fault:
        code = "image_too_large" if fault.reason == "too-large" else "invalid_image"
        message = f"{fault.place}: {fault.cause}; fix: {fault.remedy}"
        raise ApiError(400, message, code=code, param=fault.place) from fault
    except ContextError as fault:
        message = f"{fault.cause}; fix: {fault.remedy}"
        raise ApiError(400, message, code="context_length_exceeded", param="messages") from fault
    except DataError as fault:
        raise ApiError(400, f"{fault.cause}; fix: {fault.remedy}", code="invalid_value", param="messages") from fault


def _turn(message: Message, place: str, pictures: Attachments) -> Turn:
    content = message.content
    parts: list[Text | MediaRef] = []
    for number, part in enumerate([TextPart(type="text", text=content)] if isinstance(content, str) else content):
        if isinstance(part, TextPart):
            parts.append(Text(text=part.text))
        else:
            here = f"{place}.content[{number}]"
            data = picture_bytes(part.image_url.url, place=f"{here}.image_url.url")
            parts.append(pictures.add(data, place=here)[0])
    if message.role == "user":
        return user_turn(parts)
    return Turn(role="system" if message.role == "developer" else message.role, parts=tuple(parts))


def _check_model(wanted: str, name: str) -> None:
    if wanted != name:
        raise ApiError(
            404, f"no model {wanted[:80]!r} here; this server has {name!r}", code="model_not_found", param="model"
        )


# --- answers ---------------------------------------------------------------------------------------------------------


async def _whole(job: Job, start: schema.Head, request: Request) -> Response:
    try:
        while isinstance(piece := await job.next(), str):
            if await request.is_disconnected():
                raise GoneError
        return JSONResponse(schema.whole(start, piece))
    finally:
        job.close()


class _Stream(StreamingResponse):
    """Server-sent events; however it ends, the model is free afterwards."""

    def __init__(self, job: Job, start: schema.Head, *, include_usage: bool) -> None:
        headers = {"Cache-Control": "no-cache", "X-Accel-Buffering": "no"}
        super().__init__(_events(job, start, include_usage=include_usage), headers=headers)
        self.headers["Content-Type"] = "text/event-stream; charset=utf-8"
        self.job = job

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            await super().__call__(scope, receive, send)
        finally:
            self.job.close()


async def _events(job: Job, start: schema.Head, *, include_usage: bool) -> AsyncIterator[str]:
    def event(record: Mapping[str, Any]) -> str:
        # With counts asked for, every chunk has the field.
        record = {"usage": None, **record} if include_usage else record
        return f"data: {json.dumps(record, ensure_ascii=False, separators=(',', ':'))}\n\n"

    yield event(schema.chunk(start, {"role": "assistant", "content": ""}))
    try:
        while isinstance(piece := await job.next(), str):
            if piece:
                yield event(schema.chunk(start, {"content": piece}))
    except asyncio.CancelledError:
        raise
    except Exception as bug:  # the status is sent already: the fault can only be a last event
        yield f"data: {json.dumps(_internal(bug).as_dict())}\n\n"
        return
    yield event(schema.chunk(start, {}, finish=piece.finish))
    if include_usage:
        yield event(schema.usage_chunk(start, piece))
    yield "data: [DONE]\n\n"


# --- faults ----------------------------------------------------------------------------------------------------------


def _internal(bug: Exception) -> ApiError:
    """Tell the operator all, and the client nothing but a number to ask the operator about."""
    number = secrets.token_hex(4)
    _LOG.error("fault %s", number, exc_info=bug)
    return ApiError(500, f"the server failed; its log has the reason under {number}", code="internal_error")


async def _on_fault(_: Request, fault: Exception) -> Response:
    assert isinstance(fault, ApiError)
    return JSONResponse(fault.as_dict(), status_code=fault.status, headers=fault.headers)


async def _on_http(request: Request, fault: Exception) -> Response:
    assert isinstance(fault, HTTPException)
    known = "there are POST /v1/chat/completions, GET /v1/models and GET /health"
    error = ApiError(fault.status_code, f"{fault.detail}; {known}", code="not_found", headers=fault.headers)
    return await _on_fault(request, error)


async def _on_bug(request: Request, bug: Exception) -> Response:
    return await _on_fault(request, _internal(bug))


async def _on_left(_: Request, __: Exception) -> Response:
    return Response(status_code=_CLIENT_LEFT)
