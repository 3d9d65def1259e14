"""Starts a run in a process of its own and watches its metric while it works."""

from __future__ import annotations

import contextlib
import json
import math
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from plait.core.errors import ResourceError, UsageError
from plait.core.files import lock

_POLL_S = 0.2
_GRACE_S = 120.0
"""A checkpoint of a large model takes its time; then the process is killed, and its last checkpoint stays."""

_LOCK_S = 60.0
_STOPS = (signal.SIGHUP, signal.SIGINT, signal.SIGTERM)
_NO_MEMORY = ("out of memory", "memory ran out", "memory does not suffice")
_NO_DISK = ("No space left on device", "Disk quota exceeded", "Read-only file system", "Input/output error")
LOG = "output.txt"
"""In a run folder: what its process printed."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Ended:
    """How a process ended.

    Attributes:
        code: Of its exit; 0 if the run is finished.
        stopped: Whether the watcher ended it.
        error: Why it failed, in a line; empty if it did not.
    """

    code: int
    stopped: bool = False
    error: str = ""

    @property
    def signal(self) -> int:
        """Number of the signal by which somebody else ended it; 0 if nobody did."""
        found = next((s for s in _STOPS if self.code in (-s, 128 + s)), 0)
        return 0 if self.stopped else int(found)

    @property
    def machine(self) -> bool:
        """Whether the machine is at fault: disk, a device, a package. Memory is not: settings may ask for too much."""
        if self.stopped or not self.code:
            return False
        if any(said in self.error for said in _NO_DISK):
            return True
        return self.code == ResourceError.exit_code and not any(said in self.error for said in _NO_MEMORY)


Watcher = Callable[[bool], bool]
"""Looks at what the run wrote, told whether it has ended; False ends it."""


def work(run: Path, watch: Watcher | None = None) -> Ended:
    """Begin a run, or go on with it, until it ends or the watcher ends it by SIGTERM, which saves its state.

    Args:
        run: The run folder, with its recipe.
        watch: Asked again and again.

    Raises:
        UsageError: A process that has nothing to do with this one works on it.
    """
    _wait_until_free(run)
    watch = watch or (lambda _: True)
    goes_on = True
    with (run / LOG).open("ab") as log:
        process = subprocess.Popen(
            [sys.executable, "-m", "plait.recipes.search.child", str(run)],
            stdin=subprocess.PIPE,
            stdout=log,
            stderr=log,
        )
        try:
            while process.poll() is None:
                time.sleep(_POLL_S)
                if goes_on and not (goes_on := watch(False)):
                    process.terminate()
                    _wait(process)
        except BaseException:
            process.terminate()
            _wait(process)
            raise
        finally:
            if process.stdin:
                process.stdin.close()
    goes_on = goes_on and watch(True)
    code = process.returncode
    return Ended(code=code, stopped=not goes_on, error="" if code == 0 or not goes_on else _error(run, code))


def read_values(path: Path, field: str) -> Iterator[tuple[int, float | None]]:
    """Step and value of each whole record: not a number where the record says null, None where it has no such field."""
    if not path.is_file():
        return
    for line in path.read_text(encoding="utf-8", errors="replace").splitlines(keepends=True):
        record = _record(line)
        if isinstance(record.get("step"), int):
            value = record.get(field, math.nan)
            yield record["step"], math.nan if value is None else float(value) if field in record else None


def fields(path: Path) -> list[str]:
    """Numbers that a file of metrics tells."""
    found: dict[str, None] = {}
    for line in path.read_text(encoding="utf-8", errors="replace").splitlines(keepends=True) if path.is_file() else ():
        found |= dict.fromkeys(name for name in _record(line) if name != "step")
    return list(found)


def _record(line: str) -> dict[str, Any]:
    if not line.endswith("\n"):  # it is being written
        return {}
    try:
        found = json.loads(line)
    except ValueError:
        return {}
    return found if isinstance(found, dict) else {}


def _wait(process: subprocess.Popen[bytes]) -> None:
    try:
        process.wait(_GRACE_S)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()


def _wait_until_free(run: Path) -> None:
    """A process of a sweep that was killed is still saving its state."""
    until = time.monotonic() + _LOCK_S
    while True:
        try:
            with lock(run):
                return
        except UsageError:
            if time.monotonic() > until:
                raise
            time.sleep(_POLL_S)


def _error(run: Path, code: int) -> str:
    """The last fault that the run wrote down, or what its process ended with."""
    if code < 0:
        return f"its process was killed by signal {-code}" + (" (out of memory?)" if code == -9 else "")
    path = run / "events.jsonl"
    found = ""
    for line in path.read_text(encoding="utf-8", errors="replace").splitlines() if path.is_file() else ():
        with contextlib.suppress(ValueError):
            event = json.loads(line)
            if event.get("kind") == "error":
                found = " | ".join(str(event[key]) for key in ("cause", "place", "remedy") if event.get(key))
    return found or f"its process ended with code {code}; see {LOG}"
