"""``plait serve MODEL``: an OpenAI-compatible server on this machine."""

from __future__ import annotations

import argparse
import ipaddress
import json
import socket
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING

from plait.cli.output import Out
from plait.core.errors import ResourceError, UsageError, pip_install

if TYPE_CHECKING:
    from plait.serving.auth import Key

_GRACE_S = 10
"""How long answers at work may go on after Ctrl-C."""


def add(parser: argparse.ArgumentParser) -> None:
    """Arguments of the verb."""
    parser.add_argument(
        "model",
        nargs="?",
        default="latest",
        help="a run (default: the latest), a stage's folder, a checkpoint, or a folder of Hugging Face's",
    )
    parser.add_argument("--host", default="127.0.0.1", help="address to listen on (default: 127.0.0.1, loopback only)")
    parser.add_argument("--port", type=_port, default=8000, help="port (default: 8000; 0 takes a free one)")
    parser.add_argument("--name", help="what clients call the model (default: its run)")
    parser.add_argument(
        "--key-file", type=Path, metavar="F", help="file with the key (default: $PLAIT_API_KEY, else a new one)"
    )
    parser.add_argument(
        "--expose",
        action="store_true",
        help="allow a --host that other machines reach: whoever has the key may then ask, in clear text (no TLS)",
    )
    parser.add_argument(
        "--runs", type=Path, default=Path("runs"), metavar="FOLDER", help="where run folders are (default: runs)"
    )


def main(args: argparse.Namespace, out: Out) -> int:
    """Serve until Ctrl-C or SIGTERM, which end it as they end every verb."""
    from plait.inference.load import find_model_folder, load, model_name

    folder = find_model_folder(args.model, args.runs)
    name = args.name or model_name(folder)
    with _listen(args.host, args.port, expose=args.expose) as listener:
        _say(f"loading {folder}")
        begun = time.monotonic()
        _need_extra()
        import uvicorn

        from plait.serving.app import create_app
        from plait.serving.auth import find_key

        key = find_key(args.key_file)
        app = create_app(load(folder, say=_say), name=name, key=key.value)
        _say(f"ready in {time.monotonic() - begun:.1f} s")
        listener.listen()  # whoever reads the announcement may connect at once
        _announce(listener, name, key, out=out)
        config = uvicorn.Config(
            app,
            log_config=None,
            access_log=False,
            ws="none",
            server_header=False,
            timeout_graceful_shutdown=_GRACE_S,
        )
        # It stops on the first SIGINT or SIGTERM, and then raises that signal again for whoever handles it here.
        uvicorn.Server(config).run(sockets=[listener])
    return 0


def _announce(listener: socket.socket, name: str, key: Key, *, out: Out) -> None:
    """Say where it is, and the key, once; with a command that works as it stands."""
    host, port = listener.getsockname()[:2]
    reach = str({"0.0.0.0": "127.0.0.1", "::": "::1"}.get(host, host))
    url = f"http://[{reach}]:{port}" if ":" in reach else f"http://{reach}:{port}"
    question = "What can you see?"
    data = _quoted({"model": name, "messages": [{"role": "user", "content": question}]})
    mark = "data:image/png;base64,"
    picture = {"type": "image_url", "image_url": {"url": mark}}
    content = [picture, {"type": "text", "text": question}]
    seen = _quoted({"model": name, "messages": [{"role": "user", "content": content}]})
    before, _, after = seen.rpartition(mark)  # the last of them: a name could hold it, too
    before += mark
    if key.warning:
        _say(f"warning: {key.warning}")
    if not ipaddress.ip_address(host.partition("%")[0]).is_loopback:
        _say(f"warning: {host} is reachable from other machines; the key and all pictures travel in clear text")
    out.line(f"serving {name} at {url}/v1 (OpenAI's chat completions; Ctrl-C ends)")
    out.line(f"key: {key.value}" if key.made else f"key: as given ({key.spelled})")
    ask = f"""curl {url}/v1/chat/completions -H "Authorization: Bearer {key.spelled}" \\
    -H 'Content-Type: application/json' -d"""
    out.line("try:")
    out.line(f"  {ask} {data}")
    out.line("with a picture:")  # through a pipe: a shell's words are too short for most pictures
    out.line(f"  {{ printf %s {before}'; base64 < PICTURE.png | tr -d '\\n'; printf %s '{after}; }} | \\")
    out.line(f"  {ask} @-")
    out.result({"url": f"{url}/v1", "model": name, "key": key.value if key.made else None, "port": port})


def _quoted(body: object) -> str:
    """JSON as one word of a shell."""
    return "'" + json.dumps(body, ensure_ascii=False).replace("'", "'\\''") + "'"


def _listen(host: str, port: int, *, expose: bool) -> socket.socket:
    """A bound socket that does not listen yet, so that nobody waits for a model that still loads.

    Raises:
        UsageError: The host is unknown, or other machines could reach it.
        ResourceError: The port is taken.
    """
    try:
        found = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)
    except (OSError, UnicodeError) as error:
        raise UsageError(f"no address {host!r}: {error}", place="--host", remedy="leave it out: 127.0.0.1") from error
    family, kind, protocol, _, address = found[0]
    here = all(ipaddress.ip_address(str(entry[4][0]).partition("%")[0]).is_loopback for entry in found)
    if not here and not expose:
        raise UsageError(
            f"{host} is no loopback address: other machines could reach the model",
            place="--host",
            remedy="leave --host out and tunnel (ssh -L 8000:127.0.0.1:8000), or add --expose: whoever has the key may "
            "then ask, and everything travels in clear text (no TLS)",
        )
    listener = socket.socket(family, kind, protocol)
    try:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind(address)
    except OSError as error:
        listener.close()
        raise ResourceError(
            f"cannot listen: {error.strerror}", place=f"{host}:{port}", remedy="choose another --port (0: a free one)"
        ) from error
    return listener


def _need_extra() -> None:
    """Look for the libraries before a model is loaded.

    Raises:
        ResourceError: One is missing; names the extra.
    """
    from importlib.util import find_spec

    missing = [name for name in ("fastapi", "uvicorn") if find_spec(name) is None]
    if missing:
        raise ResourceError(
            f"the server needs {' and '.join(missing)}", place="plait serve", remedy=pip_install("plait[serve]")
        )


def _port(text: str) -> int:
    number = int(text)
    if not 0 <= number < 2**16:
        raise argparse.ArgumentTypeError(f"{number} is no port: 0 to 65535")
    return number


def _say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)
