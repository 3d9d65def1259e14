"""Text to speech by espeak-ng: a rule-based synthesizer that reads any English text with many voices, on any machine.

The library and its data come in the wheel of ``espeakng-loader`` (extra ``speech``); nothing is installed in the system
and nothing is fetched. It keeps a state from one text to the next (phases of its oscillators, random numbers), so it is
loaded anew for each text: the same text, voice, speed and version then give the same bytes, in whatever order texts are
spoken. That takes 7 ms a text instead of 3.

espeak-ng is under the GPL, version 3 or later, and no part of Plait.
"""

from __future__ import annotations

import ctypes
import io
import sys
import unicodedata
import wave
from collections.abc import Mapping
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING

from plait.core.errors import ConfigError, ResourceError, pip_install

if TYPE_CHECKING:
    import numpy as np

RATE = 16_000
"""Samples a second of what comes out: what towers for speech take."""

SLOWEST, FASTEST = 80, 450
"""Words a minute that the synthesizer keeps."""

REFUSED: Mapping[str, str] = {
    "empty": "there is no letter and no figure to read",
    "script": "a letter is not Latin: an English voice would name it instead of reading it",
    "control": "a control character, at which the synthesizer would stop",
}
"""Why a text is not spoken: name and meaning."""

_ANSWER = ctypes.CFUNCTYPE(ctypes.c_int, ctypes.POINTER(ctypes.c_short), ctypes.c_int, ctypes.c_void_p)
_SYNCHRONOUS, _DO_NOT_EXIT, _UTF8, _SPEED, _VOLUME = 2, 0x8000, 1, 1, 2  # numbers of espeak-ng's speak_lib.h
_QUIET = 50  # of 100: at 100 some voices clip


def refusal(text: str) -> str:
    r"""Why this text cannot be spoken by an English voice: a key of :data:`REFUSED`, or "".

    Example:
        >>> [refusal(text) for text in ("A café?", "这是什么？", "?!", "one\0two")]
        ['', 'script', 'empty', 'control']
    """
    if any(unicodedata.category(letter) == "Cc" and letter not in "\t\n\r" for letter in text):
        return "control"
    if any(letter.isalpha() and not unicodedata.name(letter, "").startswith("LATIN") for letter in text):
        return "script"
    return "" if any(letter.isalnum() for letter in text) else "empty"


def speak(text: str, *, voice: str, speed: int) -> bytes:
    """Speak a text: a WAV file of 16-bit mono samples, :data:`RATE` a second.

    Args:
        text: That :func:`refusal` has nothing against.
        voice: A language of espeak-ng and a variant, such as ``en-us+f3``; see :func:`check_voice`.
        speed: Words a minute, about.

    Raises:
        ConfigError: It cannot be spoken, there is no such voice, or the speed is out of range.
        ResourceError: The extra ``speech`` is not installed, or the synthesizer fails.
    """
    import numpy as np

    if reason := refusal(text):
        raise ConfigError(
            f"{text[:40]!r} cannot be spoken: {REFUSED[reason]}", place="text", remedy="show it as a text instead"
        )
    if not SLOWEST <= speed <= FASTEST:
        raise ConfigError(
            f"speed is {speed} words a minute, expected {SLOWEST} to {FASTEST}",
            place="speed",
            remedy="about 160 is usual",
        )
    check_voice(voice)
    samples, rate = _synthesize(text, voice, speed)
    return encode_wav(_resampled(np.frombuffer(samples, "<i2"), rate), RATE)


def encode_wav(samples: np.ndarray, rate: int) -> bytes:
    """16-bit mono WAV bytes of samples from -1 to 1, or of 16-bit integers; louder ones are clipped."""
    import numpy as np

    if samples.dtype != np.int16:
        samples = (samples * 32768.0).round().clip(-32768, 32767).astype(np.int16)
    out = io.BytesIO()
    with wave.open(out, "wb") as file:
        file.setnchannels(1)
        file.setsampwidth(2)
        file.setframerate(rate)
        file.writeframes(samples.astype("<i2").tobytes())
    return out.getvalue()


def version() -> str:
    """Which synthesizer speaks, for cards and records, such as ``espeak-ng 1.52.0 (espeakng-loader 0.2.4)``.

    Raises:
        ResourceError: The extra ``speech`` is not installed.
    """
    from importlib import metadata

    library, _ = _places()
    loaded = ctypes.CDLL(library)
    loaded.espeak_Info.restype = ctypes.c_char_p
    number = loaded.espeak_Info(None).decode("ascii", "replace")
    _unload(loaded)
    return f"espeak-ng {number} (espeakng-loader {metadata.version('espeakng-loader')})"


