"""The only place that opens videos: bytes from anywhere in, chosen frames as RGB pictures or a ``MediaError`` out.

FFmpeg's decoders through PyAV (extra ``video``), of three containers, named by their first bytes: nothing is guessed,
and no file can name another one to read. What is missing at the end is found before a frame is decoded where the
container says how long it is. Not seen: the end of what was streamed (Matroska of unknown length; fragmented MP4 that
stops between two fragments), and damage inside that a decoder smooths over.
"""

from __future__ import annotations

import contextlib
import io
import math
import re
import struct
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from PIL import Image

from plait.core.errors import ConfigError, pip_install
from plait.data.media import MediaError

VIDEOS: Mapping[str, str] = {"MP4": "mp4", "MATROSKA": "mkv", "AVI": "avi"}
"""Containers that are opened, and the file name ending each gets inside a shard; MP4 is MOV too, Matroska is WebM."""

_CONVERT = "convert it, such as by `ffmpeg -i IN -c:v libx264 OUT.mp4`"
_EBML, _SEGMENT = b"\x1a\x45\xdf\xa3", b"\x18\x53\x80\x67"
_TOP = frozenset(
    b"ftyp styp moov moof mdat free skip wide uuid sidx ssix prft emsg mfra meta pdin pnot PICT udta imda".split()
)
"""Boxes that an MP4 or MOV file is made of; other bytes behind the last of them are none of the video's business."""
_HOLDERS = frozenset(b"moov trak mdia minf stbl edts dinf udta ilst tref wave mvex moof traf".split())
_TABLES = frozenset(b"stsz stz2 trun stts hdlr elst".split())
"""Boxes in which FFmpeg looks for tables of samples, and those that say how many it will keep."""
_TOP_BOXES, _BOXES = 100_000, 500_000
"""A file has at most so many, on top and in all; FFmpeg takes its time over each. Two hours have 7,200 fragments."""
_SAMPLES = 16
"""Samples of all tracks to an allowed frame; each costs FFmpeg some 36 bytes, whether the file has it or not."""


@dataclass(frozen=True, slots=True, kw_only=True)
class VideoLimits:
    """What a video may cost at most.

    Attributes:
        max_pixels: Width times height of a frame.
        max_frames: There are, shown or not.
        max_decoded: Pixels of all frames up to the last chosen one, as these are decoded for it.
        max_bytes: Encoded size.
    """

    max_pixels: int = 10_000_000
    max_frames: int = 216_000
    max_decoded: int = 10**11
    max_bytes: int = 2**30


