"""Answers of several systems to the same questions, to scores, differences and gates; pure: no model and no files.

One system is the model; the others are what it has to beat. Free answers are scored by exact match and token F1, closed
ones (``group``, ``count``) by exact match, yes/no questions as in :func:`plait.evaluation.text.yes_no`. Questions about
one concept are not independent: intervals resample whole concepts.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from plait.core.errors import DataError
from plait.core.types import Score
from plait.evaluation.statistics import exact_score, paired_difference
from plait.evaluation.text import Language, exact_match, f1_value, match_value, parse_yes_no, token_f1, tokens, yes_no

MODEL = "model"
"""The system that is scored; all others are baselines."""

CHANCE = "chance"
"""What can be had without looking: the constant answer that is best on the training answers; for yes/no a coin."""

GATED = ("test-concept", "test-style")
"""Splits on which a model has to pass the gates."""

YES_RATE = (0.35, 0.65)
"""Share of yes among the answers within which accuracy on balanced questions means something."""

YES_NO = "yesno"
_CLOSED = frozenset({"group", "count"})
_CHINESE = frozenset({"name.zh"})


@dataclass(frozen=True, slots=True, kw_only=True)
class Asked:
    """A question with what every system answered.

    Attributes:
        id: Of the sample.
        split: Where it is from.
        task: What kind of question.
        uri: Of its picture.
        question: As it was asked.
        target: The right answer.
        group: Concepts in its picture; items that share it are resampled together.
        answers: By system: :data:`MODEL`, then baselines; the same systems for all questions of a split and task.
    """

    id: str
    split: str
    task: str
    uri: str
    question: str
    target: str
    group: str
    answers: Mapping[str, str]

    def record(self) -> dict[str, Any]:
        """A line of ``predictions.jsonl``: the model's is ``answer``, a baseline's is under its name."""
        answers = {"answer" if system == MODEL else system: text for system, text in self.answers.items()}
        fields = ("id", "split", "task", "uri", "question", "target")
        return {name: getattr(self, name) for name in fields} | answers


def leading(task: str) -> str:
    """The metric in which systems are compared on a task."""
    return "accuracy" if task == YES_NO else "exact-match" if task in _CLOSED else "f1"


def score_answers(asked: Sequence[Asked], *, rules: Mapping[str, str]) -> list[Score]:
    """Score every system on every task of every split, and the model against each baseline in pairs.

    Names are ``<split>/<task>/<metric>`` for the model, ``<split>/<task>/<metric>/<baseline>`` for the others, and
    ``<split>/<task>/<metric>/gain-over-<baseline>`` for model - baseline in the leading metric.

    Args:
        asked: Questions with answers.
        rules: By baseline, what it is; goes into the rule of its scores.

    Raises:
        DataError: A system did not answer all questions of a task, or a yes/no question has another right answer.
    """
    scores: list[Score] = []
    for (split, task), rows in _parts(asked).items():
        part, metric = f"{split}/{task}", leading(task)
        baselines = _baselines(rows, part)
        ours = _scores(task, rows, MODEL, part=part)
        values, groups = _values(task, rows, MODEL), [row.group for row in rows]
        (compared,) = (score.rule.partition(";")[0] for score in ours if score.name == f"{part}/{metric}")
        scores += ours
        if task == YES_NO:
            scores.append(exact_score(0.5, name=f"{part}/{metric}/{CHANCE}", rule="accuracy; a coin", n=len(rows)))
        for system in baselines:
            what = rules.get(system, system)
            scores += [
                replace(score, name=f"{score.name}/{system}", rule=f"{score.rule}; {what}")
                for score in _scores(task, rows, system, part=part)
            ]
            scores.append(
                paired_difference(
                    values,
                    _values(task, rows, system),
                    name=f"{part}/{metric}/gain-over-{system}",
                    rule=f"{compared}; {what}",
                    groups=groups,
                )
            )
    return scores


@dataclass(frozen=True, slots=True, kw_only=True)
class Gate:
    """Something a model that sees and reads has to pass.

    Attributes:
        name: Such as ``name.en f1 over blank on test-concept``.
        passed: Whether it did.
        measured: The numbers that decided.
    """

    name: str
    passed: bool
    measured: str


def gates(scores: Iterable[Score]) -> list[Gate]:
    """The gates, as far as what they need was measured.

    The 95 % interval of each naming gain (over the best constant answer, a blank picture and the untuned model) lies
    above 0; that of yes/no accuracy above 0.5, with a yes-rate within :data:`YES_RATE`.
    """
    named = {score.name: score for score in scores}
    found: list[Gate] = []
    for split in GATED:
        for baseline in (CHANCE, "blank", "untuned"):
            gain = named.get(f"{split}/name.en/f1/gain-over-{baseline}")
            if gain is not None:
                name = f"name.en f1 over {baseline} on {split}"
                found.append(Gate(name=name, passed=gain.low > 0, measured=f"{gain.low:+.3f} to {gain.high:+.3f}"))
        right, rate = (named.get(f"{split}/{YES_NO}/{metric}") for metric in ("accuracy", "yes-rate"))
        if right is not None and rate is not None:
            passed = right.low > 0.5 and YES_RATE[0] <= rate.value <= YES_RATE[1]
            measured = f"{right.low:.1%} to {right.high:.1%}, yes-rate {rate.value:.1%}"
            found.append(Gate(name=f"yes/no accuracy on {split}", passed=passed, measured=measured))
    return found


def tell(scores: Sequence[Score], passed: Sequence[Gate], *, retrieval: Mapping[str, float]) -> list[str]:
    """What a person wants to know, in a few lines: names of each split, yes/no, the rest, gates.

    Args:
        scores: Of :func:`score_answers`.
        passed: Of :func:`gates`.
        retrieval: By split, share of pictures whose name a dual encoder found first; empty where there is none.
    """
    named = {score.name: score for score in scores}
    splits = list(dict.fromkeys(score.name.partition("/")[0] for score in scores))
    lines = [_tell_names(named, split, retrieval.get(split)) for split in splits if f"{split}/name.en/f1" in named]
    if asked := [split for split in splits if f"{split}/{YES_NO}/accuracy" in named]:
        right = [named[f"{split}/{YES_NO}/accuracy"] for split in asked]
        told = [
            f"{s.value:.1%} on {split} ({s.low:.1%} to {s.high:.1%})" for split, s in zip(asked, right, strict=True)
        ]
        rates = [f"{named[f'{split}/{YES_NO}/yes-rate'].value:.0%}" for split in asked]
        unread = sum(score.failures for score in right)
        lines.append(
            f"yes or no: right for {', '.join(told)}; chance 50 %; yes is said to {', '.join(rates)}; "
            f"{unread:,} answers were neither"
        )
    lines += [line for split in splits[:1] if (line := _tell_rest(named, split))]
    failed = [f"{gate.name} ({gate.measured})" for gate in passed if not gate.passed]
    if failed:
        lines.append(f"gates: {len(failed)} of {len(passed)} FAILED: {'; '.join(failed)}")
    elif passed:
        beyond = "a constant answer, a blank picture and the untuned model"
        lines.append(f"gates: all {len(passed)} passed: names beyond {beyond}, yes/no")
    else:
        lines.append("gates: none could be measured; they need English names or yes/no questions of a test split")
    return lines


def _tell_names(named: Mapping[str, Score], split: str, retrieved: float | None) -> str:
    key = f"{split}/name.en"
    f1, exact = named[f"{key}/f1"], named[f"{key}/exact-match"]
    beside = [
        f"; {what} {s.value:.3f}" for what in (CHANCE, "blank", "untuned") if (s := named.get(f"{key}/f1/{what}"))
    ]
    found = "" if retrieved is None else f"; the pretrain stage retrieves {retrieved:.1%}"
    return (
        f"{split}: names have a token F1 of {f1.value:.3f} (95 % {f1.low:.3f} to {f1.high:.3f}{''.join(beside)}), "
        f"{exact.value:.1%} of {exact.n:,} are exact{found}"
    )


def _tell_rest(named: Mapping[str, Score], split: str) -> str:
    told: list[str] = []
    for name, score in named.items():
        part, task, *metric = name.split("/")
        if part == split and task not in ("name.en", YES_NO) and metric == [leading(task)]:
            digits, chance = ".1%" if task in _CLOSED else ".3f", named.get(f"{name}/{CHANCE}")
            against = f" (chance {chance.value:{digits}})" if chance else ""
            told.append(f"{task} {score.value:{digits}}{against}")
    return f"the rest on {split}, free answers by token F1: {', '.join(told)}" if told else ""


def is_main(score: Score) -> bool:
    """Whether it is the model's leading metric on a task, or a difference in it."""
    _, task, metric, *rest = score.name.split("/")
    return metric == leading(task) and (not rest or rest[0].startswith("gain-over-"))