def check_voice(voice: str) -> None:
    """Refuse what is no voice; espeak-ng itself would silently take another one.

    Raises:
        ConfigError: There is no such voice; names some.
        ResourceError: The extra ``speech`` is not installed.
    """
    languages, variants = _voices()
    language, _, variant = voice.partition("+")
    if language.lower() not in languages or (variant and variant not in variants) or voice.endswith("+"):
        raise ConfigError(
            f"there is no voice {voice!r}",
            place="voice",
            remedy=f"take one of {', '.join(sorted(languages))}, alone or with a variant such as +f3 or +m5",
        )


# --- inside --------------------------------------------------------------------------------------------------------


@cache
def _places() -> tuple[str, Path]:
    """The library, and the folder of its data."""
    try:
        import espeakng_loader
    except ImportError as error:
        raise ResourceError(
            "speaking texts needs the package espeakng-loader (10 MB, with espeak-ng inside)",
            place="spoken",
            remedy=pip_install("plait[speech]"),
        ) from error
    return espeakng_loader.get_library_path(), Path(espeakng_loader.get_data_path())


@cache
def _voices() -> tuple[frozenset[str], frozenset[str]]:
    """English languages in lower case, and variants."""
    _, data = _places()
    languages = frozenset(path.name.lower() for path in data.glob("lang/gmw/en*"))
    return languages, frozenset(path.name for path in data.glob("voices/!v/*"))


def _synthesize(text: str, voice: str, speed: int) -> tuple[bytes, int]:
    """16-bit mono samples, and how many a second."""
    path, data = _places()
    pieces: list[bytes] = []

    def receive(samples: ctypes._Pointer[ctypes.c_short], count: int, _: int) -> int:
        if samples and count > 0:
            pieces.append(ctypes.string_at(samples, 2 * count))
        return 0

    library = ctypes.CDLL(path)
    try:
        rate = library.espeak_Initialize(_SYNCHRONOUS, 0, str(data).encode(), _DO_NOT_EXIT)
        _succeed(rate <= 0, "it cannot read its data", str(data))
        answer = _ANSWER(receive)  # kept until it has been called for the last time
        library.espeak_SetSynthCallback(answer)
        library.espeak_ng_SetRandSeed(ctypes.c_long(1))  # the clock, otherwise
        _succeed(library.espeak_SetVoiceByName(voice.encode()), "no such voice", voice)
        _succeed(library.espeak_SetParameter(_SPEED, speed, 0), "no such speed", f"{speed} words a minute")
        content = text.encode() + b"\0"
        _succeed(library.espeak_SetParameter(_VOLUME, _QUIET, 0), "no such volume", str(_QUIET))
        size = ctypes.c_size_t(len(content))
        _succeed(library.espeak_Synth(content, size, 0, 0, 0, _UTF8, None, None), "it does not speak", text[:40])
        library.espeak_Terminate()
    finally:
        _unload(library)
    _succeed(not pieces, "nothing is to be heard", text[:40])
    return b"".join(pieces), rate


def _succeed(failed: int, cause: str, place: str) -> None:
    if failed:
        raise ResourceError(
            f"espeak-ng fails ({failed}): {cause}",
            place=place,
            remedy=f"show it as a text; or {pip_install('plait[speech]')}",
        )


def _unload(library: ctypes.CDLL) -> None:
    """Give the library back, and its state with it."""
    if sys.platform == "win32":
        ctypes.windll.kernel32.FreeLibrary(ctypes.c_void_p(library._handle))
    else:
        ctypes.CDLL(None).dlclose(ctypes.c_void_p(library._handle))


def _resampled(samples: np.ndarray, rate: int) -> np.ndarray:
    """As many samples a second as :data:`RATE`, from -1 to 1: polyphase filtering with scipy's window."""
    from math import gcd

    try:
        from scipy.signal import resample_poly
    except ImportError as error:
        raise ResourceError(
            "speaking texts needs the package scipy", place="spoken", remedy=pip_install("plait[speech]")
        ) from error
    common = gcd(rate, RATE)
    return resample_poly(samples / 32768.0, RATE // common, rate // common)
