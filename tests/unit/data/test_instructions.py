"""Questions: answers that can be checked against the labels, and that cannot be guessed from the words alone."""

from __future__ import annotations

import random
import re
from collections import Counter
from dataclasses import replace

import numpy as np
import pytest
from PIL import Image

from plait.core.types import Answer, MediaRef, Sample
from plait.data.distractors import Label, may_be_true
from plait.data.instructions import (
    NUMBERS,
    QUESTIONS,
    TASKS,
    ask_canvases,
    ask_groups,
    ask_names,
    ask_yes_no,
    compose,
)
from plait.data.ledger import Ledger
from plait.data.media import decode_image
from plait.data.sources import Gathered
from plait.data.sources.emoji import EmojiChoice, gather_emoji

pytestmark = pytest.mark.light


@pytest.fixture
def gathered(reseal: object) -> Gathered:
    choice = EmojiChoice(held_out=2, size=24, variants="one", flags=False, max_train=None, max_test=None, seed=0)
    return gather_emoji(choice, Ledger(), lambda done, total: None)


@pytest.fixture
def samples(gathered: Gathered) -> list[Sample]:
    return [p.sample for p in gathered.pictures if p.sample.meta["split"] == "train"]


def reference(question: Sample) -> str:
    (answer,) = [a for a in question.answers if a.kind == "reference"]
    assert answer.name == question.meta["task"]
    return answer.text


def rejected(question: Sample) -> str:
    return next((a.text for a in question.answers if a.kind == "rejected"), "")


def check_shape(question: Sample) -> None:
    user, assistant = question.turns
    assert (user.role, user.trained, assistant.role, assistant.trained) == ("user", False, "assistant", True)
    assert isinstance(user.parts[0], MediaRef)
    assert len(question.media()) == 1
    assert question.text("assistant") == reference(question) != rejected(question)
    assert question.meta["task"] in TASKS
    assert question.text("user").strip()


def test_names_are_asked_in_both_languages(samples: list[Sample]) -> None:
    by_id = {s.id: s for s in samples}
    asked = ask_names(samples, chinese=True, seed=0)
    assert Counter(q.meta["task"] for q in asked) == {"name.en": len(samples), "name.zh": len(samples)}
    for question in asked:
        check_shape(question)
        (shown,) = question.meta["pictures"]
        assert reference(question) == by_id[shown].answer(question.meta["task"])
        assert rejected(question) in {s.answer(question.meta["task"]) for s in samples}
    assert {q.meta["task"] for q in ask_names(samples, chinese=False, seed=0)} == {"name.en"}
    wordings = {q.text("user") for q in asked}
    assert len(wordings) > 3
    assert wordings <= {*QUESTIONS["name.en"], *QUESTIONS["name.zh"]}


def test_yes_and_no_are_exactly_balanced_and_true(samples: list[Sample]) -> None:
    by_id = {s.id: s for s in samples}
    asked = ask_yes_no(samples, rounds=3, seed=0)
    assert Counter(map(reference, asked)) == {"yes": 3 * len(samples), "no": 3 * len(samples)}
    assert len({q.id for q in asked}) == len(asked)
    for question in asked:
        check_shape(question)
        shown, named = by_id[question.meta["pictures"][0]], by_id[question.meta["named"]]
        assert f'"{named.answer("name.en")}"' in question.text("user")
        assert (shown is named) == (reference(question) == "yes")
        assert shown is named or not may_be_true(Label.of(shown), Label.of(named))


def test_easy_rounds_come_after_the_hard_ones_and_are_as_true(samples: list[Sample]) -> None:
    by_id = {s.id: s for s in samples}
    hard, both = ask_yes_no(samples, rounds=1, seed=0), ask_yes_no(samples, rounds=1, easy=2, seed=0)
    assert both[: len(hard)] == hard
    assert len(both) == 3 * len(hard) == len({q.id for q in both})
    alike: list[float] = []
    for part in (both[: len(hard)], both[len(hard) :]):
        wrong = [q for q in part if reference(q) == "no"]
        labels = [(Label.of(by_id[q.meta["pictures"][0]]), Label.of(by_id[q.meta["named"]])) for q in wrong]
        assert not any(may_be_true(*pair) for pair in labels)
        alike.append(sum(shown.group == named.group for shown, named in labels) / len(labels))
    assert alike[1] < 0.5 * alike[0], "easy ones are of other groups more often"


def test_the_two_questions_of_a_round_are_a_pair(samples: list[Sample]) -> None:
    pairs: dict[str, list[Sample]] = {}
    for question in ask_yes_no(samples, rounds=2, easy=1, seed=0):
        pairs.setdefault(question.meta["pair"], []).append(question)
    for pair in pairs.values():
        assert sorted(map(reference, pair)) == ["no", "yes"]
        assert pair[0].media() == pair[1].media()
        frames = [re.sub(r'".*"', '"{name}"', question.text("user")) for question in pair]
        assert frames[0] == frames[1] in QUESTIONS["yesno"], "worded alike"


def test_the_words_alone_do_not_tell_yes_from_no(samples: list[Sample]) -> None:
    """Every name is asked with answer yes as often as with answer no."""
    asked = ask_yes_no(samples, rounds=2, seed=0)
    tally = Counter((q.meta["named"], reference(q)) for q in asked)
    names = {named for named, _ in tally}
    unequal = [name for name in names if tally[name, "yes"] != tally[name, "no"]]
    assert len(unequal) <= 2, "a name that fits no other picture may be over"
    # Guess by the majority answer of each name: little better than a coin.
    by_words: dict[str, Counter[str]] = {}
    for question in asked:
        by_words.setdefault(question.meta["named"], Counter())[reference(question)] += 1
    best = sum(max(counts.values()) for counts in by_words.values()) / len(asked)
    assert best <= 0.6


