"""Changed views of pictures: each operation against its formula, what is drawn against its bounds."""

from __future__ import annotations

import colorsys
import math
import random
from collections import Counter
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from plait.data.augment.pictures import box_of, change, cropped, draws, recolored, sigma_of, turned
from plait.data.augment.settings import Blur, Changes, Color, Crop, Solarize

pytestmark = pytest.mark.light

NOTHING = Changes(crop=None, flip=0.0, color=Color(chance=0.0), gray=0.0, blur=Blur(chance=0.0))


def noise(width: int = 20, height: int = 14, seed: int = 0) -> Image.Image:
    levels = np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)
    return Image.fromarray(levels)


def levels(picture: Image.Image) -> np.ndarray:
    return np.asarray(picture).astype(int)


def only(**how: Any) -> Image.Image:
    """One operation, always."""
    return change(noise(), NOTHING.model_copy(update=how), size=8, rng=random.Random(1))


def luma(pixels: np.ndarray) -> np.ndarray:
    """ITU-R 601-2, in Pillow's 16-bit fixed point."""
    return (pixels @ np.array([19595, 38470, 7471]) + 0x8000) >> 16


# --- each operation ------------------------------------------------------------------------------------------------


def test_nothing_changes_nothing() -> None:
    assert (levels(only()) == levels(noise())).all()


@pytest.mark.row("S2-25")
def test_a_flip_exchanges_left_and_right_and_twice_is_nothing() -> None:
    once = only(flip=1.0)
    assert (levels(once) == levels(noise())[:, ::-1]).all()
    again = change(once, NOTHING.model_copy(update={"flip": 1.0}), size=8, rng=random.Random(2))
    assert (levels(again) == levels(noise())).all()


def test_gray_is_the_luma_of_a_picture() -> None:
    gray = luma(levels(noise()))
    assert (levels(only(gray=1.0)) == gray[..., None]).all()


@pytest.mark.parametrize("threshold", [0, 100, 256])
def test_solarizing_inverts_levels_from_the_threshold_on(threshold: int) -> None:
    before = levels(noise())
    expected = np.where(before >= threshold, 255 - before, before)
    assert (levels(only(solarize=Solarize(chance=1.0, threshold=threshold))) == expected).all()


@pytest.mark.parametrize("channel", ["brightness", "contrast", "saturation"])
def test_colors_are_moved_from_what_has_none_of_it(channel: str) -> None:
    """``blank + factor (picture - blank)``: blank is black, the mean gray, and the picture's own gray."""
    none = {"brightness": 0.0, "contrast": 0.0, "saturation": 0.0, "hue": 0.0}
    before = levels(noise()).astype(float)
    gray = luma(levels(noise()))
    blank = {"brightness": 0.0, "contrast": int(gray.mean() + 0.5), "saturation": gray[..., None].astype(float)}[
        channel
    ]
    seen: list[float] = []
    for seed in range(20):
        found = levels(recolored(noise(), Color.model_validate(none | {channel: 0.5}), random.Random(seed)))
        free = (found > 0) & (found < 255) & (np.abs(before - blank) > 60)
        factors = ((found - blank) / np.where(np.abs(before - blank) > 60, before - blank, 1.0))[free]
        seen.append(float(np.median(factors)))
        expected = np.clip(blank + seen[-1] * (before - blank), 0, 255)
        assert np.abs(found - expected).max() <= 2  # rounded, and so is the factor found
    assert min(seen) > 0.49
    assert max(seen) < 1.51
    assert max(seen) - min(seen) > 0.6


def test_a_turn_of_the_color_circle_turns_hues_alone() -> None:
    pure = [(255, 0, 0), (0, 255, 0), (0, 0, 255), (128, 128, 128), (200, 40, 40)]
    picture = Image.new("RGB", (len(pure), 1))
    picture.putdata(pure)
    found = levels(turned(picture, 1 / 3))[0]
    for before, after in zip(pure, found.tolist(), strict=True):
        hue, saturation, value = colorsys.rgb_to_hsv(*(x / 255 for x in before))
        expected = [255 * x for x in colorsys.hsv_to_rgb((hue + 1 / 3) % 1, saturation, value)]
        assert np.abs(np.array(after) - expected).max() <= 6  # hues have 256 steps
    assert turned(picture, 0.0) is picture
    assert turned(picture, 1.0) is picture


def test_a_blur_is_the_gaussian_of_its_deviation() -> None:
    """A bright dot on black becomes a bell: its mass stays, its variance is sigma squared."""
    dot = Image.new("RGB", (41, 41))
    dot.paste((255, 255, 255), (19, 19, 22, 22))
    sigma = 224 / 41 * 3.0
    how = NOTHING.model_copy(update={"blur": Blur(chance=1.0, sigma=(sigma, sigma))})
    found = levels(change(dot, how, size=8, rng=random.Random(0)))[..., 0].astype(float)
    assert found.sum() == pytest.approx(9 * 255, rel=0.15)  # rounded to whole levels
    places = np.arange(41) - 20
    variance = (found.sum(0) * places**2).sum() / found.sum()
    assert variance == pytest.approx(3.0**2 + 2 / 3, rel=0.2)  # the dot itself has 2/3
    assert sigma_of(Blur(sigma=(1.0, 1.0)), noise(112, 112), random.Random(0)) == pytest.approx(0.5)


def test_outlines_are_black_lines_along_edges_and_nothing_else() -> None:
    flat = Image.new("RGB", (24, 24), (250, 240, 230))
    assert (
        levels(change(flat, NOTHING.model_copy(update={"outline": 1.0}), size=8, rng=random.Random(0))) == levels(flat)
    ).all()
    flat.paste((200, 30, 30), (8, 8, 16, 16))
    found = levels(change(flat, NOTHING.model_copy(update={"outline": 1.0}), size=8, rng=random.Random(0)))
    black = (found == 0).all(-1)
    assert black[8, 8:16].all()
    assert black[8:16, 15].all()
    assert not black[11:13, 11:13].any()
    assert not black[:5].any()
    assert (found[~black] == levels(flat)[~black]).all()


