"""Exceptions a caller may catch; each says where, what was expected, what came, and what to do."""

from __future__ import annotations

import os
import shlex
import shutil
import sys
from pathlib import Path


class PlaitError(Exception):
    """A fault with a place and a remedy.

    Args:
        cause: One line: what was expected and what came, with the numbers.
        place: Where: ``file:line``, a sample id, a setting, a path.
        remedy: What to do about it, as an instruction.

    Attributes:
        code: Stable name for scripts and docs, one per class.
        exit_code: What the command line exits with.
        rank: In which of several processes it was met, if in another one than this; -1 if nobody knows.
    """

    code = "internal"
    exit_code = 1
    rank: int | None = None

    def __init__(self, cause: str, *, place: str = "", remedy: str = "") -> None:
        super().__init__(cause)
        self.cause = cause
        self.place = place
        self.remedy = remedy

    def __str__(self) -> str:
        parts = [self.cause]
        if self.place:
            parts.append(f"at {self.place}")
        if self.remedy:
            parts.append(f"fix: {self.remedy}")
        return " | ".join(parts)

    def as_dict(self) -> dict[str, str | int]:
        """Flat record for ``--json`` and ``events.jsonl``."""
        return {
            "code": self.code,
            "exit_code": self.exit_code,
            "cause": self.cause,
            "place": self.place,
            "remedy": self.remedy,
        }


class UsageError(PlaitError):
    """The command line itself is wrong (exit 2)."""

    code = "usage"
    exit_code = 2


class ConfigError(PlaitError):
    """A recipe or an override is wrong (exit 3)."""

    code = "config"
    exit_code = 3


class DataError(PlaitError):
    """Data is missing, unreadable or refused (exit 4)."""

    code = "data"
    exit_code = 4


class ResourceError(PlaitError):
    """Disk, memory, a package, the network or a device is missing (exit 5)."""

    code = "resource"
    exit_code = 5


class NumericsError(PlaitError):
    """A loss or gradient is not finite, or an invariant of the mathematics broke (exit 6)."""

    code = "numerics"
    exit_code = 6


class CheckpointError(PlaitError):
    """A checkpoint or model folder is missing, damaged or of another shape (exit 7)."""

    code = "checkpoint"
    exit_code = 7


class Stopped(KeyboardInterrupt):
    """Work ended because somebody asked: Ctrl-C (exit 130) or SIGTERM (exit 143). What was done so far is on disk.

    It is no :class:`PlaitError` and no ``Exception``, so that nothing takes it for a fault and goes on; whatever cleans
    up after Ctrl-C cleans up after it too.

    Args:
        signal: Number of the signal.
        text: One line for a person: what was saved.

    Attributes:
        exit_code: What the command line exits with: 128 + signal.
    """

    def __init__(self, signal: int, text: str) -> None:
        super().__init__(text)
        self.signal = signal
        self.exit_code = 128 + signal


def pip_install(what: str) -> str:
    """The command that installs something for the Python that runs, whatever ``pip`` is on the path.

    Args:
        what: Requirements as pip takes them, such as ``plait[video]``.

    Example:
        >>> pip_install("plait[video]").endswith("python -m pip install 'plait[video]'")
        True
    """
    python = Path(sys.executable)
    if shutil.which(python.name) == str(python):
        called = python.name
    else:
        short = os.path.relpath(python)
        called = str(python) if short.startswith(os.pardir) else short
    return f"{shlex.quote(called)} -m pip install '{what}'"
