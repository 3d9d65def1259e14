"""Accuracy and margin of held-out pairs, over all and by task."""

from __future__ import annotations

import pytest

from plait.core.errors import DataError
from plait.evaluation.preferences import Preferred, score_preferences

pytestmark = pytest.mark.light


def pairs(task: str, gaps: list[tuple[float, float]]) -> list[Preferred]:
    return [Preferred(task=task, group=f"{task}{n}", before=b, after=a) for n, (b, a) in enumerate(gaps)]


def test_what_was_wrong_and_became_right_counts_in_the_difference() -> None:
    found = pairs("yesno", [(-1.0, 1.0), (2.0, 3.0), (0.0, 0.0)]) + pairs("name.en", [(-4.0, -3.0)])
    scores = {score.name: score for score in score_preferences(found, split="test-style", beta=0.5)}
    value = {name.removeprefix("test-style/"): score.value for name, score in scores.items()}
    assert value == {
        "preference/accuracy": 0.5,
        "preference/accuracy/tuned": 0.25,
        "preference/accuracy/gain-over-tuned": 0.25,
        "preference/reward-margin": pytest.approx(0.5 * (2 + 1 + 0 + 1) / 4),
        "preference-yesno/accuracy": pytest.approx(2 / 3),
        "preference-yesno/accuracy/tuned": pytest.approx(1 / 3),
        "preference-yesno/accuracy/gain-over-tuned": pytest.approx(1 / 3),
        "preference-yesno/reward-margin": pytest.approx(0.5),
        "preference-name.en/accuracy": 0.0,
        "preference-name.en/accuracy/tuned": 0.0,
        "preference-name.en/accuracy/gain-over-tuned": 0.0,
        "preference-name.en/reward-margin": pytest.approx(0.5),
    }
    assert scores["test-style/preference/accuracy"].n == 4


def test_one_task_is_said_once() -> None:
    names = [score.name for score in score_preferences(pairs("yesno", [(0.1, 0.2)]), split="s", beta=1.0)]
    assert len(names) == 4
    assert all(name.startswith("s/preference/") for name in names)


def test_nothing_to_score_is_refused() -> None:
    with pytest.raises(DataError, match="no items"):
        score_preferences([], split="s", beta=1.0)
