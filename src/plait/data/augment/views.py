"""Views: the same drawing in another hand, so that what is learned is the thing and not one artist's style.

A view is a pure function of the picture and its number, so that its features can be cached like the picture's own.
It is never mirrored: names and questions say left and right.
"""

from __future__ import annotations

import hashlib
import random
from dataclasses import dataclass

from PIL import Image, ImageChops, ImageEnhance, ImageFilter

from plait.core.errors import ConfigError

_VERSION = 1
"""Raise when the pixels of a view change, so that cached features are made anew."""

_OUTLINE = 0.7  # share of views with dark outlines, which some drawing styles have and others lack


@dataclass(frozen=True, slots=True)
class View:
    """One of several changed copies of a picture: color, outline, angle, size and place, on white.

    Attributes:
        number: Which copy, from 1.

    Raises:
        ConfigError: The number is below 1.
    """

    number: int

    def __post_init__(self) -> None:
        if self.number < 1:
            raise ConfigError(f"number is {self.number}", place="view", remedy="count views from 1")

    def key(self, base: str) -> str:
        """Key of a feature cache of this view, from that of the pictures as they are."""
        return hashlib.sha256(f"{base} view {_VERSION} {self.number} False".encode()).hexdigest()

    def __call__(self, picture: Image.Image) -> Image.Image:
        """RGB picture to RGB picture of the same size; the same every time."""
        seed = hashlib.sha256(picture.tobytes() + f"{picture.size} {self.number}".encode()).hexdigest()
        rng = random.Random(seed)
        return _placed(_outlined(_colored(picture, rng), rng), rng)


def _colored(picture: Image.Image, rng: random.Random) -> Image.Image:
    picture = ImageEnhance.Color(picture).enhance(rng.uniform(0.0, 1.6))
    picture = ImageEnhance.Brightness(picture).enhance(rng.uniform(0.75, 1.25))
    picture = ImageEnhance.Contrast(picture).enhance(rng.uniform(0.7, 1.4))
    hue, saturation, value = picture.convert("HSV").split()
    shift = rng.randint(-18, 18)
    turned = hue.point([(level + shift) % 256 for level in range(256)])
    return Image.merge("HSV", (turned, saturation, value)).convert("RGB")


def _outlined(picture: Image.Image, rng: random.Random) -> Image.Image:
    if rng.random() >= _OUTLINE:
        return picture
    return outlined(picture, threshold=rng.choice((25, 40)))


def outlined(picture: Image.Image, *, threshold: int) -> Image.Image:
    """Black lines, three pixels wide, along edges.

    Args:
        picture: RGB.
        threshold: Least level of the edge filter that is a line.
    """
    gray = picture.convert("L")
    edges = gray.filter(ImageFilter.FIND_EDGES).point([255 if level > threshold else 0 for level in range(256)])
    # The filter copies the outermost pixels as they are: no edges there.
    inside = Image.new("L", picture.size, 0)
    inside.paste(255, (1, 1, max(picture.width - 1, 1), max(picture.height - 1, 1)))
    lines = ImageChops.darker(edges, inside).filter(ImageFilter.MaxFilter(3))
    return Image.composite(Image.new("RGB", picture.size, (0, 0, 0)), picture, lines)


def _placed(picture: Image.Image, rng: random.Random) -> Image.Image:
    white = (255, 255, 255)
    turned = picture.rotate(rng.uniform(-12, 12), Image.Resampling.BICUBIC, fillcolor=white)
    factor = rng.uniform(0.75, 1.15)
    width, height = (max(1, round(side * factor)) for side in picture.size)
    scaled = turned.resize((width, height), Image.Resampling.BICUBIC)
    reach = max(1, picture.width // 18)
    at = [(own - new) // 2 + rng.randint(-reach, reach) for own, new in zip(picture.size, (width, height), strict=True)]
    canvas = Image.new("RGB", picture.size, white)
    canvas.paste(scaled, (at[0], at[1]))
    return canvas
