from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from plait.core.errors import DataError
from plait.evaluation.text import exact_match, f1_value, match_value, parse_yes_no, token_f1, tokens, yes_no

pytestmark = pytest.mark.light


@pytest.mark.parametrize(
    ("prediction", "reference", "match", "f1"),
    [
        ("The grinning face.", "grinning face", 1.0, 1.0),
        ("a cat", "the cat!", 1.0, 1.0),
        ("theatre", "atre", 0.0, 0.0),  # articles go as whole words only
        ("cat cat", "cat", 0.0, 2 / 3),  # multisets: the second cat is not matched again
        ("dog", "cat", 0.0, 0.0),
        ("", "cat", 0.0, 0.0),
        ("the", "a", 1.0, 1.0),  # both empty after normalization: SQuAD 2.0 says equal
        ("smiling cat", "grinning cat with smiling eyes", 0.0, 4 / 7),
    ],
)
def test_squad_rule(prediction: str, reference: str, match: float, f1: float):
    assert match_value(prediction, [reference]) == match
    assert f1_value(prediction, [reference]) == pytest.approx(f1)


def test_best_reference_counts():
    assert f1_value("red heart", ["blue ball", "red heart"]) == 1.0
    assert exact_match(["x"], [["y", "X."]]).value == 1.0


def test_chinese_is_compared_by_character_under_its_own_rule():
    assert tokens("笑脸(ＡＢ)。 ", "zh") == ["笑", "脸", "a", "b"]
    assert f1_value("笑脸", ["笑哭的脸"], "zh") == pytest.approx(2 * 2 / 6)
    assert f1_value("笑脸", ["笑哭的脸"], "en") == 0.0  # one "word" each
    score = token_f1(["笑脸"], [["笑脸"]], language="zh")
    assert score.rule.startswith("f1/nfkc-characters")
    assert token_f1(["a"], [["a"]]).rule.startswith("f1/squad-2.0")


@given(st.text(max_size=30), st.text(max_size=30), st.sampled_from(["en", "zh"]))
def test_f1_is_symmetric_bounded_and_one_on_equal_answers(a: str, b: str, language):
    forth = f1_value(a, [b], language)
    assert forth == f1_value(b, [a], language)
    assert 0.0 <= forth <= 1.0
    assert f1_value(a, [a], language) == match_value(a, [a], language) == 1.0
    assert match_value(a, [b], language) <= forth


def test_empty_answers_are_counted():
    score = token_f1(["", "cat", " "], [["cat"]] * 3)
    assert (score.failures, score.n) == (2, 3)
    assert score.value == pytest.approx(1 / 3)


def test_items_without_reference_are_refused():
    with pytest.raises(DataError, match="1 of 2 items have no reference, the first is item 1"):
        token_f1(["a", "b"], [["a"], []])
    with pytest.raises(DataError, match="2 predictions but 1 references"):
        exact_match(["a", "b"], [["a"]])


@pytest.mark.parametrize(
    ("answer", "parsed"),
    [
        ("yes", True),
        (" Yes, there is a dog.", True),
        ("**No**", False),
        ("NO\n", False),
        ("nothing", None),
        ("yesterday", None),
        ("There is no dog", None),
        ("", None),
        ("...", None),
    ],
)
def test_first_word_decides(answer: str, parsed: bool | None):
    assert parse_yes_no(answer) is parsed


@pytest.mark.row("S4-132")
def test_yes_no_by_hand():
    # truth:       yes    yes   no    no    yes          no
    predictions = ["yes", "no", "no", "Yes", "there is", "I cannot say"]
    scores = {s.name: s for s in yes_no(predictions, [True, True, False, False, True, False], name="q")}
    values = {name.split("/")[1]: s.value for name, s in scores.items()}
    assert values == pytest.approx(
        {"accuracy": 2 / 6, "yes-rate": 2 / 6, "precision": 1 / 2, "recall": 1 / 3, "f1": 0.4}
    )
    assert {s.failures for s in scores.values()} == {2}
    assert all(s.low <= s.value <= s.high and s.n == 6 for s in scores.values())


@pytest.mark.row("S4-132")
def test_yes_to_everything_shows_in_the_yes_rate():
    truths = [i % 2 == 0 for i in range(100)]
    values = {s.name: s.value for s in yes_no(["yes"] * 100, truths)}
    assert values == pytest.approx(
        {
            "yes-no/accuracy": 0.5,
            "yes-no/yes-rate": 1.0,
            "yes-no/precision": 0.5,
            "yes-no/recall": 1.0,
            "yes-no/f1": 2 / 3,
        }
    )


def test_refusing_to_answer_earns_nothing():
    # The official POPE script reads "there is a dog" as yes and would give accuracy 0.5, F1 0.667.
    scores = yes_no(["There is a dog"] * 10, [True, False] * 5)
    assert [s.value for s in scores] == [0.0] * 5
    assert scores[0].failures == 10
    assert scores[0].high > 0


@given(st.lists(st.tuples(st.sampled_from(["yes", "no", "maybe"]), st.booleans()), min_size=1, max_size=30))
def test_yes_no_identities(items):
    said, truths = [a for a, _ in items], [b for _, b in items]
    values = {s.name.split("/")[1]: s.value for s in yes_no(said, truths)}
    counted = np.array([(a == "yes", a == "no", b) for a, b in items])
    assert values["yes-rate"] == pytest.approx(counted[:, 0].mean())
    assert values["accuracy"] == pytest.approx(
        (counted[:, 0] & counted[:, 2]).mean() + (counted[:, 1] & ~counted[:, 2]).mean()
    )
    p, r = values["precision"], values["recall"]
    assert values["f1"] == pytest.approx(2 * p * r / (p + r) if p + r else 0.0)
