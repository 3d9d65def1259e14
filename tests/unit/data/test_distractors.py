"""Wrong names: certainly wrong, hard, and used as often as they are right."""

from __future__ import annotations

from collections import Counter

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from plait.core.types import Answer, MediaRef, Sample, Turn
from plait.data.distractors import Label, may_be_true, wrong_names

pytestmark = pytest.mark.light


def labelled(name: str, *, concept: str = "", group: str = "", keywords: str = "", **meta: object) -> Sample:
    ref = MediaRef(modality="image", sha256="0" * 64, uri="train-000.tar#x.png")
    answers = {"name.en": name, "group": group, "keywords.en": keywords}
    return Sample(
        id=f"{concept or name}/{name}",
        turns=(Turn(role="user", parts=(ref,)),),
        answers=tuple(Answer(kind="label", name=key, text=text) for key, text in answers.items() if text),
        meta={"concept": concept or name, "source": "x", "licence": "x", "split": "train", "style": "x", **meta},
    )


def might(shown: Sample, named: Sample) -> bool:
    return may_be_true(Label.of(shown), Label.of(named))


@pytest.mark.parametrize(
    ("shown", "named"),
    [
        (labelled("black cat"), labelled("cat")),
        (labelled("cat"), labelled("black cat")),
        (labelled("raised hand"), labelled("raising hands")),
        (labelled("beer mug"), labelled("clinking beer mugs")),
        (labelled("large blue diamond"), labelled("small blue diamond")),
        (labelled("pickup truck"), labelled("delivery truck", keywords="truck")),
        (labelled("prince", concept="crown"), labelled("princess", concept="crown")),
        (labelled("grinning face", family="happy face"), labelled("smirking face", family="face")),
        (labelled("penguin", group="nature"), labelled("bird", group="nature", broad=True)),
        (labelled("penguin"), labelled("bird", group="nature", broad=True)),
        (labelled("黑猫"), labelled("猫")),
    ],
)
def test_a_name_that_might_be_true_is_seen(shown: Sample, named: Sample) -> None:
    assert might(shown, named)


@pytest.mark.parametrize(
    ("shown", "named"),
    [
        (labelled("red apple"), labelled("green apple")),
        (labelled("keycap 1"), labelled("keycap #")),
        (labelled("grinning face", family="happy face"), labelled("weary face", family="unhappy face")),
        (labelled("hammer", group="objects"), labelled("bird", group="nature", broad=True)),
        (labelled("bird", group="nature", broad=True), labelled("penguin", group="nature")),
        (labelled("left-facing fist"), labelled("keycap 1")),
        (labelled("红苹果"), labelled("青苹果")),
    ],
)
def test_a_name_that_is_wrong_is_wrong(shown: Sample, named: Sample) -> None:
    assert not might(shown, named)


WORDS = st.sampled_from(["red", "green", "blue", "cat", "dog", "bird", "fish", "cup", "saw"])
NAMES = st.lists(
    st.tuples(
        st.lists(WORDS, min_size=1, max_size=3).map(" ".join),
        st.sampled_from(["", "nature", "objects"]),
        st.booleans(),
        st.sampled_from(["", "face", "happy face", "unhappy face"]),
    ),
    min_size=1,
    max_size=30,
    unique_by=lambda row: row[0],
)


@settings(deadline=None, max_examples=40)
@given(NAMES, st.integers(0, 3))
def test_no_wrong_name_might_be_true_and_none_is_missed_without_need(
    rows: list[tuple[str, str, bool, str]], seed: int
) -> None:
    samples = [labelled(name, group=group, broad=broad, family=family) for name, group, broad, family in rows]
    chosen = wrong_names(samples, seed=seed)
    for sample, wrong in zip(samples, chosen, strict=True):
        possible = [other for other in samples if not might(sample, other)]
        if wrong is None:
            assert not possible
        else:
            assert wrong in possible
    assert chosen == wrong_names(samples, seed=seed)


def test_each_name_is_wrong_exactly_once_where_that_is_possible() -> None:
    samples = [
        labelled(f"thing{n} part{n}", group=f"g{n % 4}", subgroup=f"s{n % 8}", broad=n % 5 == 0) for n in range(200)
    ]
    chosen = wrong_names(samples, seed=1)
    assert Counter(wrong.id for wrong in chosen if wrong) == Counter(sample.id for sample in samples)


def test_hard_ones_come_first() -> None:
    fruit = [labelled(name, group="food", subgroup="fruit") for name in ("red apple", "lemon", "pear", "melon")]
    tools = [labelled(name, group="objects", subgroup="tool") for name in ("hammer", "wrench", "axe", "saw")]
    for seed in range(5):
        for sample, wrong in zip([*fruit, *tools], wrong_names([*fruit, *tools], seed=seed), strict=True):
            assert wrong is not None
            assert wrong.meta["subgroup"] == sample.meta["subgroup"] or wrong is not fruit[0]
    pair = [labelled("red car"), labelled("blue car"), labelled("tall tower"), labelled("short tower")]
    assert [w and w.answer("name.en") for w in wrong_names(pair, seed=0)] == [
        "blue car",
        "red car",
        "short tower",
        "tall tower",
    ]


def test_one_picture_alone_has_no_wrong_name() -> None:
    assert wrong_names([labelled("cat")], seed=0) == [None]
    assert wrong_names([], seed=0) == []


def test_a_thousand_captions_take_no_time_to_speak_of() -> None:
    """Bounded tries: the work grows with the number of rows, not with its square."""
    captions = [f"a photo of the {n} street corner with {n % 7} cars" for n in range(1000)]
    chosen = wrong_names([labelled(text) for text in captions], seed=0)
    assert len(chosen) == 1000
