"""The key: where it comes from, what is refused, and that nothing but it opens the door."""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import Any

import pytest

from plait.core.errors import UsageError
from plait.serving.auth import VARIABLE, RequireKey, find_key

pytestmark = pytest.mark.light

KEY = "0123456789abcdef-KEY"


def status(path: str = "/v1/models", **headers: str) -> int:
    """What a request gets: 401, or 204 from behind the door."""
    sent: list[dict[str, Any]] = []

    async def app(scope: Any, receive: Any, send: Any) -> None:
        await send({"type": "http.response.start", "status": 204, "headers": []})

    async def receive() -> Any:
        return {"type": "http.request", "body": b""}

    async def send(message: Any) -> None:
        sent.append(message)

    raw = [(name.encode(), value.encode("latin-1")) for name, value in headers.items()]
    scope = {"type": "http", "path": path, "headers": raw, "method": "GET"}
    asyncio.run(RequireKey(app, key=KEY)(scope, receive, send))
    return sent[0]["status"]


def test_only_the_key_opens() -> None:
    assert status(authorization=f"Bearer {KEY}") == 204
    assert status(authorization=f"bearer  {KEY}") == 204
    assert status("/health") == 204
    wrong = ["", "Bearer", "Bearer ", KEY, f"Basic {KEY}", f"Bearer {KEY}x", f"Bearer {KEY[:-1]}", "Bearer \xff\xfe"]
    for value in wrong:
        assert status(authorization=value) == 401, value
    for path in ("/v1/models", "/", "/nowhere", "/health/", "//health"):
        assert status(path) == 401, path


def test_two_authorization_headers_are_refused() -> None:
    sent: list[dict[str, Any]] = []

    async def send(message: Any) -> None:
        sent.append(message)

    headers = [(b"authorization", b"Bearer x"), (b"authorization", f"Bearer {KEY}".encode())]
    scope = {"type": "http", "path": "/", "headers": headers, "method": "GET"}
    asyncio.run(RequireKey(None, key=KEY)(scope, None, send))  # pyright: ignore[reportArgumentType]
    assert sent[0]["status"] == 401


def test_the_key_comes_from_the_file_then_the_environment_then_chance(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv(VARIABLE, raising=False)
    one, two = find_key(), find_key()
    assert one.made
    assert one.value != two.value
    assert len(one.value) >= 32
    assert one.value not in repr(one)
    monkeypatch.setenv(VARIABLE, KEY)
    assert (find_key().value, find_key().spelled, find_key().made) == (KEY, f"${VARIABLE}", False)
    file = tmp_path / "a key"
    file.write_text("from-a-file-0123456789\n")
    file.chmod(0o600)
    found = find_key(file)
    assert (found.value, found.warning) == ("from-a-file-0123456789", "")
    assert found.spelled == f"$(cat '{file}')"
    file.chmod(0o644)
    assert "chmod 600" in find_key(file).warning


@pytest.mark.parametrize(
    "value", ["", "short", "a" * 15, "with a blank in between", "schlüssel-0123456789", "a\nb" * 9]
)
def test_a_weak_or_unsendable_key_is_refused(value: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(VARIABLE, value)
    with pytest.raises(UsageError, match="the key has"):
        find_key()
    with pytest.raises(UsageError, match="cannot read the key"):
        find_key(tmp_path / "none")
