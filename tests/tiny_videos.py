"""Tiny videos, written by FFmpeg."""

from __future__ import annotations

import io

import av
import numpy as np

SIZE = (40, 24)
"""Pixels: width, height."""


def video(
    frames: int = 12, *, seed: int = 0, size: tuple[int, int] = SIZE, container: str = "mp4", codec: str = "libx264"
) -> bytes:
    """A grey that grows lighter from frame to frame (20 a frame, up to 240), on noise that the seed draws."""
    out = io.BytesIO()
    with av.open(out, "w", format=container) as file:
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
