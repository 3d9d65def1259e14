"""Views of a picture while training: outlines, crop, flip, colors, gray, blur, inverted levels, by Pillow.

The operations are those of SimCLR (Chen et al., https://arxiv.org/abs/2002.05709, appendix A) and BYOL (Grill et al.,
https://arxiv.org/abs/2006.07733, appendix B). A view is a pure function of seed, epoch, sample id, view and picture:
whichever process, worker or micro-batch makes it, and whenever.
"""

from __future__ import annotations

import hashlib
import math
import random
from collections.abc import Callable

from PIL import Image, ImageEnhance, ImageFilter, ImageOps

from plait.data.augment.settings import Blur, Changes, Color, Crop
from plait.data.augment.views import outlined

_EDGE = 32  # of the edge filter's levels
_TRIES = 10
_LIKE = 224  # pixels a side in which blur is told


def draws(seed: int, *, epoch: int, sample: str, view: int) -> random.Random:
    """Random numbers of one view.

    Args:
        seed: Of the stage.
        epoch: How often the sample was seen before.
        sample: Its id.
        view: Which of its views, from 0.
    """
    digest = hashlib.sha256(f"{seed} view {epoch} {view} {sample}".encode()).digest()
    return random.Random(int.from_bytes(digest[:16], "little"))


def change(picture: Image.Image, how: Changes, *, size: int, rng: random.Random) -> Image.Image:
    """One view.

    Args:
        picture: RGB.
        how: Settings.
        size: Pixels a side that a crop is scaled to; without a crop the picture keeps its size.
        rng: Drawn from.
    """
    if rng.random() < how.outline:
        picture = outlined(picture, threshold=_EDGE)
    if how.crop is not None:
        picture = cropped(picture, box_of(*picture.size, how.crop, rng=rng), size)
    if rng.random() < how.flip:
        picture = ImageOps.mirror(picture)
    if rng.random() < how.color.chance:
        picture = recolored(picture, how.color, rng)
    if rng.random() < how.gray:
        picture = picture.convert("L").convert("RGB")
    if rng.random() < how.blur.chance:
        picture = picture.filter(ImageFilter.GaussianBlur(sigma_of(how.blur, picture, rng)))
    if rng.random() < how.solarize.chance:
        picture = ImageOps.solarize(picture, how.solarize.threshold)
    return picture


def box_of(width: int, height: int, how: Crop, *, rng: random.Random) -> tuple[int, int, int, int]:
    """Left, top, right and bottom of a crop (Szegedy et al., https://arxiv.org/abs/1409.4842, section 6).

    Area and ratio are drawn until the part lies inside; where ten draws give none, it is the largest part in the middle
    whose ratio is allowed.

    Args:
        width: Of the picture, in pixels.
        height: Likewise.
        how: Bounds.
        rng: Drawn from.
    """
    for _ in range(_TRIES):
        area = width * height * rng.uniform(*how.area)
        ratio = math.exp(rng.uniform(math.log(how.ratio[0]), math.log(how.ratio[1])))
        across, down = round(math.sqrt(area * ratio)), round(math.sqrt(area / ratio))
        if 0 < across <= width and 0 < down <= height:
            left, top = int(rng.random() * (width - across + 1)), int(rng.random() * (height - down + 1))
            return left, top, left + across, top + down
    across = min(width, max(1, round(height * how.ratio[1])))
    down = min(height, max(1, round(width / how.ratio[0])))
    left, top = (width - across) // 2, (height - down) // 2
    return left, top, left + across, top + down


def cropped(picture: Image.Image, box: tuple[int, int, int, int], size: int) -> Image.Image:
    """A part of a picture as a square: bicubic, antialiased where it shrinks; nothing outside of the part is seen."""
    return picture.crop(box).resize((size, size), Image.Resampling.BICUBIC)


def recolored(picture: Image.Image, how: Color, rng: random.Random) -> Image.Image:
    """Brightness, contrast, saturation and hue, in random order."""

    def factor(reach: float) -> float:
        return rng.uniform(max(0.0, 1 - how.strength * reach), 1 + how.strength * reach)

    bright, contrast, vivid = factor(how.brightness), factor(how.contrast), factor(how.saturation)
    turn = rng.uniform(-how.hue, how.hue) * how.strength
    steps: list[Callable[[Image.Image], Image.Image]] = [
        lambda p: ImageEnhance.Brightness(p).enhance(bright),
        lambda p: ImageEnhance.Contrast(p).enhance(contrast),
        lambda p: ImageEnhance.Color(p).enhance(vivid),
        lambda p: turned(p, turn),
    ]
    order = sorted((rng.random(), number) for number in range(len(steps)))
    for _, number in order:
        picture = steps[number](picture)
    return picture


def turned(picture: Image.Image, turn: float) -> Image.Image:
    """All hues turned, in Pillow's 256 steps of the color circle.

    Args:
        picture: RGB.
        turn: 1 is all the way round.
    """
    shift = round(turn * 256) % 256
    if not shift:
        return picture
    hue, saturation, value = picture.convert("HSV").split()
    hue = hue.point([(level + shift) % 256 for level in range(256)])
    return Image.merge("HSV", (hue, saturation, value)).convert("RGB")


def sigma_of(how: Blur, picture: Image.Image, rng: random.Random) -> float:
    """Standard deviation in pixels of this picture."""
    return rng.uniform(*how.sigma) * max(picture.size) / _LIKE
