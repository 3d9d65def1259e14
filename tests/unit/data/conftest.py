"""The small stand-in for the fetched packages, sealed as fetched ones are."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from pathlib import Path

import pytest


@pytest.fixture
def reseal(emoji_home: Callable[[str], Path], tmp_path: Path) -> Callable[[], None]:
    """Make what lies in the packages now what was published."""

    def seal() -> None:
        for package in (tmp_path / "home/packages").iterdir():
            files = sorted(path for path in package.rglob("*") if path.suffix in (".png", ".svg"))
            lines = (f"{hashlib.sha256(f.read_bytes()).hexdigest()}  {f.relative_to(package)}\n" for f in files)
            (package / "SHA256SUMS").write_text("".join(lines))

    seal()
    return seal
