"""Uploads: nothing is fetched, nothing is read past the limit."""

from __future__ import annotations

import asyncio
import base64

import pytest
from starlette.requests import Request

from plait.serving.schema import ApiError
from plait.serving.uploads import picture_bytes, read_body

pytestmark = pytest.mark.light


@pytest.mark.parametrize("head", ["data:image/png;base64,", "data:image/jpeg;base64,", "DATA:image/WEBP;BASE64,"])
def test_a_data_uri_gives_its_bytes(head: str) -> None:
    data = bytes(range(256))
    assert picture_bytes(head + base64.b64encode(data).decode(), place="p") == data


@pytest.mark.parametrize(
    ("url", "came"),
    [
        ("https://example.com/a.png", "a https: URL"),
        ("HTTP://127.0.0.1/a.png", "a http: URL"),
        ("file:///etc/passwd", "a file: URL"),
        ("/etc/passwd", "no such URI"),
        ("", "no such URI"),
        ("data:text/html;base64,AAAA", "no such URI"),
        ("data:image/png,AAAA", "no such URI"),
        (" data:image/png;base64,AAAA", "no such URI"),
    ],
)
def test_everything_else_is_refused_and_says_what_to_do(url: str, came: str) -> None:
    with pytest.raises(ApiError, match="fetches nothing") as caught:
        picture_bytes(url, place="messages[0].content[1].image_url.url")
    assert came in caught.value.message
    assert caught.value.param == "messages[0].content[1].image_url.url"


@pytest.mark.parametrize("data", ["AAA", "A*AA", "AA==AA", "AAAA\n", "ÄAAA"])
def test_bad_base64_is_refused(data: str) -> None:
    with pytest.raises(ApiError, match="not valid base64"):
        picture_bytes(f"data:image/png;base64,{data}", place="p")


@pytest.mark.parametrize(("stated", "taken"), [(None, 3), (30, 0), (5, 3)])
def test_a_body_is_read_no_further_than_the_limit(stated: int | None, taken: int) -> None:
    """By what the client states, and by what really comes, whatever it stated."""
    pieces = 0

    async def receive():
        nonlocal pieces
        pieces += 1
        return {"type": "http.request", "body": b"12345", "more_body": pieces < 6}

    headers = [] if stated is None else [(b"content-length", str(stated).encode())]
    request = Request({"type": "http", "method": "POST", "path": "/", "headers": headers}, receive)
    with pytest.raises(ApiError, match="allowed are 10") as caught:
        asyncio.run(read_body(request, limit=10))
    assert (caught.value.status, pieces) == (413, taken)
    pieces = 0
    whole = Request({"type": "http", "method": "POST", "path": "/", "headers": []}, receive)
    assert asyncio.run(read_body(whole, limit=30)) == b"12345" * 6
