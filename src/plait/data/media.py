"""The only place that opens pictures: bytes from anywhere in, an RGB picture or a :class:`MediaError` out.

Pictures are hostile until proven otherwise. The format is recognized by its first bytes and must be on the list; the
size is read from the header and checked before a single pixel is decoded; a file that ends early is refused, never
padded with grey. TIFF and everything rarer is not on the list: their decoders are large and their files have many
pages and pixel types.

Embedded color profiles are ignored: pixels are taken as sRGB.
"""

from __future__ import annotations

import io
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image, ImageOps

from plait.core.errors import DataError

FORMATS: Mapping[str, str] = {"PNG": "png", "JPEG": "jpg", "WEBP": "webp", "GIF": "gif", "BMP": "bmp"}
"""Formats that are decoded, and the file name ending each gets inside a shard."""

CHANGES: Mapping[str, str] = {
    "first-frame": "animated; only the first frame is used",
    "orientation-applied": "turned or mirrored as its EXIF orientation says",
    "cmyk-to-rgb": "CMYK print colors converted to RGB without a color profile",
    "16-bit-to-8-bit": "the low byte of 16-bit channels cut off",
    "transparency-on-white": "transparent parts put on white",
    "exif-ignored": "damaged EXIF, so the orientation is not known",
}
"""What decoding may change and the picture still be used: name and meaning. Grey and palette pictures become RGB
without loss."""


ORIENTATION = 0x0112
"""Number of the EXIF field."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Limits:
    """What a picture may cost at most.

    Attributes:
        max_pixels: Width times height; 50 million RGB pixels are 150 MB. At most 89 million, where Pillow's own guard
            begins.
        max_bytes: Encoded size.
    """

    max_pixels: int = 50_000_000
    max_bytes: int = 64 * 2**20


LIMITS = Limits()
"""The default limits."""

STORED = Limits(max_pixels=89_000_000)
"""For pictures of our own shards: the data stage's setting let them in, and they are not judged twice."""


class MediaError(DataError):
    """A picture was refused.

    Args:
        reason: ``unreadable``, ``too-large``, ``no-file`` or ``outside-root``: what a ledger counts.
        cause: As in :class:`DataError`.
        place: Likewise.
        remedy: Likewise.
    """

    def __init__(self, reason: str, cause: str, *, place: str, remedy: str) -> None:
        super().__init__(cause, place=place, remedy=remedy)
        self.reason = reason


@dataclass(frozen=True, slots=True, kw_only=True)
class Decoded:
    """A picture and what decoding changed.

    Attributes:
        image: RGB, 8 bits a channel.
        format: A key of :data:`FORMATS`.
        changes: Keys of :data:`CHANGES`, sorted.
    """

    image: Image.Image
    format: str
    changes: tuple[str, ...]


def decode_image(data: bytes, *, place: str, limits: Limits = LIMITS) -> Image.Image:
    """The picture alone; see :func:`open_image`."""
    return open_image(data, place=place, limits=limits).image


def open_image(data: bytes, *, place: str, limits: Limits = LIMITS) -> Decoded:
    """Decode a picture safely.

    Args:
        data: The encoded bytes.
        place: Where they come from, for the error.
        limits: Refused beyond these.

    Raises:
        MediaError: Empty, of no listed format, over the limits, or damaged; the cause says which, with the numbers.
    """
    kind = sniff(data, place=place)
    _check_bytes(len(data), place, limits)
    _check_end(kind, data, place)
    try:
        opened = Image.open(io.BytesIO(data), formats=[kind])
    except (Image.DecompressionBombError, Image.DecompressionBombWarning) as error:
        raise _bomb(f"{error}".split(",")[0], place, limits) from error
    except Exception as error:  # decoders raise nearly anything on hostile bytes: all of it means the same here
        raise _damaged(kind, error, place) from error
    with opened:
        width, height = opened.size
        if width * height > limits.max_pixels:
            raise _bomb(f"the header says {width:,} x {height:,} = {width * height / 1e6:,.0f} MP", place, limits)
        try:
            image, changes = _to_rgb(opened)
        except Exception as error:  # as above
            raise _damaged(kind, error, place) from error
    return Decoded(image=image, format=kind, changes=tuple(sorted(changes)))


def sniff(data: bytes, *, place: str) -> str:
    """Recognize the format by the first bytes: a key of :data:`FORMATS`.

    Raises:
        MediaError: No bytes, or none of the listed formats.
    """
    if not data:
        raise MediaError(
            "unreadable", "the picture is empty (0 bytes)", place=place, remedy="replace or remove the file"
        )
    if data.startswith(b"\x89PNG\r\n\x1a\n"):
        return "PNG"
    if data.startswith(b"\xff\xd8\xff"):
        return "JPEG"
    if data[:4] == b"RIFF" and data[8:12] == b"WEBP":
        return "WEBP"
    if data.startswith((b"GIF87a", b"GIF89a")):
        return "GIF"
    if data.startswith(b"BM"):
        return "BMP"
    raise MediaError(
        "unreadable",
        f"not a picture of a known format (it begins with {data[:8].hex(' ')})",
        place=place,
        remedy=f"convert it to one of {', '.join(FORMATS)}",
    )


