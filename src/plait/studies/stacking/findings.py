"""What the scores say about each claim: differences paired by seed, and a verdict that follows from the interval."""

from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import Any

from plait.evaluation.statistics import seeds_mean
from plait.studies.stacking.probes import specialization
from plait.studies.verdicts import verdict

Results = Mapping[str, Any]
Claim = dict[str, Any]

ALIKE = 0.05
"""An accuracy that falls by less over all distances counts as held."""

MOST = 0.5
"""Of a question: heads have divided the work if one of them answers more."""


def claims(results: Results) -> list[Claim]:
    """All claims, with what they were tried by."""
    return [*_distance(results), *_ablation(results), *_several(results)]


def _claim(row: str, name: str, values: Sequence[float], *, unit: str, against: float = 0.0) -> Claim:
    score = seeds_mean(values, name=name, rule="paired by seed")
    found = verdict(score.low, score.high, limit=against)
    return {"row": row, **asdict(score), "unit": unit, "against": against, "seeds": list(values), "verdict": found}


def _less(ours: Sequence[float], theirs: Sequence[float]) -> list[float]:
    return [a - b for a, b in zip(ours, theirs, strict=True)]


# --- distance --------------------------------------------------------------------------------------------------------


def _distance(results: Results) -> list[Claim]:
    lags, readers = results["spec"]["distance"]["lags"], results["spec"]["distance"]["readers"]
    near, far = min(lags), max(lags)
    found: list[Claim] = []
    if "transformer" not in readers:
        return found
    for part in ("copy", "keep"):
        ours = {lag: _at(results, part, "transformer", lag=lag) for lag in (near, far)}
        name = f"{part}: transformer, at {far} - at {near}"
        found.append(_claim("S3-C02", name, _less(ours[far], ours[near]), unit="points", against=-ALIKE))
        for other in readers:
            if other != "transformer":
                gains = _less(ours[far], _at(results, part, other, lag=far))
                found.append(_claim("S3-C02", f"{part} at {far}: transformer - {other}", gains, unit="points"))
    return found


def _at(results: Results, part: str, arm: str, *, lag: int) -> list[float]:
    question = f"back {lag}" if part == "copy" else f"{lag}"
    wanted = (part, arm, question)
    return next(s["seeds"] for s in results["scores"] if (s["part"], s["arm"], s["question"]) == wanted)


# --- norms and residuals ---------------------------------------------------------------------------------------------


def _ablation(results: Results) -> list[Claim]:
    spec = results["spec"]["ablation"]
    steps = {(s["level"], s["arm"]): s["seeds"] for s in results["steps"]}
    falls = {(g["level"], g["arm"]): g["seeds"] for g in results["gradients"]}
    found: list[Claim] = []
    for depth in spec["depths"]:
        for sign, word in (("+", "with"), ("-", "without")):
            for place in spec["places"]:
                if place != "none" and "none" in spec["places"]:
                    saved = _less(steps[depth, f"none{sign}"], steps[depth, f"{place}{sign}"])
                    name = f"depth {depth}, {word} residual: steps saved by {place}-norm"
                    found.append(_claim("S3-C04", name, saved, unit="steps"))
        for place in spec["places"]:
            saved = _less(steps[depth, f"{place}-"], steps[depth, f"{place}+"])
            found.append(_claim("S3-C04", f"depth {depth}, norm {place}: steps saved by residual", saved, unit="steps"))
    for depth in spec["gradients"]:
        for place in spec["places"]:
            gained = _less(falls[depth, f"{place}+"], falls[depth, f"{place}-"])
            name = f"depth {depth}, norm {place}: log10 of first over last gradient, gained by residual"
            found.append(_claim("S3-C04", name, gained, unit="decades"))
    return found


# --- heads -----------------------------------------------------------------------------------------------------------


def _several(results: Results) -> list[Claim]:
    numbers = [f"{n}" for n in results["spec"]["several"]["heads"]]
    means = {(part, arm): _mean(results, part, arm) for part in ("three", "one") for arm in numbers}
    found: list[Claim] = []
    for arm in numbers:
        if arm != "1" and "1" in numbers:
            three, one = (_less(means[part, arm], means[part, "1"]) for part in ("three", "one"))
            found.append(_claim("S3-C05", f"three relations: {arm} heads - 1", three, unit="points"))
            found.append(
                _claim("S3-C05", f"three relations less one: {arm} heads - 1", _less(three, one), unit="points")
            )
    for one in results["heads"]:
        arm = one["arm"]
        apart = _less(one["distance end"], one["distance start"])
        found.append(_claim("S3-C05", f"{arm} heads: look further apart than at the start", apart, unit="share"))
        for what in ("keys", "values"):
            shared = _less(one[f"{what} start"], one[f"{what} end"])
            name = f"{arm} heads: subspaces of {what} overlap less than at the start"
            found.append(_claim("S3-C05", name, shared, unit="share"))
        shares = [specialization(w, p) for w, p in zip(one["whole"], one["without"], strict=True)]
        told = [share for share in shares if share is not None]
        if len(told) > 1 and int(arm) > 2:  # the first of two always has half
            name = f"{arm} heads: share of a question that one head answers ({len(told)} seeds)"
            found.append(_claim("S3-C05", name, told, unit="share", against=MOST))
    return found


def _mean(results: Results, part: str, arm: str) -> list[float]:
    """Over questions, for every seed."""
    rows = [s["seeds"] for s in results["scores"] if (s["part"], s["arm"]) == (part, arm)]
    return [sum(one) / len(one) for one in zip(*rows, strict=True)]
