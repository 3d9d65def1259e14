"""Questions with short, checkable answers, made from labelled pictures: pure functions, seeded by the samples' ids.

Tasks: ``name.en``, ``name.zh``, ``yesno``, ``group``; and on canvases of one to three pictures ``left``, ``right``,
``above``, ``count``. Each sample has one user turn (picture, question), one trained assistant turn (answer), an answer
of kind ``reference`` and, where a plausible wrong one is known, one of kind ``rejected``, both named after the task.
How wrong names are chosen: :mod:`plait.data.distractors`.
"""

from __future__ import annotations

import hashlib
import random
from collections.abc import Callable, Iterator, Mapping, Sequence

from PIL import Image

from plait.core.types import Answer, MediaRef, Sample, Text, Turn
from plait.data.distractors import Label, may_be_true, name_of, seeded, wrong_names
from plait.data.media import encode_png
from plait.data.sources import rank, sample_id

TASKS = ("name.en", "name.zh", "yesno", "group", "left", "right", "above", "count")
"""All tasks, in the order of the data card."""

QUESTIONS: Mapping[str, tuple[str, ...]] = {
    "name.en": ("What is this?", "What does the picture show?", "Name what you see.", "What is its name?"),
    "describe": ("Describe the picture.", "What does the picture show?", "What can be seen here?"),
    "name.zh": ("这是什么？", "图中是什么？", "请用中文说出它的名称。"),
    "yesno": (
        'Is this "{name}"? Answer yes or no.',
        'Does the picture show "{name}"? Yes or no?',
        'Would you call this "{name}"? Answer yes or no.',
    ),
    "group": (
        "Which group is it from: {groups}?",
        "Choose its group: {groups}.",
        "Which of these fits best: {groups}?",
    ),
    "left": ("What is on the left?", "Name what is on the left side."),
    "right": ("What is on the right?", "Name what is on the right side."),
    "above": ("What is at the top?", 'What is above "{other}"?'),
    "count": (
        "How many small pictures are here?",
        "Count the pictures on the canvas.",
        "How many pictures are shown together?",
    ),
}
"""Wordings; one is chosen by the sample's id. ``describe`` asks for texts of more than eight words."""

NUMBERS = ("one", "two", "three")
_LONG_NAME_WORDS = 8
_TRIES = 48
_LAYOUTS = (("row", 2), ("column", 2), ("row", 3), ("column", 2), ("single", 1))
_ASKED: Mapping[tuple[str, int], tuple[tuple[str, ...], ...]] = {
    ("row", 2): (("left", "right"),),
    ("column", 2): (("above", "count"), ("above",)),
    ("row", 3): (("left", "right", "count"),),
    ("single", 1): (("count",),),
}


# --- one picture ---------------------------------------------------------------------------------------------------


def ask_names(samples: Sequence[Sample], *, chinese: bool, seed: int) -> list[Sample]:
    """Name it, in English and, if wanted and known, in Chinese; the rejected answer is another picture's name."""
    asked: list[Sample] = []
    for sample, wrong in zip(samples, wrong_names(samples, seed=seed), strict=True):
        for task in ("name.en", "name.zh") if chinese else ("name.en",):
            name = sample.answer(task)
            if name is None:
                continue
            kind = "describe" if task == "name.en" and len(name.split()) > _LONG_NAME_WORDS else task
            question = _pick(QUESTIONS[kind], seed, sample.id, task)
            other = wrong.answer(task) if wrong else None
            asked.append(_asked(task, (sample,), sample.media()[0], question=question, answer=name, rejected=other))
    return asked


