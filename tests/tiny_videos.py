"""Tiny videos, written by FFmpeg."""

from __future__ import annotations

import io
from collections.abc import Mapping

import av
import numpy as np

SIZE = (40, 24)
"""Pixels: width, height."""


def video(
    frames: int = 12,
    *,
    seed: int = 0,
    size: tuple[int, int] = SIZE,
    container: str = "mp4",
    codec: str = "libx264",
    options: Mapping[str, str] | None = None,
    title: str = "",
) -> bytes:
    """A grey that grows lighter from frame to frame (20 a frame, up to 240), on noise that the seed draws.

    ``options`` are of the container.
    """
    out = io.BytesIO()
    with av.open(out, "w", format=container, options=dict(options or {})) as file:
        file.metadata["title"] = title
        stream = file.add_stream(codec, rate=10)
        stream.width, stream.height, stream.pix_fmt = *size, "yuv420p"
        draw = np.random.default_rng(seed)
        for number in range(frames):
            shade = np.full((size[1], size[0], 3), min(20 * number, 240), np.float64)
            pixels = (shade + draw.uniform(0, 15 * bool(seed), shade.shape)).astype(np.uint8)
            file.mux(stream.encode(av.VideoFrame.from_ndarray(pixels, format="rgb24")))
        file.mux(stream.encode())
    return out.getvalue()


def sound_only() -> bytes:
    """An MP4 file without a picture."""
    out = io.BytesIO()
    with av.open(out, "w", format="mp4") as file:
        stream = file.add_stream("aac", rate=16_000, layout="mono")
        frame = av.AudioFrame.from_ndarray(np.zeros((1, 1_024), np.float32), format="fltp", layout="mono")
        frame.sample_rate = 16_000
        file.mux(stream.encode(frame))
        file.mux(stream.encode())
    return out.getvalue()


def box(kind: bytes, *contents: bytes) -> bytes:
    """Of an MP4 file."""
    inside = b"".join(contents)
    return (8 + len(inside)).to_bytes(4, "big") + kind + inside


def matrix(a: int, b: int, c: int, d: int) -> bytes:
    """Of an MP4 track's head, without its last column: 16.16 fixed point."""
    numbers = (a << 16, b << 16, 0, c << 16, d << 16, 0)
    return b"".join(n.to_bytes(4, "big", signed=True) for n in numbers)


def shown_by(data: bytes, matrix_of_track: bytes) -> bytes:
    """An MP4 file with another matrix for its picture."""
    movie, track, rest = data.split(matrix(1, 0, 0, 1))
    return movie + matrix(1, 0, 0, 1) + track + matrix_of_track + rest
