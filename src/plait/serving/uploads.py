"""What clients send: bodies of bounded size, and pictures as data URIs. Nothing is ever fetched."""

from __future__ import annotations

import base64
import binascii
import re
from typing import TYPE_CHECKING

from plait.serving.schema import ApiError

if TYPE_CHECKING:
    from starlette.requests import Request

MAX_BODY_BYTES = 32 * 2**20
"""Largest body; a picture takes 4/3 of its bytes in base64."""

_DATA = re.compile(r"data:image/([a-z0-9.+-]+);base64,", re.IGNORECASE)
_SCHEME = re.compile(r"([a-z][a-z0-9+.-]*):", re.IGNORECASE)


async def read_body(request: Request, limit: int = MAX_BODY_BYTES) -> bytes:
    """The body, read no further than the limit.

    Raises:
        ApiError: 413, with both sizes.
    """
    stated = request.headers.get("content-length", "")
    if stated.isdigit() and int(stated) > limit:
        raise _too_large(f"{int(stated):,}", limit)
    body = bytearray()
    async for piece in request.stream():
        body += piece
        if len(body) > limit:
            raise _too_large(f"more than {limit:,}", limit)
    return bytes(body)


def picture_bytes(url: str, *, place: str) -> bytes:
    """Encoded bytes of a picture given as a data URI.

    Args:
        url: ``data:image/png;base64,...``; which format it is, the bytes themselves say later.
        place: Which field, for the error.

    Raises:
        ApiError: 400: another kind of URL, or no base64.
    """
    match = _DATA.match(url)
    if match is None:
        scheme = _SCHEME.match(url)
        came = f"a {scheme[1].lower()[:20]}: URL" if scheme and scheme[1].lower() != "data" else "no such URI"
        raise ApiError(
            400,
            f"{place}: expected a data URI (data:image/png;base64,...), came {came}; this server fetches nothing and "
            "opens no files: read the picture yourself and send its bytes in base64",
            code="invalid_image_url",
            param=place,
        )
    try:
        return base64.b64decode(url[match.end() :], validate=True)
    except (binascii.Error, ValueError) as error:
        raise ApiError(
            400, f"{place}: the picture is not valid base64: {error}", code="invalid_base64_image", param=place
        ) from error


def _too_large(came: str, limit: int) -> ApiError:
    message = f"the body has {came} bytes, allowed are {limit:,}: send smaller or fewer pictures"
    return ApiError(413, message, code="request_too_large")
