"""Who may ask: one key, made at the start or given, compared in constant time."""

from __future__ import annotations

import hashlib
import hmac
import os
import secrets
import shlex
import stat
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from plait.core.errors import UsageError
from plait.serving.schema import ApiError

if TYPE_CHECKING:
    from starlette.types import ASGIApp, Receive, Scope, Send

VARIABLE = "PLAIT_API_KEY"
"""Environment variable that may hold the key."""

OPEN = frozenset({"/health"})
"""Paths that need no key."""

_SHORTEST = 16


@dataclass(frozen=True, slots=True, kw_only=True)
class Key:
    """The key of a server.

    Attributes:
        value: What clients send after ``Bearer``.
        spelled: The same inside a command that a person copies; names the variable or file that it came from.
        made: Whether it was made now; then somebody must be told.
        warning: What is unsafe about it, in a line.
    """

    value: str
    spelled: str
    made: bool = False
    warning: str = ""

    def __repr__(self) -> str:
        return f"Key(made={self.made})"  # no log shows it


def find_key(file: Path | None = None) -> Key:
    """The key: from a file, else from the environment, else a new one.

    Raises:
        UsageError: It cannot be read, is too short, or holds what no HTTP header can.
    """
    if file is not None:
        try:
            value = file.read_text(encoding="utf-8").strip()
            open_to_others = stat.S_IMODE(file.stat().st_mode) & 0o077
        except (OSError, UnicodeDecodeError) as error:
            raise UsageError(f"cannot read the key: {error}", place=str(file), remedy="name a readable file") from error
        warning = f"others on this machine can read {file}: chmod 600 it" if open_to_others else ""
        return Key(value=_checked(value, str(file)), spelled=f"$(cat {shlex.quote(str(file))})", warning=warning)
    if VARIABLE in os.environ:
        return Key(value=_checked(os.environ[VARIABLE].strip(), VARIABLE), spelled=f"${VARIABLE}")
    value = secrets.token_urlsafe(24)
    return Key(value=value, spelled=value, made=True)


class RequireKey:
    """Lets only requests with the key through; all paths but :data:`OPEN` need it, those that do not exist too.

    Args:
        app: What is behind it.
        key: The key.
    """

    def __init__(self, app: ASGIApp, *, key: str) -> None:
        self.app = app
        self.digest = _digest(key)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Pass the request on, or answer 401."""
        if scope["type"] == "http" and scope["path"] not in OPEN and (fault := self._fault(scope)):
            from starlette.responses import JSONResponse

            response = JSONResponse(fault.as_dict(), status_code=fault.status, headers=fault.headers)
            await response(scope, receive, send)
            return
        await self.app(scope, receive, send)

    def _fault(self, scope: Scope) -> ApiError | None:
        given = [value for name, value in scope["headers"] if name == b"authorization"]
        scheme, _, value = given[0].partition(b" ") if len(given) == 1 else (b"", b"", b"")
        # Digests have one length, so that the comparison tells nothing about the key's.
        matches = hmac.compare_digest(_digest(value.strip()), self.digest)
        if scheme.lower() == b"bearer" and matches:
            return None
        said = "the key is wrong" if given else "no key"
        message = (
            f"{said}: send the header 'Authorization: Bearer KEY' with the key that the server printed or was given"
        )
        return ApiError(401, message, code="invalid_api_key", headers={"WWW-Authenticate": "Bearer"})


def _digest(key: str | bytes) -> bytes:
    return hashlib.sha256(key.encode() if isinstance(key, str) else key).digest()


def _checked(value: str, place: str) -> str:
    if len(value) < _SHORTEST or not value.isascii() or not value.isprintable() or " " in value:
        raise UsageError(
            f"the key has {len(value)} characters; expected are {_SHORTEST} or more, ASCII, without blanks",
            place=place,
            remedy='make one with: python3 -c "import secrets; print(secrets.token_urlsafe(24))"',
        )
    return value
