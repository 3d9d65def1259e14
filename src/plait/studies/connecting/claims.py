"""What the scores say of the claims: differences paired by seed, and a verdict that follows from each by rule."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import Any

from plait.evaluation.statistics import seeds_mean
from plait.studies.connectors import ConnectorStudy
from plait.studies.verdicts import Verdict, verdict

Rows = Sequence[Mapping[str, Any]]

_PAIRS = (
    ("qformer-4", "mlp"),
    ("qformer-4", "mlp-wide"),
    ("qformer-4", "shuffle-4"),
    ("resampler-4", "mlp-wide"),
    ("qformer-4", "qformer-16"),
    ("qformer-16", "mlp-wide"),
    ("mlp", "linear"),
    ("mlp-4", "mlp"),
    ("mlp-wide", "mlp"),
    ("gated", "mlp-wide"),
    ("gated", "qformer-4"),
)
"""Ours less theirs."""


def enough(low: float, high: float, *, margin: float) -> Verdict:
    """Of "no more is needed", by what more would gain: at most the margin, or more than it, for the whole interval.

    Example:
        >>> [enough(low, high, margin=0.02) for low, high in ((-0.1, 0.01), (0.03, 0.06), (0.01, 0.03))]
        ['supported', 'contradicted', 'not shown']
    """
    if low == high:  # all seeds alike to the last question: nothing was learned, or nothing is left to gain
        return "not shown"
    return "supported" if high <= margin else "contradicted" if low > margin else "not shown"


def differences(scores: Rows) -> list[dict[str, Any]]:
    """Of pairs of connectors that claims are about, by kind of question; all of a seed get the same of everything."""
    seen = {(score["arm"], score["kind"]): score for score in scores if score["picture"]}
    found: list[dict[str, Any]] = []
    for ours, theirs in _PAIRS:
        for kind in dict.fromkeys(kind for _, kind in seen):
            if (ours, kind) not in seen or (theirs, kind) not in seen:
                continue  # the settings leave one out
            pair = zip(seen[ours, kind]["seeds"], seen[theirs, kind]["seeds"], strict=True)
            gains = [a - b for a, b in pair]
            score = seeds_mean(gains, name=f"{ours} - {theirs}: {kind}", rule="difference of accuracies, paired")
            found.append({"ours": ours, "theirs": theirs, "kind": kind, **asdict(score), "seeds": gains})
    return found


def claims(study: ConnectorStudy, *, costs: Rows, compared: Rows, unchanged: Mapping[str, int]) -> list[dict[str, Any]]:
    """Each claim with what was found, and its verdict."""
    return [*_fewer(costs), *_compared(study, compared), *_frozen(unchanged)]


def _fewer(costs: Rows) -> list[dict[str, Any]]:
    """S2-C04 by counting: exact numbers, no interval."""
    at = {(cost["size"], cost["arm"]): cost for cost in costs}
    found: list[dict[str, Any]] = []
    for size, ours, theirs in (("study", "qformer-4", "mlp"), ("llava-1.5-7b", "qformer-32", "mlp")):
        if (size, ours) not in at or (size, theirs) not in at:
            continue
        for what, name in (("slots", "tokens in the decoder"), ("flops", "FLOPs of connector and prefill")):
            a, b = at[size, ours][what], at[size, theirs][what]
            said: Verdict = "supported" if a < b else "contradicted"
            about = f"{ours} has fewer {name} than {theirs}, {size}"
            found.append(_claim("S2-C04", about, f"{b:,} -> {a:,} ({b / a:.2f}x fewer)", verdict=said))
    return found


def _compared(study: ConnectorStudy, compared: Rows) -> list[dict[str, Any]]:
    at = {(one["ours"], one["theirs"], one["kind"]): one for one in compared}
    found: list[dict[str, Any]] = []
    for ours, theirs in (("qformer-4", "qformer-16"), ("qformer-4", "mlp-wide"), ("resampler-4", "mlp-wide")):
        for kind in ("count", "read"):
            one = at.get((ours, theirs, kind))
            if one is not None:
                about = f"fewer tokens cost nothing on {kind}: {theirs} gains {_points(study.margin)} or less on {ours}"
                said = enough(-one["high"], -one["low"], margin=study.margin)
                found.append(_claim("S2-C04", about, _said(one), verdict=said))
    for ours, theirs, about in (
        ("mlp", "linear", "one layer is enough: two gain {} or less"),
        ("mlp-4", "mlp", "two layers are enough: four gain {} or less"),
        ("mlp-wide", "mlp", "two narrow layers are enough: wide ones gain {} or less"),
    ):
        one = at.get((ours, theirs, "mean"))
        if one is not None:
            said = enough(one["low"], one["high"], margin=study.margin)
            found.append(_claim("S2-C05", about.format(_points(study.margin)), _said(one), verdict=said))
    for kind in dict.fromkeys(one["kind"] for one in compared):
        one = at.get(("gated", "mlp-wide", kind))
        if one is not None:
            about = f"layers inside the decoder are better than a projection with as many weights: {kind}"
            found.append(_claim("S2-C06", about, _said(one), verdict=verdict(one["low"], one["high"])))
    return found


def _frozen(unchanged: Mapping[str, int]) -> list[dict[str, Any]]:
    total = unchanged["trainings"]
    kept: dict[bool, Verdict] = {True: "supported", False: "contradicted"}
    return [
        _claim(row, about, f"{unchanged[name]} of {total} trainings", verdict=kept[unchanged[name] == total])
        for row, name, about in (
            ("S2-C06", "same_text", "without a picture every score is the decoder's own, bit for bit"),
            ("S2-06", "same_decoder", "every byte of the decoder is as it was"),
            ("S2-06", "same_tower", "every byte of the tower is as it was"),
        )
    ]


def _claim(row: str, about: str, found: str, *, verdict: Verdict) -> dict[str, Any]:
    return {"row": row, "claim": about, "found": found, "verdict": verdict}


def _said(one: Mapping[str, Any]) -> str:
    value, low, high = (100 * one[key] for key in ("value", "low", "high"))
    return f"{one['ours']} - {one['theirs']}: {value:+.1f} ({low:+.1f} to {high:+.1f}) points"


def _points(share: float) -> str:
    return f"{100 * share:g} points"