def best_constants(targets: Mapping[str, Sequence[str]]) -> dict[str, str]:
    """By task, the answer that would score best if it were always given; yes/no has none.

    For a closed task that is the most frequent answer, for a free one the answer with the best mean token F1; of equals
    the first.

    Args:
        targets: Right answers in training, by task.
    """
    found: dict[str, str] = {}
    for task, answers in targets.items():
        if task in _CLOSED:
            found[task] = Counter(answers).most_common(1)[0][0]
        elif task != YES_NO:
            found[task] = _best_by_f1(answers, _language(task))
    return found


# --- inside --------------------------------------------------------------------------------------------------------


def _parts(asked: Sequence[Asked]) -> dict[tuple[str, str], list[Asked]]:
    parts: dict[tuple[str, str], list[Asked]] = {}
    for row in asked:
        parts.setdefault((row.split, row.task), []).append(row)
    return parts


def _baselines(rows: Sequence[Asked], part: str) -> list[str]:
    systems = list(rows[0].answers)
    for row in rows:
        if set(row.answers) != set(systems) or MODEL not in row.answers:
            raise DataError(
                f"{sorted(row.answers)} answered, expected {sorted({*systems, MODEL})}",
                place=f"question {row.id} of {part}",
                remedy="let every system answer all questions of a task, or none",
            )
    return [system for system in systems if system != MODEL]


