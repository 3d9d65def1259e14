"""What scores say beside each other: differences that claims are about, and what explains variance."""

from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import Any

import numpy as np

from plait.evaluation.statistics import seeds_mean
from plait.studies.fusing.variance import by_chance, fusion_share, shares, with_conditions

Scores = Sequence[Mapping[str, Any]]
Key = dict[str, Any]

_BASELINES = ("concat-linear", "concat-flags", "concat-mlp")


def differences(scores: Scores) -> list[dict[str, Any]]:
    """Paired by seed, since all fusions of a seed get the same truth and samples.

    What a larger scale and normalization change for each fusion; gates less concatenation where most is lost, trained
    alike; and concatenation that was trained with dropped modalities less gates that were not.
    """
    pairs: list[tuple[str, Key, Key]] = []
    factor = max(_all(scores, "factor", part="scale"), default=1.0)
    for fusion in _all(scores, "fusion", part="scale"):
        same: Key = {"part": "scale", "fusion": fusion}
        plain, larger = {**same, "factor": 1.0, "norm": "none"}, {**same, "factor": factor, "norm": "none"}
        pairs.append((f"{fusion}: noise x{factor:g} - x1", larger, plain))
        pairs.append((f"{fusion}: noise x{factor:g}, rms - none", {**larger, "norm": "rms"}, larger))
    most = max(_all(scores, "drop", part="missing"), default=0.0)
    trained = _all(scores, "trained", part="missing")
    for task in _all(scores, "task", part="missing"):
        same = {"part": "missing", "task": task, "drop": most, "noise": 0.0}
        gated = {**same, "fusion": "gated"}
        for baseline in _BASELINES:
            theirs = {**same, "fusion": baseline}
            pairs += [
                (
                    f"{task}: gated - {baseline}, trained at {rate:g}",
                    {**gated, "trained": rate},
                    {**theirs, "trained": rate},
                )
                for rate in trained
            ]
            pairs += [
                (
                    f"{task}: {baseline} trained at {rate:g} - gated trained at 0",
                    {**theirs, "trained": rate},
                    {**gated, "trained": 0.0},
                )
                for rate in trained
                if rate
            ]
    found: list[dict[str, Any]] = []
    for name, ours, theirs in pairs:
        sides = [_one(scores, key) for key in (ours, theirs)]
        if sides[0] is None or sides[1] is None:
            continue  # the settings leave one out
        gains = [a - b for a, b in zip(sides[0]["seeds"], sides[1]["seeds"], strict=True)]
        score = seeds_mean(gains, name=name, rule="difference of accuracies, paired")
        found.append({"ours": ours, "theirs": theirs, **asdict(score), "seeds": gains})
    return found


def variance(scores: Scores) -> dict[str, Any]:
    """Shares of fusion and seed in every condition, and of condition, fusion and both together over all of them.

    A condition is a task with its scale, normalization, training and share of lost modalities. Of those shares the
    least and the greatest count; learning rates, which not all fusions were tried at, and noise do not.
    """
    counted = [s for s in scores if s["part"] != "rates" and not s["noise"]]
    ends = set(_ends(_all(counted, "drop", part="missing")))
    names = ("part", "task", "factor", "norm", "trained", "drop")
    grouped: dict[tuple[Any, ...], list[Mapping[str, Any]]] = {}
    for score in counted:
        if score["part"] != "missing" or score["drop"] in ends:
            key = tuple(score[name] for name in names)
            grouped.setdefault(key, []).append(score)
    rows: list[dict[str, Any]] = []
    tables: list[np.ndarray] = []
    for key, group in grouped.items():
        values = np.array([score["seeds"] for score in group])
        tables.append(values)
        split, sure = shares(values), fusion_share(values)
        rows.append(
            {
                **dict(zip(names, key, strict=True)),
                "spread": float(values.mean(1).max() - values.mean(1).min()),
                "shares": None if split is None else asdict(split),
                "fusion": None if sure is None else asdict(sure),
            }
        )
    overall = with_conditions(np.stack(tables)) if tables else None
    chance = by_chance(*tables[0].shape) if tables else None
    return {"conditions": rows, "by_chance": chance, "overall": overall}


def _all(scores: Scores, name: str, **same: object) -> list[Any]:
    """Values of a field, in the order in which they come."""
    return list(dict.fromkeys(s[name] for s in scores if all(s[key] == value for key, value in same.items())))


def _one(scores: Scores, key: Key) -> Mapping[str, Any] | None:
    return next((s for s in scores if all(s[name] == value for name, value in key.items())), None)


def _ends(values: Sequence[float]) -> tuple[float, ...]:
    return (min(values), max(values)) if values else ()
