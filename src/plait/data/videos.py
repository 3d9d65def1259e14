"""The only place that opens videos: bytes from anywhere in, chosen frames as RGB pictures or a ``MediaError`` out.

FFmpeg's decoders through PyAV (extra ``video``), of three containers, named by their first bytes: nothing is guessed,
and no file can name another one to read. What is missing at the end is found before a frame is decoded; damage inside
that a decoder smooths over is not seen.
"""

from __future__ import annotations

import contextlib
import io
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from PIL import Image

from plait.core.errors import ConfigError
from plait.data.media import MediaError

VIDEOS: Mapping[str, str] = {"MP4": "mp4", "MATROSKA": "mkv", "AVI": "avi"}
"""Containers that are opened, and the file name ending each gets inside a shard; MP4 is MOV too, Matroska is WebM."""

_CONVERT = "convert it, such as by `ffmpeg -i IN -c:v libx264 OUT.mp4`"
_EBML, _SEGMENT = b"\x1a\x45\xdf\xa3", b"\x18\x53\x80\x67"


@dataclass(frozen=True, slots=True, kw_only=True)
class VideoLimits:
    """What a video may cost at most.

    Attributes:
        max_pixels: Width times height of a frame.
        max_frames: There are; all of them up to the last chosen one are decoded.
        max_bytes: Encoded size.
    """

    max_pixels: int = 10_000_000
    max_frames: int = 216_000
    max_bytes: int = 2**30


VIDEO_LIMITS = VideoLimits()
"""The default limits: 4K, two hours at 30 frames a second, 1 GiB."""


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

        Turned as the file says (a telephone's videos lie on their side), 8 bits a channel. Pixels count as squares.

        Raises:
            MediaError: A frame cannot be decoded, or they are fewer than the file says.
        """
        wanted, found = set(indices), dict[int, Image.Image]()
        if wanted and not 0 <= min(wanted) <= max(wanted) < self.total:
            raise ValueError(f"frames {min(wanted)} to {max(wanted)} of a video of {self.total}")
        number = -1
        with _opened(self.data, self.format, place=self.place, limits=self.limits) as (container, stream):
            for number, frame in enumerate(container.decode(stream)):
                if number in wanted:
                    found[number] = _upright(frame)
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


def open_video(data: bytes, *, place: str, limits: VideoLimits = VIDEO_LIMITS) -> Video:
    """Open a video and count its frames, without decoding them.

    Args:
        data: The encoded bytes.
        place: Where they come from, for errors.
        limits: Refused beyond these.

    Raises:
        MediaError: Empty, of no listed container, cut off, without pictures, over the limits, or damaged; the cause
            says which, with the numbers.
        ConfigError: PyAV is not installed.

    Example:
        ``open_video(path.read_bytes(), place=str(path)).frames([0, 30])`` is two pictures.
    """
    kind = sniff_video(data, place=place)
    if len(data) > limits.max_bytes:
        raise _over(f"{len(data):,} bytes", f"{limits.max_bytes:,}", place)
    if missing := _missing(kind, data):
        cause = f"the {kind} video is cut off: {missing:,} bytes are missing"
        raise MediaError("unreadable", cause, place=place, remedy="copy or download the file again")
    with _opened(data, kind, place=place, limits=limits) as (container, stream):
        # What an edit list leaves out is marked, and empty packets hold no frame.
        total = sum(bool(packet.size) and not packet.is_discard for packet in container.demux(stream))
        width, height = stream.codec_context.width, stream.codec_context.height
    if total < 1:
        raise MediaError("unreadable", "the video has no frame", place=place, remedy="replace or remove the file")
    if total > limits.max_frames:
        raise _over(f"{total:,} frames", f"{limits.max_frames:,}", place)
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
            "reading videos needs the package av (PyAV)", place=place, remedy="pip install 'plait[video]'"
        ) from error

    try:
        with av.open(io.BytesIO(data), format=VIDEOS[kind].replace("mkv", "matroska")) as container:
            pictured = container.streams.video  # the cover of a song is one picture
            streams = [stream for stream in pictured if not stream.disposition & Disposition.attached_pic]
            if not streams:
                others = ", ".join(sorted({stream.type for stream in container.streams})) or "nothing"
                raise MediaError(
                    "unreadable",
                    f"the {kind} file has no video stream, only {others}",
                    place=place,
                    remedy="give a file with moving pictures; sounds go as WAV",
                )
            stream = streams[0]
            pixels = stream.codec_context.width * stream.codec_context.height
            if pixels > limits.max_pixels:
                raise _over(f"frames of {pixels / 1e6:,.1f} MP", f"{limits.max_pixels / 1e6:,.0f} MP", place)
            stream.codec_context.options = {"max_pixels": str(limits.max_pixels)}  # the size may change on the way
            yield container, stream
    except av.FFmpegError as error:
        raise MediaError(
            "unreadable", f"the {kind} video is damaged: {error.strerror or error}", place=place, remedy=_CONVERT
        ) from error


def _upright(frame: Any) -> Image.Image:
    picture: Image.Image = frame.to_image()
    return picture.rotate(frame.rotation, expand=True) if frame.rotation else picture


def _over(what: str, allowed: str, place: str) -> MediaError:
    return MediaError(
        "too-large", f"the video has {what}, allowed are {allowed}", place=place, remedy="cut it, or scale it down"
    )


# --- what is missing at the end: FFmpeg would give the frames before it, and say nothing -----------------------------


def _missing(kind: str, data: bytes) -> int:
    """Bytes that the container says it has and has not."""
    if kind == "AVI":
        return max(0, int.from_bytes(data[4:8], "little") + 8 - len(data))
    return max(0, (_end_of_boxes(data) if kind == "MP4" else _end_of_segment(data)) - len(data))


def _end_of_boxes(data: bytes) -> int:
    """Where the last box of an MP4 ends."""
    at = 0
    while 0 <= at <= len(data) - 8:
        size, head = int.from_bytes(data[at : at + 4], "big"), 8
        if size == 1:
            size, head = int.from_bytes(data[at + 8 : at + 16], "big"), 16
        if size < head:  # 0: to the end of the file; anything else FFmpeg judges
            return len(data)
        at += size
    return at


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