def ask_yes_no(samples: Sequence[Sample], *, rounds: int, easy: int = 0, seed: int) -> list[Sample]:
    """Is it this? A round asks of each picture once with its name, once with a hard wrong one: exactly half are yes.

    ``easy`` more rounds take any wrong name.
    The two are worded alike and have the same ``pair`` in their meta, so that they can be trained together.
    A picture for which no certainly wrong name exists is not asked at all.
    """
    asked: list[Sample] = []
    for number in range(rounds + easy):
        chosen = wrong_names(samples, seed=seed + number, hard=number < rounds)
        for sample, wrong in zip(samples, chosen, strict=True):
            if wrong is None:
                continue
            wording = _pick(QUESTIONS["yesno"], seed, sample.id, f"yesno {number}")
            for named, answer, other in ((sample, "yes", "no"), (wrong, "no", "yes")):
                turn = _asked(
                    "yesno",
                    (sample,),
                    sample.media()[0],
                    question=wording.format(name=name_of(named)),
                    answer=answer,
                    rejected=other,
                    key=f"yesno {answer} {number} {named.id}",
                    about={"named": named.id, "pair": f"{sample.id} {number}"},
                )
                asked.append(turn)
    return asked


def ask_groups(samples: Sequence[Sample], groups: Sequence[str], *, seed: int) -> list[Sample]:
    """Which of these groups? Pictures without a group are not asked."""
    if len(groups) < 2:
        return []
    listed = f"{', '.join(groups[:-1])} or {groups[-1]}"
    asked: list[Sample] = []
    for sample in samples:
        if group := sample.answer("group"):
            question = _pick(QUESTIONS["group"], seed, sample.id, "group").format(groups=listed)
            wrong = _pick([other for other in groups if other != group], seed, sample.id, "wrong group")
            asked.append(_asked("group", (sample,), sample.media()[0], question=question, answer=group, rejected=wrong))
    return asked


# --- canvases ------------------------------------------------------------------------------------------------------


