"""How often a model finds the right answer likelier than a plausible wrong one, before and after training; pure."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from plait.core.types import Score
from plait.evaluation.statistics import mean_score, paired_difference

BEFORE = "tuned"
"""The system that alignment starts from."""

_RULE = "accuracy/right-answer-likelier-than-wrong/sum-of-token-log-probabilities"


@dataclass(frozen=True, slots=True, kw_only=True)
class Preferred:
    """A held-out pair.

    Attributes:
        task: What kind of question.
        group: Concepts in its picture; pairs that share it are resampled together.
        before: log p(right answer) - log p(wrong answer), in nats, under the model that training starts from.
        after: The same under the trained model.
    """

    task: str
    group: str
    before: float
    after: float


def score_preferences(pairs: Sequence[Preferred], *, split: str, beta: float) -> list[Score]:
    """Accuracy after and before, their paired difference, and the reward margin: over all pairs, then by task.

    Names are ``<split>/preference/accuracy``, with ``/tuned`` and ``/gain-over-tuned`` after it, and
    ``<split>/preference/reward-margin``; for a task, ``preference-<task>`` in the middle. The sum over an answer's
    tokens favors short answers; before and after share that, so the difference does not.

    Args:
        pairs: Held out.
        split: Where they are from.
        beta: Of the objective: a margin is ``beta (after - before)``.

    Raises:
        DataError: There is no pair, or a log-probability is not finite.
    """
    scores = _scores(pairs, f"{split}/preference", beta)
    tasks = dict.fromkeys(pair.task for pair in pairs)
    for task in tasks if len(tasks) > 1 else ():
        scores += _scores([pair for pair in pairs if pair.task == task], f"{split}/preference-{task}", beta)
    return scores


def _scores(pairs: Sequence[Preferred], name: str, beta: float) -> list[Score]:
    groups = [pair.group for pair in pairs]
    after, before = ([float(gap > 0) for gap in gaps] for gaps in ([p.after for p in pairs], [p.before for p in pairs]))
    accuracy = f"{name}/accuracy"
    return [
        mean_score(after, name=accuracy, rule=_RULE, groups=groups),
        mean_score(before, name=f"{accuracy}/{BEFORE}", rule=f"{_RULE}; before alignment", groups=groups),
        paired_difference(after, before, name=f"{accuracy}/gain-over-{BEFORE}", rule=_RULE, groups=groups),
        mean_score(
            [beta * (pair.after - pair.before) for pair in pairs],
            name=f"{name}/reward-margin",
            rule=f"beta={beta:g} times the gain in log-odds of right over wrong, nats",
            groups=groups,
        ),
    ]
