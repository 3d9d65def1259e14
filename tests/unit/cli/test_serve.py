"""``plait serve``: loopback unless told otherwise, a key that is printed once, and faults before a model loads."""

from __future__ import annotations

import argparse
import base64
import importlib.util
import json
import shlex
import socket
import subprocess
from pathlib import Path

import pytest

from plait.cli import serve
from plait.cli.main import VERBS
from plait.cli.main import main as plait
from plait.cli.output import Out
from plait.core.errors import ResourceError, UsageError, pip_install
from plait.serving.auth import Key

pytestmark = pytest.mark.light


@pytest.mark.parametrize("host", ["127.0.0.1", "localhost", "127.8.8.8"])
def test_loopback_addresses_are_taken(host: str) -> None:
    with serve._listen(host, 0, expose=False) as listener:
        assert listener.getsockname()[1] > 0


@pytest.mark.parametrize("host", ["0.0.0.0", "8.8.8.8", "::"])
def test_others_need_expose_which_says_what_it_means(host: str) -> None:
    with pytest.raises(UsageError, match=r"other machines could reach|no address"):  # without IPv6
        serve._listen(host, 0, expose=False)
    with serve._listen("0.0.0.0", 0, expose=True) as listener:
        assert listener.getsockname()[0] == "0.0.0.0"


def test_a_name_that_is_no_address_and_a_taken_port_are_said() -> None:
    with pytest.raises(UsageError, match="no address"):
        serve._listen("no.such.host.invalid", 0, expose=False)
    with socket.create_server(("127.0.0.1", 0)) as other, pytest.raises(ResourceError, match="cannot listen"):
        serve._listen("127.0.0.1", other.getsockname()[1], expose=False)


def announce(key: Key, *, host: str = "127.0.0.1", as_json: bool = False, name: str = "it's") -> int:
    with serve._listen(host, 0, expose=True) as listener:
        serve._announce(listener, name, key, out=Out(json=as_json))
        return listener.getsockname()[1]


def test_a_new_key_is_printed_with_a_command_that_works(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    port = announce(Key(value="K3Y", spelled="K3Y", made=True))
    captured = capsys.readouterr()
    assert captured.out.count("key: K3Y") == 1
    first, picture = captured.out[captured.out.index("curl") :].split("with a picture:")
    words = shlex.split(first)
    assert words[:4] == ["curl", f"http://127.0.0.1:{port}/v1/chat/completions", "-H", "Authorization: Bearer K3Y"]
    assert json.loads(words[-1])["model"] == "it's"
    assert captured.err == ""
    pixels = b"\x89PNG" * 50_000  # more than a word of a command may have
    (tmp_path / "PICTURE.png").write_bytes(pixels)
    made = picture[: picture.index("| \\")]
    done = subprocess.run(["bash", "-c", made], cwd=tmp_path, capture_output=True, check=True, text=True)
    content = json.loads(done.stdout)["messages"][0]["content"]
    assert base64.b64decode(content[0]["image_url"]["url"].partition(",")[2]) == pixels
    assert content[1] == {"type": "text", "text": "What can you see?"}
    port = announce(Key(value="K3Y", spelled="K3Y", made=True), as_json=True)
    record = json.loads(capsys.readouterr().out)
    assert record == {"url": f"http://127.0.0.1:{port}/v1", "model": "it's", "key": "K3Y", "port": port}


def test_a_given_key_is_not_printed_and_exposure_is_warned_of(capsys: pytest.CaptureFixture[str]) -> None:
    announce(Key(value="S3CRET", spelled="$PLAIT_API_KEY", warning="others can read it"), host="0.0.0.0")
    captured = capsys.readouterr()
    assert "S3CRET" not in captured.out + captured.err
    assert '"Authorization: Bearer $PLAIT_API_KEY"' in captured.out
    assert "http://127.0.0.1:" in captured.out
    assert "clear text" in captured.err
    assert "others can read it" in captured.err
    announce(Key(value="S3CRET", spelled="$PLAIT_API_KEY"), as_json=True)
    assert json.loads(capsys.readouterr().out)["key"] is None


def test_a_missing_extra_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ResourceError, match="needs fastapi and uvicorn") as caught:
        serve._need_extra()
    assert caught.value.remedy == pip_install("plait[serve]")


def test_faults_of_usage_come_before_anything_loads(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path
) -> None:
    monkeypatch.setitem(VERBS, "serve", "answer")
    (tmp_path / "plait.json").write_text("{}")
    for words, code in ((["--host", "0.0.0.0"], 2), (["--port", "70000"], 2), (["--port", "x"], 2)):
        assert plait(["serve", str(tmp_path), *words]) == code
        assert "loading" not in capsys.readouterr().err
    assert plait(["serve", str(tmp_path), "--port", "0", "--key-file", str(tmp_path / "none")]) == 2
    assert "cannot read the key" in capsys.readouterr().err
    assert plait(["serve", str(tmp_path), "--port", "0"]) == 7
    assert "kind None" in capsys.readouterr().err


def test_parsing_the_arguments() -> None:
    parser = argparse.ArgumentParser()
    serve.add(parser)
    args = parser.parse_args(["runs/x"])
    assert (args.model, args.host, args.port, args.expose) == ("runs/x", "127.0.0.1", 8000, False)
