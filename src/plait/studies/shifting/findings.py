"""What the scores say of the claim: differences paired by seed, and a verdict that follows from each by rule."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import Any

from plait.evaluation.statistics import seeds_mean
from plait.studies.verdicts import Verdict, verdict

Rows = Sequence[Mapping[str, Any]]

_ROW = "S0-C29"


def differences(scores: Rows) -> list[dict[str, Any]]:
    """Of every arm less no alignment, by case and domain, and for all cases in which the look alone differs together.

    All arms of a seed get the same pictures and first weights.
    """
    at = {(one["case"], one["arm"]): one for one in scores}
    found: list[dict[str, Any]] = []
    for (case, arm), one in at.items():
        if arm != "none":
            for domain in ("target", "source"):
                pair = zip(one[domain]["seeds"], at[case, "none"][domain]["seeds"], strict=True)
                kind = {"shift": one["shift"], "skewed": one["skewed"]}
                found.append(_difference(arm, case, [a - b for a, b in pair], domain=domain) | kind)
    look = [one for one in found if one["shift"] != "none" and not one["skewed"] and one["domain"] == "target"]
    for arm in dict.fromkeys(one["arm"] for one in look):
        gains = [one["seeds"] for one in look if one["arm"] == arm]
        means = [sum(of_seed) / len(of_seed) for of_seed in zip(*gains, strict=True)]
        found.append(_difference(arm, "mean of looks", means, domain="target") | {"shift": "mean", "skewed": False})
    return found


def claims(compared: Rows) -> list[dict[str, Any]]:
    """Each part of the claim with what was found, and its verdict."""
    found: list[dict[str, Any]] = []
    for one in compared:
        if one["domain"] != "target" or one["arm"] == "target's labels":
            continue
        low, high = one["low"], one["high"]
        if one["skewed"] and one["shift"] == "none":
            about = f"{one['arm']} hurts where the shares of classes alone differ"
            found.append(_claim(about, one, verdict(-high, -low)))
        elif one["shift"] == "mean":
            found.append(_claim(f"{one['arm']} relieves a shift of the look, mean of all", one, verdict(low, high)))
        elif one["shift"] != "none":
            found.append(_claim(f"{one['arm']} relieves {one['case']}", one, verdict(low, high)))
    return found


def _difference(arm: str, case: str, gains: list[float], *, domain: str) -> dict[str, Any]:
    score = seeds_mean(gains, name=f"{arm} - none: {case}, {domain}", rule="difference of accuracies, paired")
    return {"arm": arm, "case": case, "domain": domain, **asdict(score), "seeds": gains}


def _claim(about: str, one: Mapping[str, Any], said: Verdict) -> dict[str, Any]:
    value, low, high = (100 * one[key] for key in ("value", "low", "high"))
    return {"row": _ROW, "claim": about, "found": f"{value:+.1f} ({low:+.1f} to {high:+.1f}) points", "verdict": said}