VIDEO_LIMITS = VideoLimits()
"""The default limits: 4K, two hours at 30 frames a second (an hour of 720p, 26 minutes of 1080p), 1 GiB."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Video:
    """An opened video; its frames are decoded when they are asked for.

    Attributes:
        data: The encoded bytes.
        place: Where they come from, for errors.
        format: A key of :data:`VIDEOS`.
        total: Frames that it shows.
        width: Pixels, as stored.
        height: Pixels, as stored.
        limits: Refused beyond these.
    """

    data: bytes
    place: str
    format: str
    total: int
    width: int
    height: int
    limits: VideoLimits = VIDEO_LIMITS

    def frames(self, indices: Sequence[int]) -> list[Image.Image]:
        """Frames by their number, from 0 on; one may be asked for more than once.

        Turned and mirrored as the file says (a telephone's videos lie on their side), 8 bits a channel. Pixels count
        as squares.

        Raises:
            MediaError: A frame cannot be decoded or is to be turned by no quarters, they are fewer than the file says,
                or too many pixels would be decoded.
        """
        wanted, found = set(indices), dict[int, Image.Image]()
        if wanted and not 0 <= min(wanted) <= max(wanted) < self.total:
            raise ValueError(f"frames {min(wanted)} to {max(wanted)} of a video of {self.total}")
        self._affordable(max(wanted, default=-1) + 1)
        number, pixels = -1, 0
        with _opened(self.data, self.format, place=self.place, limits=self.limits) as (container, stream):
            for number, frame in enumerate(container.decode(stream)):
                pixels += frame.width * frame.height  # the size may change on the way
                if pixels > self.limits.max_decoded:
                    self._affordable(number + 1, pixels)
                if number in wanted:
                    found[number] = _upright(frame, self.place)
                    if len(found) == len(wanted):
                        break
        if len(found) < len(wanted):
            raise MediaError(
                "unreadable",
                f"the video has {self.total} frames by its own account, {number + 1} can be decoded",
                place=self.place,
                remedy=_CONVERT,
            )
        return [found[index] for index in indices]

    def _affordable(self, count: int, pixels: int = 0) -> None:
        pixels = pixels or count * self.width * self.height
        if pixels > self.limits.max_decoded:
            raise MediaError(
                "too-large",
                f"{count:,} frames of {self.width} x {self.height} must be decoded up to the last chosen one: "
                f"{pixels:,} pixels, allowed are {self.limits.max_decoded:,}",
                place=self.place,
                remedy="cut it, or scale it down",
            )


def open_video(data: bytes, *, place: str, limits: VideoLimits = VIDEO_LIMITS) -> Video:
    """Open a video and count its frames, without decoding them.

    Args:
        data: The encoded bytes.
        place: Where they come from, for errors.
        limits: Refused beyond these.

    Raises:
        MediaError: Empty, of no listed container, cut off, without pictures, of an unknown codec, over the limits, or
            damaged; the cause says which, with the numbers.
        ConfigError: PyAV is not installed.

    Example:
        ``open_video(path.read_bytes(), place=str(path)).frames([0, 30])`` is two pictures.
    """
    kind = sniff_video(data, place=place)
    if len(data) > limits.max_bytes:
        raise _over(f"{len(data):,} bytes", f"{limits.max_bytes:,}", place)
    if kind == "MP4":
        _check_boxes(data, place=place, limits=limits)
    if missing := _missing(kind, data):
        cause = f"the {kind} video is cut off: {missing:,} bytes are missing"
        raise MediaError("unreadable", cause, place=place, remedy="copy or download the file again")
    with _opened(data, kind, place=place, limits=limits) as (container, stream):
        width, height = stream.codec_context.width, stream.codec_context.height
        total = 0
        for number, packet in enumerate(container.demux(stream)):  # the last one is empty
            if number >= limits.max_frames and packet.size:
                raise _over(f"more than {limits.max_frames:,} frames", f"{limits.max_frames:,}", place)
            # What an edit list leaves out is marked, and empty packets hold no frame.
            total += bool(packet.size) and not packet.is_discard
    if total < 1:
        raise MediaError("unreadable", "the video has no frame", place=place, remedy="replace or remove the file")
    return Video(data=data, place=place, format=kind, total=total, width=width, height=height, limits=limits)


def sniff_video(data: bytes, *, place: str) -> str:
    """Recognize the container by the first bytes: a key of :data:`VIDEOS`.

    Raises:
        MediaError: No bytes, or none of the listed containers.
    """
    if not data:
        raise MediaError("unreadable", "the video is empty (0 bytes)", place=place, remedy="replace or remove the file")
    if data[4:8] in (b"ftyp", b"moov", b"mdat", b"wide"):  # all but the first: old QuickTime
        return "MP4"
    if data.startswith(_EBML):
        return "MATROSKA"
    if data[:4] == b"RIFF" and data[8:12] == b"AVI ":
        return "AVI"
    raise MediaError(
        "unreadable",
        f"not a video of a known container: MP4, MOV, Matroska, WebM or AVI (it begins with {data[:8].hex(' ')})",
        place=place,
        remedy=_CONVERT,
    )


@contextlib.contextmanager
def _opened(data: bytes, kind: str, *, place: str, limits: VideoLimits) -> Iterator[tuple[Any, Any]]:
    """Container and stream; faults of FFmpeg inside the block are said as what they are."""
    try:
        import av
        from av.stream import Disposition
    except ImportError as error:
        raise ConfigError(
            "reading videos needs the package av (PyAV)", place=place, remedy=pip_install("plait[video]")
        ) from error

    try:
        form = VIDEOS[kind].replace("mkv", "matroska")
        with av.open(io.BytesIO(data), format=form, metadata_errors="replace") as container:  # titles in any encoding
            pictured = container.streams.video  # the cover of a song is one picture
            streams = [stream for stream in pictured if not stream.disposition & Disposition.attached_pic]
            if not streams:
                others = ", ".join(sorted({stream.type for stream in container.streams})) or "nothing known"
                raise MediaError(
                    "unreadable",
                    f"the {kind} file has no video stream, only {others}",
                    place=place,
                    remedy="give a file with moving pictures; sounds go as WAV",
                )
            stream = streams[0]
            if stream.codec_context is None:
                cause = f"the codec of the {kind} video is not known here"
                raise MediaError("unreadable", cause, place=place, remedy=_CONVERT)
            pixels = stream.codec_context.width * stream.codec_context.height
            if pixels > limits.max_pixels:
                raise _over(f"frames of {pixels / 1e6:,.1f} MP", f"{limits.max_pixels / 1e6:,.0f} MP", place)
            stream.codec_context.options = {"max_pixels": str(limits.max_pixels)}  # the size may change on the way
            yield container, stream
    except av.FFmpegError as error:
        raise MediaError(
            "unreadable", f"the {kind} video is damaged: {error.strerror or error}", place=place, remedy=_CONVERT
        ) from error


def _upright(frame: Any, place: str) -> Image.Image:
    """Turned and mirrored by the display matrix, as by FFmpeg's ``autorotate``: x' = ax + cy, y' = bx + dy."""
    picture: Image.Image = frame.to_image()
    matrix = next((bytes(side) for side in frame.side_data if side.type.name == "DISPLAYMATRIX"), None)
    if matrix is None:
        return picture
    a, b, _, c, d = struct.unpack("=5i", matrix[:20])
    straight, across = min(abs(a), abs(d)), min(abs(b), abs(c))
    if not straight and not across:  # says nothing, such as all zeros
        return picture
    if max(abs(b), abs(c)) > straight / 50 and max(abs(a), abs(d)) > across / 50:  # a degree is 1/57
        degrees = math.degrees(math.atan2(b, a))
        raise MediaError(
            "unreadable",
            f"the video is to be shown turned by {degrees:.0f} degrees or slanted (matrix {a} {b} {c} {d}), known are "
            "quarters of a turn and mirroring",
            place=place,
            remedy=_CONVERT,
        )
    if across > straight:
        picture, a, d = picture.transpose(Image.Transpose.TRANSPOSE), c, b
    if a < 0:
        picture = picture.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
    return picture.transpose(Image.Transpose.FLIP_TOP_BOTTOM) if d < 0 else picture


def _over(what: str, allowed: str, place: str) -> MediaError:
    return MediaError(
        "too-large", f"the video has {what}, allowed are {allowed}", place=place, remedy="cut it, or scale it down"
    )


# --- what FFmpeg would believe or not say: tables of what is not there, and a missing end -----------------------------


def _missing(kind: str, data: bytes) -> int:
    """Bytes that the container says it has and has not."""
    if kind == "AVI":
        return max(0, int.from_bytes(data[4:8], "little") + 8 - len(data))
    return max(0, (_end_of_boxes(data) if kind == "MP4" else _end_of_segment(data)) - len(data))


def _end_of_boxes(data: bytes) -> int:
    """Where the last box of an MP4 ends, if it is one."""
    return max((end for kind, _, end in _boxes(data, 0, len(data)) if kind in _TOP), default=len(data))


def _boxes(data: bytes, at: int, end: int) -> Iterator[tuple[bytes, int, int]]:
    """Type, begin and end of the contents of each box; the last one may say that it ends behind ``end``."""
    while at <= end - 8:
        size, begin = _number(data, at), at + 8
        if size == 1:
            size, begin = int.from_bytes(data[at + 8 : at + 16], "big"), at + 16
        elif size == 0:
            size = end - at
        if at + size < begin:  # no box; FFmpeg judges
            return
        yield data[at + 4 : at + 8], begin, at + size
        at += size


def _check_boxes(data: bytes, *, place: str, limits: VideoLimits) -> None:
    """Refuse what makes FFmpeg fill the memory, or work for hours, before it decodes a frame.

    Raises:
        MediaError: Too many boxes, too many samples in their tables, or a compressed header, which could hide them.
    """
    for number, _ in enumerate(_boxes(data, 0, len(data)), start=1):
        if number > _TOP_BOXES:
            raise _over(f"more than {_TOP_BOXES:,} boxes side by side", f"{_TOP_BOXES:,}", place)
    samples, allowed = sum(_samples(data, track) for track in _tables(data, place)), limits.max_frames * _SAMPLES
    if samples > allowed:
        raise _over(f"{samples:,} samples by its own account", f"{allowed:,}", place)


def _tables(data: bytes, place: str) -> list[dict[bytes, list[int]]]:
    """Where the tables of each track begin, by their type; first those of no track, such as of fragments."""
    number, found = 0, [dict[bytes, list[int]]()]
    todo = [(0, len(data), found[0])]
    while todo:
        begin, within, tables = todo.pop()
        for kind, inside, behind in _boxes(data, begin, within):
            number, end = number + 1, min(behind, within)
            if number > _BOXES:
                raise _over(f"more than {_BOXES:,} boxes", f"{_BOXES:,}", place)
            if kind == b"cmov":
                cause = "the header of the MOV video is compressed"
                raise MediaError("unreadable", cause, place=place, remedy=_CONVERT)
            if kind == b"trak":
                found.append({})
                todo.append((inside, end, found[-1]))
            elif kind in _HOLDERS or data[inside + 4 : inside + 8] == b"moov":  # FFmpeg finds it even in free space
                todo.append((inside, end, tables))
            elif kind == b"meta":  # QuickTime's has no version before its first box
                todo.append((max(inside, data.find(b"hdlr", inside, end) - 4), end, tables))
            elif kind == b"stsd":  # what describes a track may hold boxes, behind fields that differ
                for table in re.finditer(b"stsz|stz2|trun", data[inside:end]):
                    tables.setdefault(table[0], []).append(inside + table.end())
            elif kind in _TABLES:
                tables.setdefault(kind, []).append(inside)
    return found


def _samples(data: bytes, track: Mapping[bytes, Sequence[int]]) -> int:
    """How many FFmpeg may keep of a track.

    Sounds of one tick a sample (PCM) it joins into runs of 1,024, and each entry of an edit list may repeat them all.
    """
    listed = sum(_number(data, at + 8) for table in (b"stsz", b"stz2") for at in track.get(table, ()))
    kinds = {data[at + 8 : at + 12] for at in track.get(b"hdlr", ())}
    ticks = {(_number(data, at + 4), _number(data, at + 12)) for at in track.get(b"stts", ())}
    if b"soun" in kinds and b"vide" not in kinds and ticks == {(1, 1)}:
        listed //= 1_024
    edits = sum(_number(data, at + 4) for at in track.get(b"elst", ()))
    return listed * max(1, edits) + sum(_number(data, at + 4) for at in track.get(b"trun", ()))


def _number(data: bytes, at: int) -> int:
    return int.from_bytes(data[at : at + 4], "big")


def _end_of_segment(data: bytes) -> int:
    """Where the one segment of a Matroska file ends; files that were streamed do not say."""
    size, at = _length(data, 4)
    at += size
    if data[at : at + 4] != _SEGMENT:
        return len(data)
    size, at = _length(data, at + 4)
    return at + size if size >= 0 else len(data)


def _length(data: bytes, at: int) -> tuple[int, int]:
    """A number of EBML (RFC 8794, section 4) and where it ends; -1: not known."""
    first = data[at] if at < len(data) else 0x80
    width = 9 - first.bit_length()
    value = int.from_bytes(data[at : at + width], "big") & ((1 << 7 * width) - 1)
    return (-1 if value == (1 << 7 * width) - 1 else value), at + width
