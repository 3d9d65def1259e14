"""Decoding: what is changed is said, sizes and paths are checked, nothing is half a picture."""

from __future__ import annotations

import io
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from plait.core.errors import DataError
from plait.data.media import (
    CHANGES,
    FORMATS,
    LIMITS,
    Limits,
    MediaError,
    decode_image,
    encode_png,
    open_image,
    read_media,
    resolve_inside,
)

pytestmark = pytest.mark.light

RNG = np.random.default_rng(0)
PICTURE = Image.fromarray(RNG.integers(0, 256, (12, 20, 3), dtype=np.uint8)).resize((40, 24))


def encode(image: Image.Image, kind: str, **options: object) -> bytes:
    out = io.BytesIO()
    image.save(out, kind, **options)
    return out.getvalue()


@pytest.mark.parametrize("kind", FORMATS)
def test_every_listed_format_decodes_to_rgb_of_the_same_size(kind: str) -> None:
    decoded = open_image(encode(PICTURE, kind), place="x")
    assert (decoded.image.mode, decoded.image.size, decoded.format, decoded.changes) == ("RGB", (40, 24), kind, ())


@pytest.mark.parametrize("kind", ["PNG", "BMP"])
def test_lossless_formats_keep_every_pixel(kind: str) -> None:
    assert decode_image(encode(PICTURE, kind), place="x").tobytes() == PICTURE.tobytes()


@pytest.mark.parametrize("mode", ["L", "P", "1"])
def test_grey_and_palette_become_rgb_without_a_change(mode: str) -> None:
    source = PICTURE.convert(mode)
    decoded = open_image(encode(source, "PNG"), place="x")
    assert decoded.image.tobytes() == source.convert("RGB").tobytes()
    assert decoded.changes == ()


def test_one_pixel_is_a_picture() -> None:
    assert decode_image(encode(Image.new("RGB", (1, 1), (1, 2, 3)), "PNG"), place="x").getpixel((0, 0)) == (1, 2, 3)


@pytest.mark.parametrize("mode", ["RGBA", "LA"])
def test_transparency_goes_on_white_by_the_formula(mode: str) -> None:
    source = PICTURE.convert(mode)
    alpha = Image.fromarray(np.tile(np.linspace(0, 255, 40).astype(np.uint8), (24, 1)))
    source.putalpha(alpha)
    decoded = open_image(encode(source, "PNG"), place="x")
    color = np.asarray(source.convert("RGBA"))[..., :3].astype(float)
    share = np.asarray(alpha)[..., None] / 255
    expected = color * share + 255 * (1 - share)
    assert np.abs(np.asarray(decoded.image) - expected).max() <= 1
    assert decoded.changes == ("transparency-on-white",)


def test_opaque_alpha_is_no_change() -> None:
    assert open_image(encode(PICTURE.convert("RGBA"), "PNG"), place="x").changes == ()


def test_a_transparent_palette_color_becomes_white() -> None:
    source = Image.new("P", (4, 4), 3)
    source.putpalette([value for color in range(256) for value in (color, 0, 0)])
    decoded = open_image(encode(source, "PNG", transparency=3), place="x")
    assert decoded.image.getpixel((0, 0)) == (255, 255, 255)
    assert decoded.changes == ("transparency-on-white",)


def test_16_bit_grey_keeps_its_high_byte_and_is_not_clipped() -> None:
    values = np.linspace(0, 65535, 24 * 40).astype(np.uint16).reshape(24, 40)
    decoded = open_image(encode(Image.fromarray(values), "PNG"), place="x")
    assert decoded.changes == ("16-bit-to-8-bit",)
    np.testing.assert_array_equal(np.asarray(decoded.image)[..., 0], values >> 8)


def test_16_bit_color_is_noticed() -> None:
    import struct
    import zlib

    def chunk(kind: bytes, body: bytes) -> bytes:
        return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))

    row = b"\0" + struct.pack(">3H", 0x1234, 0xFFFF, 0x00FF)
    head = struct.pack(">2I5B", 1, 1, 16, 2, 0, 0, 0)
    data = b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", head) + chunk(b"IDAT", zlib.compress(row)) + chunk(b"IEND", b"")
    decoded = open_image(data, place="x")
    assert decoded.image.getpixel((0, 0)) == (0x12, 0xFF, 0x00)
    assert decoded.changes == ("16-bit-to-8-bit",)


def test_cmyk_becomes_rgb_and_is_counted() -> None:
    decoded = open_image(encode(Image.new("CMYK", (8, 8), (0, 255, 255, 0)), "JPEG", quality=95), place="x")
    red, green, blue = decoded.image.getpixel((4, 4))
    assert red > 200
    assert green < 60
    assert blue < 60
    assert decoded.changes == ("cmyk-to-rgb",)


@pytest.mark.parametrize("orientation", range(1, 9))
def test_exif_orientation_is_applied(orientation: int) -> None:
    exif = Image.Exif()
    exif[0x0112] = orientation
    source = Image.new("RGB", (16, 8), (0, 0, 255))
    source.paste((255, 0, 0), (0, 0, 8, 8))
    decoded = open_image(encode(source, "PNG", exif=exif), place="x")
    assert decoded.image.size == ((16, 8) if orientation < 5 else (8, 16))
    assert decoded.changes == (() if orientation == 1 else ("orientation-applied",))
    red_at = {1: (1, 4), 2: (14, 4), 3: (14, 4), 4: (1, 4), 5: (4, 1), 6: (4, 1), 7: (4, 14), 8: (4, 14)}
    assert decoded.image.getpixel(red_at[orientation]) == (255, 0, 0)


