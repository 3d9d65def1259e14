"""Answers to scores: against numbers worked out by hand, and against brute force."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from plait.core.errors import DataError
from plait.core.types import Score
from plait.evaluation.answers import Asked, best_constants, gates, is_main, score_answers, tell
from plait.evaluation.text import f1_value

pytestmark = pytest.mark.light

RULES = {"blank": "blank=white-picture"}


def asked(
    number: int, task: str, target: str, *, split: str = "test-concept", group: str = "", **answers: str
) -> Asked:
    return Asked(
        id=f"{task}{number}",
        split=split,
        task=task,
        uri=f"{number}.png",
        question="?",
        target=target,
        group=group or f"concept{number}",
        answers=answers,
    )


def named(rows: list[Asked]) -> dict[str, Score]:
    scores = score_answers(rows, rules=RULES)
    found = {score.name: score for score in scores}
    assert len(found) == len(scores)
    return found


NAMES = [
    asked(0, "name.en", "red apple", model="The red apple.", blank="cat", chance="apple"),
    asked(1, "name.en", "green apple", model="red apple", blank="cat", chance="apple"),
    asked(2, "name.en", "cat", model="dog", blank="a cat", chance="apple"),
    asked(3, "name.en", "grinning cat with smiling eyes", model="smiling cat", blank="", chance="apple"),
]


@pytest.mark.row("S3-34")
def test_names_are_scored_as_worked_out_by_hand():
    found = named(NAMES)
    f1 = "test-concept/name.en/f1"
    # 1, 2·1/(2+2), 0, 2·2/(2+5) against 0, 0, 1, 0.
    ours, theirs = (1 + 1 / 2 + 0 + 4 / 7) / 4, 1 / 4
    assert found[f1].value == pytest.approx(ours)
    assert found[f"{f1}/blank"].value == pytest.approx(theirs)
    assert found[f"{f1}/gain-over-blank"].value == pytest.approx(ours - theirs)
    assert found[f"{f1}/chance"].value == pytest.approx((2 / 3 + 2 / 3) / 4)
    assert found["test-concept/name.en/exact-match"].value == 0.25
    assert (found[f1].failures, found[f"{f1}/blank"].failures) == (0, 1)
    gain = found[f"{f1}/gain-over-blank"]
    assert gain.low < gain.value < gain.high
    assert gain.rule.startswith("f1/squad-2.0; blank=white-picture; paired; ci=cluster-bootstrap")
    assert found[f"{f1}/blank"].rule.endswith("; blank=white-picture")
    assert found[f1].rule == next(s for s in score_answers(NAMES, rules={}) if s.name == f1).rule


@pytest.mark.row("S4-132")
def test_yes_no_follows_pope_and_counts_what_cannot_be_read():
    answers = ["Yes.", "no", "yes", "It is a cat", "no", "No, it is not."]
    targets = ["yes", "yes", "no", "yes", "no", "no"]
    rows = [
        asked(n, "yesno", target, group=f"c{n // 2}", model=answer, blank="yes")
        for n, (target, answer) in enumerate(zip(targets, answers, strict=True))
    ]
    found = named(rows)
    part = "test-concept/yesno"
    # 1 true positive, 1 false positive, 2 missed, 2 true negatives; 1 answer is neither.
    expected = {"accuracy": 3 / 6, "yes-rate": 2 / 6, "precision": 1 / 2, "recall": 1 / 3, "f1": 2 / 5}
    assert {m: found[f"{part}/{m}"].value for m in expected} == pytest.approx(expected)
    assert {found[f"{part}/{m}"].failures for m in expected if m in ("accuracy", "yes-rate")} == {1}
    assert found[f"{part}/accuracy/blank"].value == 0.5
    assert found[f"{part}/yes-rate/blank"].value == 1.0
    assert found[f"{part}/accuracy/gain-over-blank"].value == 0.0
    coin = found[f"{part}/accuracy/chance"]
    assert (coin.value, coin.low, coin.high) == (0.5, 0.5, 0.5)


def test_a_yes_no_question_without_such_an_answer_is_refused():
    with pytest.raises(DataError, match="the right answer is 'maybe'"):
        score_answers([asked(0, "yesno", "maybe", model="yes")], rules={})


def test_chinese_is_scored_in_characters_and_closed_tasks_by_exact_match_alone():
    found = named(
        [
            asked(0, "name.zh", "红苹果", model="苹果", chance="脸"),
            asked(1, "group", "food", model="Food.", chance="objects"),
            asked(2, "count", "two", model="three", chance="two"),
            asked(3, "above", "red apple", model="apple", chance="cat"),
        ]
    )
    assert found["test-concept/name.zh/f1"].value == pytest.approx(2 * 2 / (2 + 3))
    assert "nfkc-characters" in found["test-concept/name.zh/f1"].rule
    assert found["test-concept/group/exact-match"].value == 1.0
    assert found["test-concept/count/exact-match"].value == 0.0
    assert found["test-concept/count/exact-match/gain-over-chance"].value == -1.0
    assert found["test-concept/above/f1"].value == pytest.approx(2 / 3)
    assert "test-concept/group/f1" not in found
    assert {name for name, score in found.items() if is_main(score) and name.count("/") == 2} == {
        "test-concept/name.zh/f1",
        "test-concept/group/exact-match",
        "test-concept/count/exact-match",
        "test-concept/above/f1",
    }


def test_intervals_resample_concepts_and_not_questions():
    """Forty questions about two concepts say as much as two questions about them."""
    right = {"c0": "cat", "c1": "x"}
    many = [asked(n, "name.en", "cat", group=c, model=right[c]) for c in right for n in range(20)]
    score = named(many)["test-concept/name.en/f1"]
    assert (score.value, score.low, score.high) == (0.5, 0.0, 1.0)
    alone = [asked(n, "name.en", "cat", model=("cat", "x")[n % 2]) for n in range(40)]
    score = named(alone)["test-concept/name.en/f1"]
    assert 0.3 < score.low < score.high < 0.7


def test_splits_are_never_mixed():
    rows = [
        asked(0, "name.en", "cat", model="cat"),
        asked(0, "name.en", "cat", split="test-style", model="dog", blank="cat"),
    ]
    found = named(rows)
    assert found["test-concept/name.en/f1"].value == 1.0
    assert found["test-style/name.en/f1"].value == 0.0
    assert not [name for name in found if name.startswith("test-concept") and name.endswith("blank")]


@pytest.mark.parametrize("answers", [{"model": "x"}, {"blank": "x"}, {"model": "x", "blank": "x", "other": "x"}])
def test_a_system_that_did_not_answer_all_questions_is_named(answers: dict[str, str]):
    with pytest.raises(DataError, match="answered, expected") as caught:
        score_answers([NAMES[0], asked(9, "name.en", "cat", **answers)], rules={})
    assert caught.value.place == "question name.en9 of test-concept/name.en"


def test_a_record_names_baselines_and_what_was_asked():
    assert NAMES[2].record() == {
        "id": "name.en2",
        "split": "test-concept",
        "task": "name.en",
        "uri": "2.png",
        "question": "?",
        "target": "cat",
        "answer": "dog",
        "blank": "a cat",
        "chance": "apple",
    }


# --- gates ---------------------------------------------------------------------------------------------------------


def score(name: str, value: float, low: float, high: float) -> Score:
    return Score(name=name, value=value, low=low, high=high, n=200, rule="x")


@pytest.mark.parametrize(
    ("low", "accuracy_low", "rate", "expected"),
    [
        (0.01, 0.51, 0.5, [True, True]),
        (0.0, 0.5, 0.5, [False, False]),
        (-0.01, 0.6, 0.34, [False, False]),
        (0.2, 0.6, 0.66, [True, False]),
        (0.2, 0.6, 0.65, [True, True]),
    ],
)
def test_gates_open_only_by_the_intervals(low: float, accuracy_low: float, rate: float, expected: list[bool]):
    scores = [
        score("test-style/name.en/f1/gain-over-untuned", 0.3, low, 0.4),
        score("test-style/yesno/accuracy", 0.7, accuracy_low, 0.8),
        score("test-style/yesno/yes-rate", rate, 0.3, 0.7),
        score("test-both/name.en/f1/gain-over-blank", -1.0, -1.0, -1.0),
    ]
    found = gates(scores)
    assert [gate.passed for gate in found] == expected
    assert [gate.name for gate in found] == ["name.en f1 over untuned on test-style", "yes/no accuracy on test-style"]


def test_a_failed_gate_is_told_with_its_numbers_and_a_missing_one_is_not_passed():
    rows = [*NAMES, *(asked(n, "yesno", "yes", model="yes") for n in range(3))]
    scores = score_answers(rows, rules=RULES)
    found = gates(scores)
    assert [gate.passed for gate in found] == [False, False, False]
    lines = tell(scores, found, retrieval={"test-concept": 0.2})
    assert "token F1 of 0.518" in lines[0]
    assert "chance 0.333; blank 0.250" in lines[0]
    assert "the pretrain stage retrieves 20.0%" in lines[0]
    assert "yes is said to 100%; 0 answers were neither" in lines[1]
    assert lines[2].startswith("gates: 3 of 3 FAILED: name.en f1 over chance on test-concept (-0.")
    assert tell(scores[:0], [], retrieval={}) == [
        "gates: none could be measured; they need English names or yes/no questions of a test split"
    ]


# --- chance --------------------------------------------------------------------------------------------------------


@given(st.lists(st.lists(st.sampled_from("abcd"), max_size=4), min_size=1, max_size=12))
def test_the_best_constant_is_that_of_brute_force(answers: list[list[str]]):
    texts = [" ".join(f"w{letter}" for letter in answer) for answer in answers]
    found = best_constants({"name.en": texts})["name.en"]

    def mean(constant: str) -> float:
        return sum(f1_value(constant, [text]) for text in texts if text) / len(texts)

    assert found in texts
    if any(texts):
        assert mean(found) == pytest.approx(max(mean(text) for text in texts))


def test_constants_of_closed_tasks_are_the_most_frequent_and_yes_no_has_none():
    answers = {
        "group": ["food", "objects", "objects"],
        "count": ["two", "one"],
        "yesno": ["yes"],
        "name.zh": ["红", "红心"],
    }
    found = best_constants(answers)
    assert (found["group"], found["count"]) == ("objects", "two")
    assert "yesno" not in found
    assert found["name.zh"] in ("红", "红心")