def _language(task: str) -> Language:
    return "zh" if task in _CHINESE else "en"


def _scores(task: str, rows: Sequence[Asked], system: str, *, part: str) -> list[Score]:
    said, groups = [row.answers[system] for row in rows], [row.group for row in rows]
    if task == YES_NO:
        return yes_no(said, [_truth(row) for row in rows], name=part, groups=groups)
    right, language = [[row.target] for row in rows], _language(task)
    scores = [exact_match(said, right, name=f"{part}/exact-match", language=language, groups=groups)]
    if task not in _CLOSED:
        scores.append(token_f1(said, right, name=f"{part}/f1", language=language, groups=groups))
    return scores


def _values(task: str, rows: Sequence[Asked], system: str) -> list[float]:
    """The leading metric of each question."""
    if task == YES_NO:
        return [float(parse_yes_no(row.answers[system]) == _truth(row)) for row in rows]
    value = match_value if task in _CLOSED else f1_value
    return [value(row.answers[system], [row.target], _language(task)) for row in rows]


def _truth(row: Asked) -> bool:
    truth = parse_yes_no(row.target)
    if truth is None:
        raise DataError(
            f"the right answer is {row.target!r}, expected yes or no",
            place=f"question {row.id}",
            remedy="make the questions again with the data stage",
        )
    return truth


def _best_by_f1(answers: Sequence[str], language: Language) -> str:
    """Over pairs that share a token only, by an index from token to answers."""
    # The second "ha" of "ha ha" is another piece than the first, so that multisets become sets.
    pieces: list[list[tuple[str, int]]] = []
    index: defaultdict[tuple[str, int], list[int]] = defaultdict(list)
    for number, answer in enumerate(answers):
        seen: Counter[str] = Counter()
        pieces.append([])
        for token in tokens(answer, language):
            piece = (token, seen[token])
            seen[token] += 1
            pieces[-1].append(piece)
            index[piece].append(number)

    def total(one: int) -> float:
        shared = Counter(other for piece in pieces[one] for other in index[piece])
        return sum((2 * common / (len(pieces[one]) + len(pieces[other])) for other, common in shared.items()), 0.0)

    return answers[max(range(len(answers)), key=total)]
