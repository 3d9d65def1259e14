"""Sounds: what is in a WAV file comes out; hostile ones are refused with the numbers."""

from __future__ import annotations

import io
import wave

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from plait.data.media import MediaError
from plait.data.sounds import SoundLimits, decode_sound
from plait.data.speech import encode_wav

pytestmark = pytest.mark.light


def wav(frames: bytes, *, width: int = 2, channels: int = 1, rate: int = 8_000) -> bytes:
    out = io.BytesIO()
    with wave.open(out, "wb") as file:
        file.setparams((channels, width, rate, 0, "NONE", ""))
        file.writeframes(frames)
    return out.getvalue()


GOOD = wav(np.arange(100, dtype="<i2").tobytes())


def test_16_bits_come_back_exactly() -> None:
    values = np.array([-32768, -1, 0, 1, 32767], np.int16)
    found = decode_sound(encode_wav(values, 16_000), place="x")
    assert np.array_equal(found.samples * 32768, values)
    assert (found.rate, found.channels, found.seconds) == (16_000, 1, 5 / 16_000)


@pytest.mark.parametrize(
    ("width", "frames", "wanted"),
    [
        (1, bytes([0, 128, 192]), [-1.0, 0.0, 0.5]),
        (3, b"\x00\x00\x40" + b"\x00\x00\xc0", [0.5, -0.5]),
        (4, np.array([2**30, -(2**31)], "<i4").tobytes(), [0.5, -1.0]),
    ],
)
def test_other_widths(width: int, frames: bytes, wanted: list[float]) -> None:
    assert decode_sound(wav(frames, width=width), place="x").samples.tolist() == wanted


def test_channels_are_averaged_and_counted() -> None:
    found = decode_sound(wav(np.array([100, 300, -50, 50], "<i2").tobytes(), channels=2), place="x")
    assert (found.samples * 32768).tolist() == [200.0, 0.0]
    assert found.channels == 2


@pytest.mark.parametrize(
    ("data", "cause"),
    [
        (b"", "empty"),
        (b"\x89PNG\r\n\x1a\n0000", "not a sound of a known format"),
        (GOOD[:20], "damaged"),
        (GOOD[:-10], "10 bytes of samples are missing"),
        (wav(b""), "no samples"),
        (b"RIFF\xff\xff\xff\xffWAVEfmt \x10\0\0\0\x03\0" + GOOD[22:], "damaged"),
    ],
)
def test_damaged_ones_are_refused_with_the_place(data: bytes, cause: str) -> None:
    with pytest.raises(MediaError, match=cause) as refused:
        decode_sound(data, place="here.wav")
    assert refused.value.reason == "unreadable"
    assert refused.value.place == "here.wav"


@pytest.mark.parametrize(
    ("limits", "cause"),
    [
        (SoundLimits(max_seconds=0.01), "0.0 s, allowed are 0.01 s"),
        (SoundLimits(max_rate=4_000), "8,000 samples a second"),
        (SoundLimits(max_channels=0), "1 channels"),
        (SoundLimits(max_bytes=100), "244 bytes"),
    ],
)
def test_what_is_over_a_limit_is_refused(limits: SoundLimits, cause: str) -> None:
    with pytest.raises(MediaError, match=cause) as refused:
        decode_sound(GOOD, place="x", limits=limits)
    assert refused.value.reason == "too-large"


@given(at=st.integers(4, len(GOOD) - 1), byte=st.integers(0, 255))
def test_a_changed_byte_is_decoded_or_refused_and_never_anything_else(at: int, byte: int) -> None:
    data = GOOD[:at] + bytes([byte]) + GOOD[at + 1 :]
    try:
        found = decode_sound(data, place="x")
    except MediaError:
        return
    assert np.isfinite(found.samples).all()
    assert abs(found.samples).max() <= 1.0
