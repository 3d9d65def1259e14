"""A vocabulary learned from texts: nothing is unknown, nothing is cut, and the same texts give the same ids."""

from __future__ import annotations

import unicodedata

import pytest
from hypothesis import given
from hypothesis import strategies as st

from plait.core.errors import CheckpointError, ConfigError
from plait.data.byte_pairs import LEAST, BytePairs

TEXTS = ["red apple", "green apple", "apple tree", "苹果树", "красное яблоко", "red tree"] * 2
WORDS = BytePairs.learn(TEXTS, size=320)


@given(st.text(max_size=40))
def test_every_text_comes_back(text: str) -> None:
    ids = WORDS.ids([text])[0]
    assert (ids[0], ids[-1]) == (1, 2)
    assert not {0, 1, 2} & set(ids[1:-1])  # what looks like a mark is text
    assert WORDS.text(ids) == unicodedata.normalize("NFC", text)


@pytest.mark.parametrize("text", ["<s>", "</s> <pad>", "a<s>b"])
def test_marks_written_in_a_text_are_text(text: str) -> None:
    ids = WORDS.ids([text])[0]
    assert not {0, 1, 2} & set(ids[1:-1])
    assert WORDS.text(ids) == text


def test_pairs_that_come_often_become_one_id() -> None:
    assert len(WORDS.ids(["red apple"])[0]) <= 4
    assert len(WORDS.ids(["zq"])[0]) == 4


def test_the_order_of_texts_changes_nothing_and_the_size_is_a_limit() -> None:
    assert BytePairs.learn(TEXTS[::-1], size=320).written() == WORDS.written()
    assert WORDS.size <= 320
    assert BytePairs.learn(["ab"], size=5000).size == LEAST  # no pair comes twice
    with pytest.raises(ConfigError, match="258 ids does not hold all bytes"):
        BytePairs.learn(TEXTS, size=258)


def test_what_was_written_is_read_again_and_what_is_damaged_is_refused() -> None:
    again = BytePairs.read(WORDS.written(), place="tokenizer.json")
    assert again.ids(TEXTS) == WORDS.ids(TEXTS)
    with pytest.raises(CheckpointError, match="no tokenizer"):
        BytePairs.read("{", place="tokenizer.json")
