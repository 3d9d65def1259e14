"""Questions asked aloud: only the text changes, voices of the tests are held out, everything is counted."""

from __future__ import annotations

import hashlib
from collections import Counter
from pathlib import Path

import pytest

from plait.core.types import MediaRef, Sample, Text, Turn
from plait.data.shards import ShardReader, write_shards
from plait.data.sounds import decode_sound
from plait.data.spoken import Aloud, Spoken, ask_aloud

pytestmark = pytest.mark.light
PICTURE = MediaRef(modality="image", sha256="a" * 64, uri="train-000.tar#x.png", width=4, height=4)


def question(name: str, text: str, task: str = "yesno", **about: str) -> Sample:
    turns = (
        Turn(role="user", parts=(PICTURE, Text(text=text))),
        Turn(role="assistant", parts=(Text(text="yes"),), trained=True),
    )
    return Sample(id=name, turns=turns, meta={"task": task, **about})


def aloud(**changed: object) -> Aloud:
    settings = {
        "voices": ("en-us", "en"),
        "test_voices": ("en-us+f3",),
        "speeds": (160, 180),
        "takes": 2,
        "share": 1.0,
        "tasks": (),
        "max_seconds": 20.0,
        "seed": 0,
    }
    return Aloud(**settings | changed)  # pyright: ignore[reportArgumentType]


SAMPLES = [question(f"q{number}", f"Is this {number % 3}?") for number in range(12)]


def uttered(samples: list[Sample], how: Aloud, split: str = "train") -> tuple[list[Sample], dict[str, bytes], Spoken]:
    counts = Spoken()
    entries = list(ask_aloud([(s, {}) for s in samples], how, split=split, counts=counts))
    return [s for s, _ in entries], {k: v for _, media in entries for k, v in media.items()}, counts


def test_the_text_becomes_a_sound_and_the_rest_stays(tmp_path: Path) -> None:
    made, media, counts = uttered(SAMPLES, aloud())
    for before, after in zip(SAMPLES, made, strict=True):
        picture, sound = after.turns[0].parts
        assert picture == PICTURE
        assert isinstance(sound, MediaRef)
        assert sound.modality == "audio"
        assert sound.length == len(decode_sound(media[sound.sha256], place="x").samples)
        assert hashlib.sha256(media[sound.sha256]).hexdigest() == sound.sha256
        assert (after.id, after.turns[1:]) == (before.id, before.turns[1:])
        assert after.meta["question"] == before.text("user")
        assert after.meta["voice"] in aloud().voices
    assert counts.spoken == 12
    assert counts.sounds == len(media) <= 6  # three texts, two takes
    assert counts.samples == sum(len(decode_sound(data, place="x").samples) for data in media.values())
    assert uttered(SAMPLES, aloud())[:2] == (made, media)

    entries = ask_aloud([(s, {}) for s in SAMPLES], aloud(), split="train", counts=Spoken())
    write_shards(tmp_path, "instruct-train", entries)
    with ShardReader(tmp_path, "instruct-train") as reader:
        for sample in reader:
            ref = sample.media()[1]
            assert ref.uri.endswith(".wav")
            assert reader.media(ref) == media[ref.sha256]


def test_voices_of_the_tests_are_others() -> None:
    _, _, counts = uttered(SAMPLES, aloud(), "test-concept")
    assert set(counts.voices) == {"en-us+f3"}


def test_what_stays_written_is_counted_by_reason() -> None:
    odd = [
        question("zh", "这是什么？", "name.zh"),
        question("none", "?"),
        question("long", "one two three four five six seven eight nine ten"),
        question("other", "What is this?", "group"),
    ]
    made, media, counts = uttered(odd, aloud(tasks=("yesno", "name.zh"), max_seconds=1.0))
    assert made == odd
    assert not media
    assert counts.written == Counter({"script": 1, "empty": 1, "too-long": 1, "not-asked": 1})
    assert counts.as_dict()["written"]["script"] == 1


def test_a_share_is_spoken_and_pairs_stay_together() -> None:
    pairs = [question(f"{side}{n}", "Is it?", pair=str(n)) for n in range(100) for side in "ab"]
    made, _, counts = uttered(pairs, aloud(share=0.5, takes=1))
    assert 70 <= counts.spoken <= 130
    kinds = {s.id: "voice" in s.meta for s in made}
    assert all(kinds[f"a{n}"] == kinds[f"b{n}"] for n in range(100))