def test_groups_are_asked_where_they_are_known(samples: list[Sample]) -> None:
    groups = sorted({s.answer("group") or "" for s in samples} - {""})
    asked = ask_groups(samples, groups, seed=0)
    assert len(asked) == sum(s.answer("group") is not None for s in samples)
    for question in asked:
        check_shape(question)
        assert {reference(question), rejected(question)} <= set(groups)
        assert all(group in question.text("user") for group in groups)
    assert ask_groups(samples, ["food"], seed=0) == []


def canvases(samples: list[Sample], gathered: Gathered, number: int, seed: int = 0) -> list[tuple[Sample, bytes]]:
    data = {p.sample.media()[0].sha256: p.read() for p in gathered.pictures}
    made = ask_canvases(
        samples, number, tile=24, seed=seed, open_picture=lambda ref: decode_image(data[ref.sha256], place="x")
    )
    return [(question, media[question.media()[0].sha256]) for question, media in made]


def test_canvas_answers_are_what_the_pixels_show(samples: list[Sample], gathered: Gathered) -> None:
    """An independent eye: find each picture's own color on the canvas and see where it lies."""
    data = {p.sample.id: p.read() for p in gathered.pictures}
    by_id = {s.id: s for s in samples}

    def center(canvas: np.ndarray, sample: str) -> np.ndarray:
        tile = np.asarray(decode_image(data[sample], place="x"))
        color = tile[tile.shape[0] // 2, tile.shape[1] // 2].astype(int)
        where = np.argwhere(np.abs(canvas.astype(int) - color).sum(-1) <= 6)
        assert len(where) >= 16, "the picture is on the canvas"
        return where.mean(0)

    asked = canvases(samples, gathered, 40)
    assert {q.meta["task"] for q, _ in asked} == {"left", "right", "above", "count"}
    for question, png in asked:
        check_shape(question)
        canvas = np.asarray(decode_image(png, place="x"))
        assert canvas.shape == (52, 52, 3)
        shown = question.meta["pictures"]
        places = {sample: center(canvas, sample) for sample in shown}
        match question.meta["task"]:
            case "left":
                expected = by_id[min(shown, key=lambda s: places[s][1])].answer("name.en")
            case "right":
                expected = by_id[max(shown, key=lambda s: places[s][1])].answer("name.en")
            case "above":
                expected = by_id[min(shown, key=lambda s: places[s][0])].answer("name.en")
            case _:
                expected = NUMBERS[len(shown) - 1]
        assert reference(question) == expected


def test_counts_are_balanced_and_pictures_used_evenly(samples: list[Sample], gathered: Gathered) -> None:
    asked = [question for question, _ in canvases(samples, gathered, 60)]
    counts = Counter(reference(q) for q in asked if q.meta["task"] == "count")
    assert len(set(counts.values())) == 1
    assert set(counts) == set(NUMBERS)
    shown = {q.media()[0].sha256: q.meta["pictures"] for q in asked}
    used = Counter(sample for pictures in shown.values() for sample in pictures)
    assert max(used.values()) - min(used.values()) <= 2
    assert len(used) == len(samples)
    for pictures in shown.values():
        assert len(set(pictures)) == len(pictures)


def test_too_few_pictures_make_no_canvas(samples: list[Sample], gathered: Gathered) -> None:
    assert canvases(samples[:1], gathered, 3) == []
    assert canvases([], gathered, 3) == []


@pytest.mark.parametrize("direction", ["row", "column"])
@pytest.mark.parametrize("size", [(40, 10), (10, 40), (24, 24), (1, 1)])
def test_composing_never_draws_outside(direction: str, size: tuple[int, int]) -> None:
    tiles = [Image.new("RGB", size, color) for color in ((250, 0, 0), (0, 250, 0), (0, 0, 250))]
    canvas = np.asarray(compose(tiles, direction, tile=24, rng=random.Random(0)))
    assert canvas.shape == (52, 52, 3)
    axis = 1 if direction == "row" else 0
    centers = [np.argwhere(canvas.argmax(-1) + 3 * (canvas.min(-1) > 128) == n)[:, axis].mean() for n in range(3)]
    assert centers == sorted(centers)


def test_everything_is_a_pure_function_of_seed_and_samples(samples: list[Sample], gathered: Gathered) -> None:
    def everything(seed: int) -> list[object]:
        asked = ask_names(samples, chinese=True, seed=seed) + ask_yes_no(samples, rounds=1, seed=seed)
        return [*(s.to_json() for s in asked), *(q.to_json() for q, _ in canvases(samples, gathered, 9, seed))]

    assert everything(0) == everything(0)
    assert everything(0) != everything(1)


def test_the_ids_of_all_tasks_and_rounds_differ(samples: list[Sample]) -> None:
    asked = ask_names(samples, chinese=True, seed=0) + ask_yes_no(samples, rounds=4, seed=0)
    asked += ask_groups(samples, ["activities", "food", "nature"], seed=0)
    assert len({q.id for q in asked}) == len(asked)


def test_long_texts_are_described_and_short_ones_named(samples: list[Sample]) -> None:
    def renamed(sample: Sample, text: str) -> Sample:
        return replace(sample, answers=(Answer(kind="label", name="name.en", text=text),))

    long = renamed(samples[0], "a brown dog runs along the wet beach at sunset")
    short = renamed(samples[1], "stop sign")
    asked = ask_names([long, short], chinese=False, seed=0)
    assert asked[0].text("user") in QUESTIONS["describe"]
    assert asked[1].text("user") in QUESTIONS["name.en"]