def test_a_crop_sees_nothing_outside_of_its_part() -> None:
    picture = Image.new("RGB", (20, 20), (255, 0, 0))
    picture.paste((0, 0, 255), (5, 5, 15, 15))
    assert levels(cropped(picture, (5, 5, 15, 15), 32)).reshape(-1, 3).tolist() == [[0, 0, 255]] * 32 * 32
    assert (levels(cropped(noise(), (2, 3, 10, 11), 8)) == levels(noise())[3:11, 2:10]).all()


# --- what is drawn -------------------------------------------------------------------------------------------------


@pytest.mark.row("S0-30")
@given(
    width=st.integers(1, 300),
    height=st.integers(1, 300),
    area=st.tuples(st.floats(0.02, 1.0), st.floats(0.02, 1.0)),
    ratio=st.tuples(st.floats(0.3, 3.0), st.floats(0.3, 3.0)),
    seed=st.integers(0, 10**6),
)
@settings(max_examples=300)
def test_crops_lie_inside_and_within_their_bounds(
    width: int, height: int, area: tuple[float, float], ratio: tuple[float, float], seed: int
) -> None:
    how = Crop(area=(min(area), max(area)), ratio=(min(ratio), max(ratio)))
    left, top, right, bottom = box_of(width, height, how, rng=random.Random(seed))
    assert 0 <= left < right <= width
    assert 0 <= top < bottom <= height
    across, down = right - left, bottom - top
    # Sides are whole pixels: half of one either way. Where no draw fitted, the area may be anything.
    fits = how.area[0] - 1e-9 <= (across + 0.5) * (down + 0.5) / (width * height)
    fits &= (across - 0.5) * (down - 0.5) / (width * height) <= how.area[1] + 1e-9
    middle = left == (width - across) // 2 and top == (height - down) // 2
    assert fits or middle
    if across < width and down < height:
        assert (across - 0.5) / (down + 0.5) <= how.ratio[1] + 1e-9
        assert (across + 0.5) / (down - 0.5) >= how.ratio[0] - 1e-9


@pytest.mark.row("S0-30")
def test_areas_are_drawn_evenly_and_places_all_over() -> None:
    rng, how = random.Random(0), Crop(area=(0.2, 0.6))
    boxes = [box_of(400, 400, how, rng=rng) for _ in range(4000)]
    shares = [(right - left) * (bottom - top) / 160_000 for left, top, right, bottom in boxes]
    assert min(shares) > 0.198
    assert max(shares) < 0.602
    for bound in (0.3, 0.4, 0.5):
        assert sum(share < bound for share in shares) / 4000 == pytest.approx((bound - 0.2) / 0.4, abs=0.03)
    ratios = [math.log((right - left) / (bottom - top)) for left, top, right, bottom in boxes]
    assert abs(sum(ratios)) / 4000 < 0.02
    centers = [(left + right) / 800 for left, _, right, _ in boxes]
    assert sum(centers) / 4000 == pytest.approx(0.5, abs=0.02)


def test_a_ratio_that_no_picture_allows_takes_the_largest_part_in_the_middle() -> None:
    how = Crop(area=(0.9, 1.0), ratio=(1.0, 1.0))
    assert box_of(100, 10, how, rng=random.Random(0)) == (45, 0, 55, 10)
    assert box_of(10, 100, how, rng=random.Random(0)) == (0, 45, 10, 55)


def test_chances_are_what_is_said() -> None:
    how = Changes(crop=None, flip=0.3, color=Color(chance=0.0), gray=0.0, blur=Blur(chance=0.0))
    marked = Image.new("RGB", (4, 4))
    marked.putpixel((0, 0), (255, 255, 255))
    flipped = sum(
        change(marked, how, size=4, rng=draws(0, epoch=0, sample=str(n), view=0)).getpixel((3, 0)) == (255, 255, 255)
        for n in range(2000)
    )
    assert flipped / 2000 == pytest.approx(0.3, abs=0.04)


@pytest.mark.row("S0-40")
def test_a_view_is_a_function_of_seed_epoch_sample_and_number() -> None:
    how = Changes()

    def view(seed: int = 0, epoch: int = 0, sample: str = "a", number: int = 0) -> bytes:
        return change(noise(), how, size=16, rng=draws(seed, epoch=epoch, sample=sample, view=number)).tobytes()

    assert view() == view()
    others = [view(seed=1), view(epoch=1), view(sample="b"), view(number=1), view()]
    assert Counter(Counter(others).values()) == {1: 5}


# --- what is refused -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("given", "says"),
    [
        ({"crop": {"area": [0.0, 1.0]}}, "area is"),
        ({"crop": {"area": [0.5, 0.2]}}, "smaller one first"),
        ({"crop": {"area": [0.5, 1.2]}}, "area is"),
        ({"crop": {"ratio": [2.0, 1.0]}}, "ratio is"),
        ({"flip": 1.5}, "flip"),
        ({"color": {"hue": 0.4, "strength": 2.0}}, "half a turn"),
        ({"color": {"brightness": -0.1}}, "brightness"),
        ({"blur": {"sigma": [2.0, 1.0]}}, "sigma is"),
        ({"solarize": {"threshold": 300}}, "threshold"),
        ({"rotate": 10}, "rotate"),
    ],
)
def test_what_is_none_is_refused(given: dict[str, Any], says: str) -> None:
    with pytest.raises(ValueError, match=says):
        Changes.model_validate(given)