def read_media(path: Path, *, allowed_root: Path, limits: Limits = LIMITS) -> bytes:
    """Read a file that must lie inside a folder, links resolved.

    Raises:
        MediaError: The file is missing, is not a regular file, lies (or leads by a link) outside ``allowed_root``, or
            is too large.
    """
    resolved = resolve_inside(path, allowed_root)
    if not resolved.is_file():  # opening a named pipe would wait for ever
        raise MediaError("no-file", "not a regular file", place=str(path), remedy="name a file")
    try:
        _check_bytes(resolved.stat().st_size, str(path), limits)
        return resolved.read_bytes()
    except OSError as error:
        cause = f"cannot read: {error.strerror}"
        raise MediaError("no-file", cause, place=str(path), remedy="check the path and its permissions") from error


def resolve_inside(path: Path, allowed_root: Path) -> Path:
    """The real path of ``path``, which must be inside ``allowed_root``.

    Raises:
        MediaError: It is not there, or it is outside.
    """
    root = allowed_root.resolve()
    try:
        resolved = (root / path).resolve(strict=True)
    except (OSError, RuntimeError, ValueError) as error:  # RuntimeError: a loop of links; ValueError: a null byte
        cause = error.strerror if isinstance(error, OSError) else str(error)
        raise MediaError(
            "no-file", f"cannot find the file: {cause}", place=repr(str(path)), remedy="check the path"
        ) from error
    if not resolved.is_relative_to(root):
        raise MediaError(
            "outside-root",
            f"the path leads outside the allowed folder {root}",
            place=str(path),
            remedy="move the file inside, or allow its folder",
        )
    return resolved


def encode_png(image: Image.Image) -> bytes:
    """PNG bytes of a picture; the same pixels give the same bytes with the same Pillow."""
    out = io.BytesIO()
    image.save(out, "PNG")
    return out.getvalue()


# --- inside --------------------------------------------------------------------------------------------------------


def _to_rgb(opened: Image.Image) -> tuple[Image.Image, set[str]]:
    changes: set[str] = set()
    if getattr(opened, "is_animated", False):
        changes.add("first-frame")
    # Pillow cuts 16-bit color channels to 8 bits while decoding; only the decoder's own name for the pixels tells.
    if opened.mode.startswith("I") or any(";16B" in str(tile.args) for tile in getattr(opened, "tile", ())):
        changes.add("16-bit-to-8-bit")
    opened.load()
    image: Image.Image = opened
    try:
        if opened.getexif().get(ORIENTATION, 1) in range(2, 9):
            image = ImageOps.exif_transpose(opened)
            changes.add("orientation-applied")
    except Exception:  # damaged EXIF says nothing about the pixels: they stay as they are, and it is counted
        changes.add("exif-ignored")
    if image.mode.startswith("I"):
        image = _high_byte(image)
    if image.mode == "CMYK":
        changes.add("cmyk-to-rgb")
    if image.mode in ("RGBA", "LA", "PA") or "transparency" in image.info:
        image, seen = _on_white(image)
        if seen:
            changes.add("transparency-on-white")
    return image.convert("RGB"), changes


def _high_byte(image: Image.Image) -> Image.Image:
    """16-bit grey to 8-bit, as the decoder does with 16-bit color; Pillow's own conversion would clip it to white."""
    values = np.asarray(image).astype(np.int64)
    clear = image.info.get("transparency")
    grey = Image.fromarray((values >> 8).clip(0, 255).astype(np.uint8))
    if isinstance(clear, int):
        grey.putalpha(Image.fromarray(np.where(values == clear, 0, 255).astype(np.uint8)))
    return grey


def _on_white(image: Image.Image) -> tuple[Image.Image, bool]:
    rgba = image.convert("RGBA")
    low, _ = rgba.getchannel("A").getextrema()
    white = Image.new("RGBA", rgba.size, (255, 255, 255, 255))
    return Image.alpha_composite(white, rgba), low != 255


def _check_end(kind: str, data: bytes, place: str) -> None:
    """Refuse files that end early, whatever the decoder says: the end mark or the stated length must be there."""
    missing = ""
    if kind == "PNG" and b"IEND" not in data:
        missing = "its IEND chunk"
    elif kind == "JPEG" and b"\xff\xd9" not in data:
        missing = "its end-of-image mark"
    elif kind in ("WEBP", "BMP"):
        stated = int.from_bytes(data[4:8], "little") + 8 if kind == "WEBP" else int.from_bytes(data[2:6], "little")
        if stated > len(data) + (1 if kind == "WEBP" else 0):
            missing = f"{stated - len(data):,} of {stated:,} bytes"
    if missing:
        cause = f"the {kind} picture is cut off: {missing} missing"
        raise MediaError("unreadable", cause, place=place, remedy="copy or download the file again")


def _check_bytes(size: int, place: str, limits: Limits) -> None:
    if size > limits.max_bytes:
        raise MediaError(
            "too-large",
            f"the file has {size:,} bytes, allowed are {limits.max_bytes:,}",
            place=place,
            remedy="make it smaller, or raise the limit",
        )


def _bomb(cause: str, place: str, limits: Limits) -> MediaError:
    return MediaError(
        "too-large",
        f"refused as a decompression bomb: {cause}, allowed are {limits.max_pixels / 1e6:,.0f} MP",
        place=place,
        remedy="scale the picture down",
    )


def _damaged(kind: str, error: Exception, place: str) -> MediaError:
    cause = f"the {kind} picture is damaged: {error or type(error).__name__}"
    return MediaError("unreadable", cause, place=place, remedy="replace or remove the file")
