from __future__ import annotations

import numpy as np
import pytest
from PIL import Image, ImageDraw

from plait.core.errors import ConfigError
from plait.data.augment.views import View

pytestmark = pytest.mark.light


def drawing(size: tuple[int, int] = (48, 40)) -> Image.Image:
    """A red disk with a blue corner, on white."""
    picture = Image.new("RGB", size, (255, 255, 255))
    draw = ImageDraw.Draw(picture)
    draw.ellipse((8, 6, size[0] - 8, size[1] - 6), fill=(200, 40, 30))
    draw.rectangle((10, 8, 20, 16), fill=(20, 60, 220))
    return picture


def test_a_view_is_a_function_of_picture_and_number() -> None:
    picture = drawing()
    before = picture.tobytes()
    views = [View(number)(picture).tobytes() for number in range(1, 7)]
    assert views == [View(number)(picture).tobytes() for number in range(1, 7)]
    assert picture.tobytes() == before, "the picture itself was drawn on"
    assert len({before, *views}) == 7, "two views, or a view and the picture, are the same"


@pytest.mark.parametrize("size", [(48, 40), (1, 1), (2, 3), (17, 90)])
def test_size_and_mode_stay(size: tuple[int, int]) -> None:
    picture = Image.new("RGB", size, (90, 120, 30))
    for number in range(1, 9):
        view = View(number)(picture)
        assert (view.size, view.mode) == (size, "RGB")


def test_the_background_stays_white() -> None:
    for number in range(1, 21):
        view = np.asarray(View(number)(drawing((96, 96)))).astype(int)
        # Brightness is between 0.75 and 1.25, so that white is never darker than three quarters.
        assert view[0, 0].min() > 150, f"view {number}"


def test_left_stays_left() -> None:
    """Names and questions say left and right, so no copy may be mirrored."""
    picture = Image.new("RGB", (64, 64), (255, 255, 255))
    ImageDraw.Draw(picture).rectangle((8, 20, 24, 44), fill=(0, 0, 0))

    def is_left(view: Image.Image) -> bool:
        dark = 255 - np.asarray(view.convert("L")).astype(float)
        dark[dark < 128] = 0
        return float((dark.sum(0) * np.arange(64)).sum() / dark.sum()) < 32

    assert all(is_left(View(number)(picture)) for number in range(1, 61))


def test_a_feature_cache_is_keyed_by_tower_and_number() -> None:
    keys = [view.key(base) for view in (View(1), View(2)) for base in ("a" * 64, "b" * 64)]
    assert len(set(keys)) == 4
    assert View(1).key("a") == View(1).key("a")
    assert not {"a" * 64, "b" * 64} & set(keys)


@pytest.mark.parametrize("number", [0, -1])
def test_views_are_counted_from_one(number: int) -> None:
    with pytest.raises(ConfigError, match=f"number is {number}"):
        View(number)
