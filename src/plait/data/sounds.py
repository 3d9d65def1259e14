"""The only place that opens sounds: bytes from anywhere in, mono samples or a ``MediaError`` out.

WAV files of whole numbers (8 to 32 bits) are read, nothing else: they need no decoder. What the header promises is
checked against limits before samples are touched, and a file that ends early is refused, never filled up with silence.
"""

from __future__ import annotations

import io
import wave
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from plait.data.media import MediaError

if TYPE_CHECKING:
    from numpy.typing import NDArray

SOUNDS: Mapping[str, str] = {"WAV": "wav"}
"""Formats that are decoded, and the file name ending each gets inside a shard."""


@dataclass(frozen=True, slots=True, kw_only=True)
class SoundLimits:
    """What a sound may cost at most.

    Attributes:
        max_seconds: Length.
        max_rate: Samples a second.
        max_channels: Mixed to one.
        max_bytes: Encoded size.
    """

    max_seconds: float = 600.0
    max_rate: int = 192_000
    max_channels: int = 8
    max_bytes: int = 256 * 2**20


SOUND_LIMITS = SoundLimits()
"""The default limits."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Sound:
    """A decoded sound.

    Attributes:
        samples: Mono, float32, from -1 to 1.
        rate: Samples a second.
        channels: Of the file; more than one were averaged.
        place: Where it comes from, for errors.
    """

    samples: NDArray[np.float32]
    rate: int
    channels: int
    place: str = ""

    @property
    def seconds(self) -> float:
        """Length."""
        return len(self.samples) / self.rate


def sniff_sound(data: bytes, *, place: str) -> str:
    """Recognize the format by the first bytes: a key of :data:`SOUNDS`.

    Raises:
        MediaError: No bytes, or none of the listed formats.
    """
    if not data:
        raise MediaError("unreadable", "the sound is empty (0 bytes)", place=place, remedy="replace or remove the file")
    if data[:4] == b"RIFF" and data[8:12] == b"WAVE":
        return "WAV"
    raise MediaError(
        "unreadable",
        f"not a sound of a known format (it begins with {data[:8].hex(' ')})",
        place=place,
        remedy=f"convert it to {', '.join(SOUNDS)} with whole numbers, such as 16-bit PCM",
    )


def decode_sound(data: bytes, *, place: str, limits: SoundLimits = SOUND_LIMITS) -> Sound:
    """Decode a sound safely.

    Args:
        data: The encoded bytes.
        place: Where they come from, for the error.
        limits: Refused beyond these.

    Raises:
        MediaError: Empty, of no listed format, over the limits, without samples, or damaged; the cause says which, with
            the numbers.

    Example:
        >>> from plait.data.speech import encode_wav
        >>> sound = decode_sound(encode_wav(np.array([0.5, -0.5]), 8_000), place="example")
        >>> sound.samples.tolist(), sound.rate
        ([0.5, -0.5], 8000)
    """
    sniff_sound(data, place=place)
    if len(data) > limits.max_bytes:
        raise _over(f"{len(data):,} bytes", f"{limits.max_bytes:,}", place)
    try:
        with wave.open(io.BytesIO(data), "rb") as file:
            channels, width, rate, count, *_ = file.getparams()
            _check(channels, rate, count, place=place, limits=limits)
            if width > 4:
                raise wave.Error(f"{8 * width} bits a sample")
            frames = file.readframes(count)
    except (wave.Error, EOFError, RuntimeError) as error:  # RuntimeError: chunks that end before they begin
        cause = f"the WAV sound is damaged: {error or 'it ends inside its header'}"
        raise MediaError("unreadable", cause, place=place, remedy="replace it, or save it as 16-bit PCM") from error
    if len(frames) != count * channels * width:
        cause = f"the WAV sound is cut off: {count * channels * width - len(frames):,} bytes of samples are missing"
        raise MediaError("unreadable", cause, place=place, remedy="copy or download the file again")
    samples = _numbers(frames, width).reshape(-1, channels).mean(1, dtype=np.float64).astype(np.float32)
    return Sound(samples=samples, rate=rate, channels=channels, place=place)


def _check(channels: int, rate: int, count: int, *, place: str, limits: SoundLimits) -> None:
    if not count or not rate:
        raise MediaError("unreadable", "the sound has no samples", place=place, remedy="replace or remove the file")
    if channels > limits.max_channels:
        raise _over(f"{channels} channels", str(limits.max_channels), place)
    if rate > limits.max_rate:
        raise _over(f"{rate:,} samples a second", f"{limits.max_rate:,}", place)
    if count > limits.max_seconds * rate:
        raise _over(f"{count / rate:,.1f} s", f"{limits.max_seconds:g} s", place)


def _over(what: str, allowed: str, place: str) -> MediaError:
    return MediaError(
        "too-large", f"the sound has {what}, allowed are {allowed}", place=place, remedy="cut or resample it"
    )


def _numbers(frames: bytes, width: int) -> NDArray[np.floating]:
    """Whole numbers of 1 to 4 bytes as -1 to 1; those of one byte have no sign."""
    if width == 1:
        return (np.frombuffer(frames, np.uint8) - 128.0) / 128.0
    if width == 3:  # put below a byte of zeros, and read as 4
        wide = np.zeros((len(frames) // 3, 4), np.uint8)
        wide[:, 1:] = np.frombuffer(frames, np.uint8).reshape(-1, 3)
        return wide.view("<i4")[:, 0] / 2.0**31
    return np.frombuffer(frames, f"<i{width}") / 2.0 ** (8 * width - 1)
