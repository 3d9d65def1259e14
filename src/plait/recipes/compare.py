"""``plait runs compare``: what differs between runs, how good each is, and whether the difference is more than luck."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from plait.report.compare_page import Comparison, Difference
from plait.report.folder import number_of
from plait.report.scores import Score
from plait.report.sides import Side, differing, predictions, read_sides

_RETRIEVAL = "retrieval"
_FIELDS = ("concept", "uri")


@dataclass(slots=True)
class _Values:
    """A score taken apart: what each sample gave, and what is resampled together."""

    of: dict[str, float] = field(default_factory=dict[str, float])
    groups: dict[str, str] = field(default_factory=dict[str, str])
    asked: dict[str, str] = field(default_factory=dict[str, str])


def compare(paths: Sequence[Path]) -> Comparison:
    """Read runs and set them beside each other; the first one is what the others differ from.

    Args:
        paths: Run folders: finished, unfinished, failed or damaged.
    """
    sides = read_sides(paths)
    settings = differing([side.settings for side in sides if side.settings])
    if len(known := [side for side in sides if side.settings]) < len(sides):
        place = {id(side): at for at, side in enumerate(known)}
        settings = {
            key: [values[place[id(side)]] if id(side) in place else None for side in sides]
            for key, values in settings.items()
        }
    names = list(dict.fromkeys(key for side in sides for key in side.scores))
    differences = {
        (at, key): difference
        for at in range(1, len(sides))
        for key in names
        if (difference := _difference(sides[0], sides[at], key)) is not None
    }
    return Comparison(
        sides=sides,
        settings=settings,
        machine=differing([side.machine for side in sides]),
        data=_data(sides),
        scores=names,
        differences=differences,
    )


def _data(sides: Sequence[Side]) -> str:
    """Whether all runs have the same samples, in words; empty where they have."""
    digests = [tuple(sorted(side.data.items())) for side in sides]
    unknown = [side.name for side, digest in zip(sides, digests, strict=True) if not digest]
    known = {digest for digest in digests if digest}
    if len(known) > 1:
        return (
            "the data are not the same (shards_sha256 differs): other samples were trained on and scored, so the "
            "scores do not compare"
        )
    if unknown:
        return f"of {', '.join(unknown)} the data stage is not finished: nobody knows whether its data are the same"
    return ""


def _difference(first: Side, other: Side, key: tuple[str, str]) -> Difference | None:
    """Score of ``other`` minus that of ``first``: sample by sample where both keep their answers."""
    ours, theirs = other.scores.get(key), first.scores.get(key)
    if ours is None or theirs is None:
        return None
    pairs = _paired(first, other, key, scores=(theirs, ours))
    if pairs is not None:
        return pairs
    return Difference(value=ours.value - theirs.value)


def _paired(first: Side, other: Side, key: tuple[str, str], *, scores: tuple[Score, Score]) -> Difference | None:
    before, after = (_values(side, key) for side in (first, other))
    ids = list(before.of)
    if not ids or set(ids) != set(after.of) or before.asked != after.asked:
        return None
    for found, score in ((before, scores[0]), (after, scores[1])):
        # A score that these values do not add up to was made by another rule.
        if abs(sum(found.of.values()) / len(found.of) - score.value) > 1e-6:
            return None
    from plait.evaluation.statistics import paired_difference  # imports numpy

    found = paired_difference(
        [after.of[name] for name in ids],
        [before.of[name] for name in ids],
        name=key[1],
        rule="difference",
        groups=[before.groups[name] for name in ids],
    )
    return Difference(value=found.value, low=found.low, high=found.high, n=len(ids))


def _values(side: Side, key: tuple[str, str]) -> _Values:
    """What each sample gave to a score, from ``predictions.jsonl``; nothing where it cannot be told from that."""
    found = _Values()
    parts = key[1].split("/")
    for record in predictions(side, key[0]):
        name, value = record.get("id"), _value(record, parts)
        if isinstance(name, str) and value is not None:
            found.of[name] = value
            found.groups[name] = next((str(record[f]) for f in _FIELDS if record.get(f)), name)
            found.asked[name] = f"{record.get('question', '')}\n{record.get('truth', record.get('target', ''))}"
    return found


def _value(record: dict[str, Any], parts: Sequence[str]) -> float | None:
    """One sample's part in a score called ``retrieval/SPLIT/image-to-text/METRIC`` or ``SPLIT/TASK/METRIC``."""
    if parts[0] == _RETRIEVAL:
        rank = number_of(record.get("rank"))
        if len(parts) != 4 or parts[2] != "image-to-text" or record.get("split") != parts[1] or not rank:
            return None
        if parts[3] == "MRR":
            return 1.0 / rank
        return float(rank <= int(parts[3][2:])) if parts[3].startswith("R@") and parts[3][2:].isdigit() else None
    if len(parts) != 3 or (record.get("split"), record.get("task")) != (parts[0], parts[1]):
        return None
    target, answer = record.get("target"), record.get("answer")
    if not isinstance(target, str) or not isinstance(answer, str):
        return None
    from plait.evaluation.text import f1_value, match_value, parse_yes_no

    language = "zh" if parts[1] == "name.zh" else "en"
    if parts[2] == "accuracy":
        return float(parse_yes_no(answer) == parse_yes_no(target))
    if parts[2] == "exact-match":
        return match_value(answer, [target], language)
    return f1_value(answer, [target], language) if parts[2] == "f1" else None
