"""Questions asked aloud: the text of a question becomes a sound, and nothing else of the sample changes.

A sample keeps its id, so that runs with spoken and with written questions can be compared question by question; its
meta keeps the text (``question``) and says ``voice`` and ``speed``. Other voices speak in the test splits than in
training. A text that cannot be spoken stays written, and is counted.
"""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from plait.core.types import MediaRef, Sample, Text, Turn
from plait.data.shards import Entry
from plait.data.sounds import decode_sound
from plait.data.sources import VALIDATION, rank
from plait.data.speech import RATE, REFUSED, check_voice, refusal, speak

STAYS: Mapping[str, str] = {
    "not-asked": "of a task or share that is to stay written",
    "too-long": "it takes longer to say than is wanted",
    **REFUSED,
}
"""Why a question stays written: name and meaning."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Aloud:
    """How questions are spoken.

    Attributes:
        voices: Of training.
        test_voices: Of the test splits.
        speeds: Words a minute, one of which a take has.
        takes: In how many ways, each with its voice and speed, one text is spoken at most.
        share: Of the questions; two that belong together (``pair``) stay of one kind.
        tasks: Only these; empty: all.
        max_seconds: Longer ones stay written.
        seed: Of all choices.
    """

    voices: tuple[str, ...]
    test_voices: tuple[str, ...]
    speeds: tuple[int, ...]
    takes: int
    share: float
    tasks: tuple[str, ...]
    max_seconds: float
    seed: int

    def check(self) -> None:
        """See that everything is there, before anything is spoken.

        Raises:
            ConfigError: There is no such voice.
            ResourceError: The extra ``speech`` is not installed.
        """
        for voice in (*self.voices, *self.test_voices):
            check_voice(voice)


@dataclass(frozen=True, slots=True, kw_only=True)
class Saying:
    """How names are said, without a question around them.

    Attributes:
        voices: Of training.
        test_voices: Of the test splits.
        speeds: Words a minute, one of which a take has.
        takes: In how many ways, each with its voice and speed, a name of training is said at most.
        max_seconds: Longer ones are not said.
        seed: Of all choices.
    """

    voices: tuple[str, ...]
    test_voices: tuple[str, ...]
    speeds: tuple[int, ...]
    takes: int
    max_seconds: float
    seed: int

    def takes_of(self, name: str, *, trained: bool) -> list[tuple[str, int]]:
        """Different voices and speeds that say a name; of a test split one."""
        voices, takes = (self.voices, self.takes) if trained else (self.test_voices, 1)
        every = [(voice, speed) for voice in voices for speed in self.speeds]
        every.sort(key=lambda take: rank(self.seed, "saying", name, take[0], str(take[1])))
        return every[:takes]


@dataclass(slots=True, kw_only=True)
class Spoken:
    """What became of the questions of a split.

    Attributes:
        spoken: Questions that are asked aloud.
        sounds: How many different sounds they are.
        samples: Of these sounds together.
        voices: Questions by voice.
        written: Questions that stay written, by reason (:data:`STAYS`).
    """

    spoken: int = 0
    sounds: int = 0
    samples: int = 0
    voices: Counter[str] = field(default_factory=Counter[str])
    written: Counter[str] = field(default_factory=Counter[str])

    @property
    def seconds(self) -> float:
        """Length of all sounds."""
        return self.samples / RATE

    def as_dict(self) -> dict[str, Any]:
        """Plain data."""
        numbers = {"spoken": self.spoken, "sounds": self.sounds, "seconds": round(self.seconds, 1)}
        return numbers | {"voices": dict(sorted(self.voices.items())), "written": dict(sorted(self.written.items()))}


def ask_aloud(entries: Iterable[Entry], aloud: Aloud, *, split: str, counts: Spoken) -> Iterator[Entry]:
    """The same samples, those with a spoken question handed over with their sound.

    A sound's bytes come with the first sample that has it, and are not kept here.

    Args:
        entries: Questions, each with one text in its user turn.
        aloud: How.
        split: Of them all.
        counts: Filled in.

    Raises:
        ResourceError: The synthesizer fails.
    """
    known: dict[tuple[str, str, int], MediaRef] = {}
    for sample, media in entries:
        text = sample.text("user")
        if reason := _stays(sample, text, aloud):
            counts.written[reason] += 1
            yield sample, media
            continue
        voice, speed = _take(sample, text, aloud, split=split)
        heard: Mapping[str, bytes] = {}
        if (ref := known.get((text, voice, speed))) is None:
            data = speak(text, voice=voice, speed=speed)
            sound = decode_sound(data, place=sample.id)
            if sound.seconds > aloud.max_seconds:
                counts.written["too-long"] += 1
                yield sample, media
                continue
            sha256 = hashlib.sha256(data).hexdigest()
            ref = MediaRef(modality="audio", sha256=sha256, uri="", length=len(sound.samples))
            known[text, voice, speed], heard = ref, {sha256: data}
            counts.sounds += 1
            counts.samples += ref.length
        counts.spoken += 1
        counts.voices[voice] += 1
        about = {"question": text, "voice": voice, "speed": speed}
        turns = tuple(_aloud(turn, ref) if turn.role == "user" else turn for turn in sample.turns)
        yield replace(sample, turns=turns, meta={**sample.meta, **about}), {**media, **heard}


def _stays(sample: Sample, text: str, aloud: Aloud) -> str:
    if aloud.tasks and sample.meta["task"] not in aloud.tasks:
        return "not-asked"
    together = str(sample.meta.get("pair", sample.id))
    if _part(aloud.seed, "aloud", together) >= aloud.share:
        return "not-asked"
    return refusal(text)


def _take(sample: Sample, text: str, aloud: Aloud, *, split: str) -> tuple[str, int]:
    """Voice and speed: one of a few takes of this text, chosen by the sample's id."""
    voices = aloud.voices if split in ("train", VALIDATION) else aloud.test_voices  # which tests alone hear
    take = str(int(_part(aloud.seed, "take", sample.id) * aloud.takes))
    voice = voices[int(_part(aloud.seed, "voice", text, take) * len(voices))]
    return voice, aloud.speeds[int(_part(aloud.seed, "speed", text, take) * len(aloud.speeds))]


def _part(seed: int, *key: str) -> float:
    """From 0 to below 1, evenly."""
    return int(rank(seed, *key)[:12], 16) / 16**12


def _aloud(turn: Turn, sound: MediaRef) -> Turn:
    return replace(turn, parts=tuple(sound if isinstance(part, Text) else part for part in turn.parts))
