"""What a picture becomes: the account from its size alone, and pixels that agree with it."""

from __future__ import annotations

import json

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from PIL import Image

from plait.assembly.contract import ImageContract
from plait.assembly.fit import SQUARE, Fit, Native, Tiles
from plait.core.errors import CheckpointError, ConfigError, DataError

SIDES = st.one_of(st.integers(1, 90), st.sampled_from([1, 400, 4000]))
FITS = st.one_of(
    st.just(SQUARE),
    st.builds(Tiles, max_tiles=st.integers(2, 6)),
    st.builds(Native, cell=st.sampled_from([4, 7]), max_pixels=st.integers(49, 4000), min_pixels=st.integers(0, 49)),
)
SIZE = 16


def black(width: int, height: int) -> Image.Image:
    return Image.new("RGB", (width, height))


@settings(max_examples=150, deadline=None)
@given(width=SIDES, height=SIDES, fit=FITS)
@example(width=1, height=1, fit=Native(cell=16, max_pixels=4096))
@example(width=4000, height=1, fit=Native(cell=16, max_pixels=4096))
@example(width=1, height=4000, fit=Tiles(max_tiles=9))
def test_pixels_are_those_of_the_account_and_all_of_the_picture_is_there(width: int, height: int, fit: Fit) -> None:
    contract = ImageContract(size=SIZE, fit=fit)
    sizes = contract.sizes(width, height)
    media = contract.prepare(black(width, height))
    assert media.grid.tolist() == [[1, h, w] for h, w in sizes]
    assert len(media.values) == sum(h * w for h, w in sizes)
    assert media.values.min() >= 0
    assert media.values.max() <= 1
    for values, (h, w) in zip(media.values.split([h * w for h, w in sizes]), sizes, strict=True):
        dark = (values.view(h, w, 3) < 0.5).all(-1)
        rows, columns = dark.any(1).nonzero()[:, 0], dark.any(0).nonzero()[:, 0]
        assert dark.sum() == len(rows) * len(columns) > 0, "the picture is one rectangle, the rest is filling"
        assert abs(int(rows[0]) - (h - 1 - int(rows[-1]))) <= 1
        assert abs(int(columns[0]) - (w - 1 - int(columns[-1]))) <= 1
        if len(rows) > 1 and len(columns) > 1 and not isinstance(fit, Native):
            scale = min(h / height, w / width)
            assert (len(rows), len(columns)) == (round(height * scale), round(width * scale))


@settings(max_examples=300, deadline=None)
@given(width=SIDES, height=SIDES, cell=st.integers(1, 9), most=st.integers(81, 5000), least=st.integers(0, 81))
def test_native_items_are_whole_cells_within_the_limit(
    width: int, height: int, cell: int, most: int, least: int
) -> None:
    (item,) = Native(cell=cell, max_pixels=most, min_pixels=least).items(width, height, size=0)
    assert item.height % cell == item.width % cell == 0
    assert cell * cell <= item.height * item.width <= most
    if item.bent and min(item.height, item.width) > cell:  # one scale explains both sides, to within a cell
        least_scale = max((item.height - cell) / height, (item.width - cell) / width)
        assert least_scale <= min((item.height + cell) / height, (item.width + cell) / width)


def test_known_sizes() -> None:
    native = Native(cell=28, max_pixels=1_003_520, min_pixels=3136)
    assert native.items(640, 480, size=0) == ((476, 644, True),)
    assert native.items(1, 1, size=0) == ((56, 56, True),)
    # Qwen2-VL refuses this one; here it is a strip of 28 x 4,004 pixels, with the line in its middle.
    assert native.items(4000, 1, size=0) == ((28, 4004, False),)
    assert Native(cell=16, max_pixels=224 * 224).items(1, 4000, size=0) == ((3136, 16, False),)
    tiles = ImageContract(size=336, fit=Tiles(max_tiles=9))
    assert tiles.sizes(336, 200) == tiles.sizes(1, 1) == ((336, 336),)
    assert tiles.sizes(672, 672) == ((336, 336), (672, 672))
    assert tiles.sizes(4000, 1) == ((336, 336), (336, 3024))


def test_a_picture_of_its_own_size_is_not_touched() -> None:
    generator = torch.Generator().manual_seed(0)
    pixels = torch.randint(0, 256, (8, 12, 3), dtype=torch.uint8, generator=generator)
    picture = Image.fromarray(pixels.numpy())
    media = ImageContract(size=SIZE, fit=Native(cell=4, max_pixels=400)).prepare(picture)
    assert torch.equal((media.values * 255).round().byte().view(8, 12, 3), pixels)
    tiled = ImageContract(size=4, fit=Tiles(max_tiles=6)).prepare(picture)
    assert torch.equal((tiled.values[16:] * 255).round().byte().view(8, 12, 3), pixels)


def test_squares_are_written_as_they_were_before_there_was_a_choice() -> None:
    fields = ["background", "mean", "resample", "size", "std"]
    assert sorted(ImageContract(size=64).as_dict()) == fields
    for fit in (Native(cell=14, max_pixels=5000), Tiles(max_tiles=4)):
        contract = ImageContract(size=64, fit=fit)
        record = json.loads(json.dumps(contract.as_dict()))
        assert ImageContract.from_dict(record) == contract
        with pytest.raises(CheckpointError, match="fit is"):
            ImageContract.from_dict(record | {"fit": {"kind": "stretched"}})
        with pytest.raises(CheckpointError, match="fit is"):
            ImageContract.from_dict(record | {"fit": {**record["fit"], "more": 1}})


@pytest.mark.parametrize("fit", [SQUARE, Native(cell=4, max_pixels=64), Tiles(max_tiles=2)])
def test_a_size_that_is_not_known_is_refused(fit: Fit) -> None:
    with pytest.raises(DataError, match="0 x 5 pixels"):
        ImageContract(size=8, fit=fit).sizes(0, 5)


def test_settings_that_hold_no_picture_are_refused() -> None:
    with pytest.raises(ConfigError, match="cell 28"):
        Native(cell=28, max_pixels=700)
    with pytest.raises(ConfigError, match="min_pixels 99"):
        Native(cell=2, max_pixels=50, min_pixels=99)
    with pytest.raises(ConfigError, match="max_tiles is 1"):
        Tiles(max_tiles=1)