def ask_canvases(
    samples: Sequence[Sample], number: int, *, tile: int, seed: int, open_picture: Callable[[MediaRef], Image.Image]
) -> Iterator[tuple[Sample, Mapping[str, bytes]]]:
    """Put one to three pictures on one and ask what is where and how many there are.

    A canvas is white and square, with room for two tiles and a gap; two pictures keep the size of a tile, three are
    scaled down. Where they lie beside the main direction is random. Layouts come in turn, so that "one", "two" and
    "three" are equally frequent answers.

    Args:
        samples: Labelled pictures of one split; each is used about equally often.
        number: Canvases.
        tile: Pixels.
        seed: Of the choice and the positions.
        open_picture: Gives the decoded picture.

    Yields:
        Samples, each with its canvas as PNG by sha256.
    """
    deck = _Deck(samples, seed)
    side = 2 * tile + _gap(tile)
    for index in range(number):
        direction, count = layout = _LAYOUTS[index % len(_LAYOUTS)]
        shown = deck.draw(count)
        if len(shown) < count:
            return
        rng = seeded(seed, "canvas", str(index), *(s.id for s in shown))
        tiles = [open_picture(sample.media()[0]) for sample in shown]
        canvas = encode_png(compose(tiles, direction, tile=tile, rng=rng))
        sha256 = hashlib.sha256(canvas).hexdigest()
        ref = MediaRef(modality="image", sha256=sha256, uri="", width=side, height=side)
        wanted = _ASKED[layout]
        for task in wanted[index // len(_LAYOUTS) % len(wanted)]:
            question, answer, rejected = _about(task, shown, seed)
            key = f"{task} {sha256}"
            asked = _asked(task, tuple(shown), ref, question=question, answer=answer, rejected=rejected, key=key)
            yield asked, {sha256: canvas}


def compose(tiles: Sequence[Image.Image], direction: str, *, tile: int, rng: random.Random) -> Image.Image:
    """Lay one to three RGB pictures on white, in a ``row`` (left to right), a ``column`` (top down) or ``single``."""
    gap = _gap(tile)
    side = 2 * tile + gap
    cell = (side - gap * (len(tiles) - 1)) // len(tiles) if len(tiles) > 1 else tile
    canvas = Image.new("RGB", (side, side), (255, 255, 255))
    across = rng.randint(0, side - cell)
    for position, picture in enumerate(tiles):
        along = position * (cell + gap) if len(tiles) > 1 else rng.randint(0, side - cell)
        scaled = picture if picture.size == (cell, cell) else _fit(picture, cell)
        canvas.paste(scaled, (across, along) if direction == "column" else (along, across))
    return canvas


def _gap(tile: int) -> int:
    return max(2, tile // 6)


def _fit(picture: Image.Image, cell: int) -> Image.Image:
    scale = cell / max(picture.size)
    width, height = (max(1, round(side * scale)) for side in picture.size)
    square = Image.new("RGB", (cell, cell), (255, 255, 255))
    square.paste(picture.resize((width, height), Image.Resampling.LANCZOS), ((cell - width) // 2, (cell - height) // 2))
    return square


def _about(task: str, shown: Sequence[Sample], seed: int) -> tuple[str, str, str]:
    """Question, answer and a plausible wrong answer; ``shown`` is left to right or top to bottom."""
    key = "".join(s.id for s in shown)
    question = _pick(QUESTIONS[task], seed, key, task)
    if task == "count":
        answer = NUMBERS[len(shown) - 1]
        return question, answer, _pick([n for n in NUMBERS if n != answer], seed, key, "wrong count")
    right, wrong = (shown[-1], shown[0]) if task == "right" else (shown[0], shown[-1])
    return question.format(other=name_of(shown[1])), name_of(right), name_of(wrong)


class _Deck:
    """Deals pictures that cannot be confused with each other; all are dealt once before any is dealt again."""

    def __init__(self, samples: Sequence[Sample], seed: int) -> None:
        self._samples = samples
        self._labels = [Label.of(sample) for sample in samples]
        self._seed = seed
        self._round = 0
        self._pile: list[int] = []

    def draw(self, count: int) -> list[Sample]:
        drawn: list[int] = []
        held: list[int] = []
        for _ in range(_TRIES * count):
            if len(drawn) == count:
                break
            if not self._pile:
                self._pile = sorted(
                    range(len(self._samples)), key=lambda i: rank(self._seed, str(self._round), self._samples[i].id)
                )
                self._round += 1
                if not self._pile:
                    break
            index = self._pile.pop()
            clash = any(self._confusable(index, other) for other in drawn)
            (held if clash else drawn).append(index)
        self._pile += held
        return [self._samples[index] for index in drawn]

    def _confusable(self, one: int, other: int) -> bool:
        a, b = self._labels[one], self._labels[other]
        return may_be_true(a, b) or may_be_true(b, a)


# --- inside --------------------------------------------------------------------------------------------------------


def _asked(
    task: str,
    pictures: tuple[Sample, ...],
    ref: MediaRef,
    *,
    question: str,
    answer: str,
    rejected: str | None = None,
    key: str = "",
    about: Mapping[str, str] | None = None,
) -> Sample:
    first = pictures[0]
    answers = [Answer(kind="reference", name=task, text=answer)]
    if rejected is not None and rejected != answer:
        answers.append(Answer(kind="rejected", name=task, text=rejected))
    meta = {name: first.meta[name] for name in ("source", "licence", "split", "style")}
    meta |= {"task": task, "pictures": [p.id for p in pictures], "concepts": [p.meta["concept"] for p in pictures]}
    return Sample(
        id=sample_id("instruct", key or task, *(p.id for p in pictures)),
        turns=(
            Turn(role="user", parts=(ref, Text(text=question))),
            Turn(role="assistant", parts=(Text(text=answer),), trained=True),
        ),
        answers=tuple(answers),
        meta=meta | dict(about or {}),
    )


def _pick(choices: Sequence[str], seed: int, *key: str) -> str:
    return choices[int(rank(seed, *key)[:12], 16) % len(choices)]
