"""Scores of short free-text answers: exact match, token F1, and yes/no questions.

English follows SQuAD 2.0's rule (Rajpurkar et al., arXiv 1806.03822): lower case, ASCII punctuation out, the articles
a, an, the out, white space collapsed; the best of several references counts. Chinese has no spaces between words, so F1
is taken over characters, under its own rule id; the two are never averaged together.

Yes/no questions follow POPE's measures (Li et al., arXiv 2305.10355), but an answer that does not begin with yes or no
is a *failure*: the official script reads it as yes. Failures count as wrong for accuracy, as missed for recall, and
stay in the denominator of the yes-rate.
"""

import re
import string
import unicodedata
from collections import Counter
from collections.abc import Callable, Sequence
from functools import partial
from typing import Literal

import numpy as np
from jaxtyping import Float

from plait.core.errors import DataError
from plait.core.types import Score
from plait.evaluation.statistics import bootstrap, mean_score, to_score

Language = Literal["en", "zh"]

_ARTICLES = re.compile(r"\b(a|an|the)\b")
_NO_PUNCTUATION = str.maketrans("", "", string.punctuation)
_FIRST_WORD = re.compile(r"\W*(\w+)")
_RULES: dict[Language, str] = {"en": "squad-2.0", "zh": "nfkc-characters"}
_YES_NO_RULE = "first-word-yes-no/unparsed-wrong"


def tokens(text: str, language: Language = "en") -> list[str]:
    """What is compared: normalized words (en) or characters without punctuation and spaces (zh).

    Example:
        >>> tokens("The grinning face!"), tokens("笑脸。", "zh")
        (['grinning', 'face'], ['笑', '脸'])
    """
    if language == "zh":
        folded = unicodedata.normalize("NFKC", text).lower()
        return [c for c in folded if not c.isspace() and not unicodedata.category(c).startswith(("P", "C"))]
    return _ARTICLES.sub(" ", text.lower().translate(_NO_PUNCTUATION)).split()


def match_value(prediction: str, references: Sequence[str], language: Language = "en") -> float:
    """1 if the prediction equals a reference after normalization, else 0."""
    found = tokens(prediction, language)
    return float(any(found == tokens(reference, language) for reference in references))


def f1_value(prediction: str, references: Sequence[str], language: Language = "en") -> float:
    """Best token F1 over the references, as multisets; two empty answers agree.

    Example:
        >>> round(f1_value("smiling cat", ["grinning cat with smiling eyes"]), 3)
        0.571
    """
    found = tokens(prediction, language)
    return max((_f1(found, tokens(reference, language)) for reference in references), default=0.0)


def exact_match(
    predictions: Sequence[str],
    references: Sequence[Sequence[str]],
    *,
    name: str = "exact-match",
    language: Language = "en",
    groups: Sequence[str] | None = None,
) -> Score:
    """Share of predictions equal to a reference; empty predictions are counted as failures.

    Raises:
        DataError: Nothing to score, an item without reference, or unequal lengths.
    """
    return _mean_of(
        match_value, predictions, references, name=name, rule="exact-match", language=language, groups=groups
    )


def token_f1(
    predictions: Sequence[str],
    references: Sequence[Sequence[str]],
    *,
    name: str = "f1",
    language: Language = "en",
    groups: Sequence[str] | None = None,
) -> Score:
    """Mean of the best token F1 of each item; empty predictions are counted as failures.

    Raises:
        DataError: Nothing to score, an item without reference, or unequal lengths.
    """
    return _mean_of(f1_value, predictions, references, name=name, rule="f1", language=language, groups=groups)


def parse_yes_no(answer: str) -> bool | None:
    r"""True for yes, False for no, None if the first word is neither.

    Example:
        >>> parse_yes_no("Yes, there is."), parse_yes_no("NO\n"), parse_yes_no("There is a dog.")
        (True, False, None)
    """
    word = _FIRST_WORD.match(answer)
    return {"yes": True, "no": False}.get(word.group(1).lower()) if word else None


def yes_no(
    predictions: Sequence[str],
    truths: Sequence[bool],
    *,
    name: str = "yes-no",
    groups: Sequence[str] | None = None,
    seed: int = 0,
) -> list[Score]:
    """Accuracy, yes-rate of the *predictions*, precision, recall and F1, each with a 95 % interval.

    Yes is the positive class. A ratio with denominator 0 (no yes among the predictions) is 0.

    Args:
        predictions: Free-text answers.
        truths: Whether yes is right.
        name: Prefix of the score names.
        groups: Picture or concept of each question; questions that share one are resampled together.
        seed: Seed of the bootstrap.

    Raises:
        DataError: Nothing to score or unequal lengths.
    """
    _check_lengths(len(predictions), len(truths))
    parsed = [parse_yes_no(p) for p in predictions]
    failures = sum(p is None for p in parsed)
    said = np.array([p is True for p in parsed], dtype=np.float64)
    true = np.array(truths, dtype=np.float64)
    right = np.array([p == t for p, t in zip(parsed, truths, strict=True)], dtype=np.float64)
    # Columns: right, true positives, said yes, truly yes, items.
    table = np.stack([right, said * true, said, true, np.ones_like(true)], axis=1)
    ratios: dict[str, tuple[list[int], list[int]]] = {
        "precision": ([1], [2]),
        "recall": ([1], [3]),
        "f1": ([1, 1], [2, 3]),
    }
    means = {"accuracy": right, "yes-rate": said}
    scores = [
        mean_score(
            values, name=f"{name}/{key}", rule=f"{key}/{_YES_NO_RULE}", groups=groups, failures=failures, seed=seed
        )
        for key, values in means.items()
    ]
    for metric, (above, below) in ratios.items():
        statistic = partial(_ratio, above=above, below=below)
        interval = bootstrap(table, statistic, groups=groups, seed=seed)
        rule = f"{metric}/{_YES_NO_RULE}"
        scores.append(to_score(interval, name=f"{name}/{metric}", rule=rule, n=len(true), failures=failures))
    return scores


def _f1(found: list[str], wanted: list[str]) -> float:
    if not found or not wanted:
        return float(found == wanted)
    common = (Counter(found) & Counter(wanted)).total()
    return 2 * common / (len(found) + len(wanted))


def _ratio(sums: Float[np.ndarray, "row column"], above: list[int], below: list[int]) -> Float[np.ndarray, " row"]:
    numerator, denominator = sums[:, above].sum(1), sums[:, below].sum(1)
    return np.divide(numerator, denominator, out=np.zeros_like(numerator), where=denominator > 0)


def _mean_of(
    value: Callable[[str, Sequence[str], Language], float],
    predictions: Sequence[str],
    references: Sequence[Sequence[str]],
    *,
    name: str,
    rule: str,
    language: Language,
    groups: Sequence[str] | None,
) -> Score:
    _check_lengths(len(predictions), len(references))
    without = [i for i, wanted in enumerate(references) if not wanted]
    if without:
        raise DataError(
            f"{len(without)} of {len(references)} items have no reference, the first is item {without[0]}",
            remedy="give each item at least one",
        )
    values = [value(p, r, language) for p, r in zip(predictions, references, strict=True)]
    failures = sum(not p.strip() for p in predictions)
    return mean_score(values, name=name, rule=f"{rule}/{_RULES[language]}", groups=groups, failures=failures)


def _check_lengths(predictions: int, references: int) -> None:
    if predictions != references:
        raise DataError(
            f"{predictions} predictions but {references} references", remedy="score one prediction an item, in order"
        )
