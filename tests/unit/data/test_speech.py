"""Speech: the same bytes for the same words, other ones for another voice, refusals that say why."""

from __future__ import annotations

import subprocess
import sys

import pytest

from plait.core.errors import ConfigError, ResourceError
from plait.data import speech
from plait.data.sounds import decode_sound

pytestmark = pytest.mark.light
TEXT = 'Is this "red apple"? Answer yes or no.'


def test_the_same_words_give_the_same_bytes_in_any_order_and_process() -> None:
    first = speech.speak(TEXT, voice="en-us+f2", speed=160)
    speech.speak("Something else in between.", voice="en", speed=140)
    assert speech.speak(TEXT, voice="en-us+f2", speed=160) == first
    code = f"import sys, hashlib; from plait.data.speech import speak; b = speak({TEXT!r}, voice='en-us+f2', speed=160)"
    code += "; print(hashlib.sha256(b).hexdigest())"
    import hashlib

    told = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.strip()
    assert told == hashlib.sha256(first).hexdigest()


def test_voice_speed_and_words_are_heard() -> None:
    said = {
        (voice, speed): decode_sound(speech.speak(TEXT, voice=voice, speed=speed), place=voice)
        for voice in ("en-us", "en-us+m6")
        for speed in (120, 200)
    }
    assert {sound.rate for sound in said.values()} == {16_000}
    assert len({sound.samples.tobytes() for sound in said.values()}) == 4
    assert all(0.05 < abs(sound.samples).max() < 0.99 for sound in said.values())
    assert said["en-us", 120].seconds > 1.3 * said["en-us", 200].seconds > 1.3
    short = decode_sound(speech.speak("Yes.", voice="en-us", speed=120), place="")
    assert short.seconds < 0.5 * said["en-us", 120].seconds


@pytest.mark.parametrize(
    ("text", "reason"),
    [("", "empty"), ("?! —", "empty"), ("这是什么？", "script"), ("Что?", "script"), ("a\0b", "control")],
)
def test_what_cannot_be_said_is_refused_with_the_reason(text: str, reason: str) -> None:
    assert speech.refusal(text) == reason
    with pytest.raises(ConfigError, match="cannot be spoken"):
        speech.speak(text, voice="en-us", speed=160)


def test_accents_figures_and_lines_can_be_said() -> None:
    assert not any(map(speech.refusal, ("A café?", "7", "one\ntwo")))


@pytest.mark.parametrize("voice", ["en-xx", "en-us+nobody", "en-us+", "cmn", ""])
def test_a_voice_that_is_not_there_is_refused_and_not_replaced(voice: str) -> None:
    with pytest.raises(ConfigError, match="there is no voice"):
        speech.speak("one", voice=voice, speed=160)


def test_a_speed_out_of_range_is_refused() -> None:
    with pytest.raises(ConfigError, match="speed is 20"):
        speech.speak("one", voice="en-us", speed=20)


def test_without_the_extra_its_name_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "espeakng_loader", None)
    speech._places.cache_clear()
    speech._voices.cache_clear()
    with pytest.raises(ResourceError) as refused:
        speech.speak("one", voice="en-us", speed=160)
    assert "plait[speech]" in refused.value.remedy


def test_the_version_names_synthesizer_and_package() -> None:
    assert speech.version().startswith("espeak-ng 1.")
    assert "espeakng-loader" in speech.version()