@pytest.mark.parametrize("kind", ["GIF", "WEBP", "PNG"])
def test_of_an_animation_the_first_frame_is_used_and_said(kind: str) -> None:
    frames = [Image.new("RGB", (8, 8), color) for color in ((255, 0, 0), (0, 255, 0), (0, 0, 255))]
    options = {"lossless": True} if kind == "WEBP" else {}
    decoded = open_image(encode(frames[0], kind, save_all=True, append_images=frames[1:], **options), place="x")
    assert decoded.image.getpixel((4, 4)) == (255, 0, 0)
    assert decoded.changes == ("first-frame",)


@settings(max_examples=60, deadline=None)
@given(kind=st.sampled_from(sorted(FORMATS)), data=st.data())
def test_a_cut_off_file_is_refused_or_complete_never_half_a_picture(kind: str, data: st.DataObject) -> None:
    whole = encode(PICTURE, kind)
    part = whole[: data.draw(st.integers(0, len(whole) - 1))]
    reason = ""
    image = None
    try:
        image = decode_image(part, place="x")
    except MediaError as error:
        reason = error.reason
    if image is None:
        assert reason == "unreadable"
    else:
        assert image.tobytes() == decode_image(whole, place="x").tobytes()


@settings(max_examples=80, deadline=None)
@given(kind=st.sampled_from(sorted(FORMATS)), data=st.data())
def test_damaged_bytes_give_a_picture_or_one_kind_of_error(kind: str, data: st.DataObject) -> None:
    whole = bytearray(encode(PICTURE, kind))
    for _ in range(data.draw(st.integers(1, 6))):
        whole[data.draw(st.integers(0, len(whole) - 1))] = data.draw(st.integers(0, 255))
    try:
        image = decode_image(bytes(whole), place="x", limits=Limits(max_pixels=100_000))
    except MediaError:
        return
    assert image.mode == "RGB"


def test_the_limits_are_inclusive_and_named() -> None:
    data = encode(Image.new("RGB", (10, 10)), "PNG")
    assert decode_image(data, place="x", limits=Limits(max_pixels=100)).size == (10, 10)
    with pytest.raises(MediaError, match=r"10 x 10 .* decompression bomb|decompression bomb.*10 x 10") as refused:
        decode_image(data, place="here.png", limits=Limits(max_pixels=99))
    assert (refused.value.reason, refused.value.place) == ("too-large", "here.png")
    with pytest.raises(MediaError, match=f"{len(data):,} bytes"):
        decode_image(data, place="x", limits=Limits(max_bytes=len(data) - 1))


def test_reading_stays_inside_the_root(tmp_path: Path) -> None:
    root = tmp_path / "root"
    (root / "sub").mkdir(parents=True)
    (root / "sub/a.bin").write_bytes(b"abc")
    (tmp_path / "secret").write_bytes(b"s")
    (tmp_path / "root-2").mkdir()
    (tmp_path / "root-2/b").write_bytes(b"b")
    (root / "inside").symlink_to(root / "sub/a.bin")
    (root / "outside").symlink_to(tmp_path / "secret")
    (root / "loop").symlink_to(root / "loop")
    assert read_media(Path("sub/a.bin"), allowed_root=root) == b"abc"
    assert read_media(root / "inside", allowed_root=root) == b"abc"
    for path in ("outside", "../secret", "/etc/passwd", "../root-2/b", "sub/../../secret"):
        with pytest.raises(MediaError) as refused:
            read_media(Path(path), allowed_root=root)
        assert refused.value.reason == "outside-root", path
    for path in ("absent", "loop", "nul\0l", "sub"):
        with pytest.raises(MediaError) as refused:
            read_media(Path(path), allowed_root=root)
        assert refused.value.reason == "no-file", path
    with pytest.raises(MediaError) as refused:
        read_media(Path("sub/a.bin"), allowed_root=root, limits=Limits(max_bytes=2))
    assert refused.value.reason == "too-large"
    assert resolve_inside(Path("."), root) == root


def test_a_pipe_is_refused_at_once(tmp_path: Path) -> None:
    import os

    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(MediaError, match="not a regular file"):
        read_media(Path("pipe"), allowed_root=tmp_path)


def test_a_refusal_is_a_data_error_with_a_remedy() -> None:
    with pytest.raises(DataError) as refused:
        decode_image(b"%PDF-1.7", place="a.pdf")
    assert refused.value.remedy
    assert "25 50 44 46" in refused.value.cause


def test_png_bytes_depend_on_pixels_alone() -> None:
    assert encode_png(PICTURE) == encode_png(PICTURE.copy())
    assert decode_image(encode_png(PICTURE), place="x").tobytes() == PICTURE.tobytes()


def test_defaults_are_below_where_pillow_begins_to_warn() -> None:
    assert Image.MAX_IMAGE_PIXELS is not None
    assert LIMITS.max_pixels < Image.MAX_IMAGE_PIXELS
    assert all(CHANGES.values())
