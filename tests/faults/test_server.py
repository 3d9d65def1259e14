"""A real server in its own process: clients that vanish, and signals."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest

from plait.assembly.multimodal import save_multimodal

PROGRAM = "from plait.cli.main import VERBS, entry; VERBS.setdefault('serve', 'answer'); entry()"


@pytest.fixture
def server(tiny_model, tmp_path: Path) -> Iterator[tuple[subprocess.Popen[str], dict[str, Any]]]:
    """The process, and what it announced."""
    save_multimodal(tiny_model, tmp_path)
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    environment.pop("PLAIT_API_KEY", None)
    process = subprocess.Popen(
        [sys.executable, "-c", PROGRAM, "serve", str(tmp_path), "--port", "0", "--name", "tiny", "--json"],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=environment,
    )
    try:
        yield process, _announced(process)
    finally:
        process.kill()
        process.communicate()


def _announced(process: subprocess.Popen[str]) -> dict[str, Any]:
    assert process.stdout is not None
    text = ""
    while not text.endswith("}\n"):
        line = process.stdout.readline()
        assert line, process.communicate()
        text += line
    return json.loads(text)


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_client_that_vanishes_does_no_harm_and_a_signal_ends_it_with_its_code(server, number, code) -> None:
    process, found = server
    body = {"model": "tiny", "messages": [{"role": "user", "content": "hi"}]}
    headers = {"Authorization": f"Bearer {found['key']}"}
    with httpx.Client(base_url=found["url"], headers=headers, timeout=30) as client:
        for _ in range(3):
            with client.stream("POST", "/chat/completions", json={**body, "stream": True}) as response:
                next(response.iter_lines())  # and leave
        assert client.post("/chat/completions", json={**body, "max_tokens": 2}).status_code == 200
        with pytest.raises(httpx.TimeoutException):
            client.post("/chat/completions", json=body, timeout=0.01)
        assert client.get("/models").headers.get("server") is None
        process.send_signal(number)
        out, err = process.communicate(timeout=30)
    assert process.returncode == code
    assert "Traceback" not in err + out
    assert json.loads(out)["error"]["code"] == "stopped"
