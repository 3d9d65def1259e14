"""Results of the study of domain shifts as Markdown tables that also read well on a terminal."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from plait.studies.text import percent, table

Results = Mapping[str, Any]


def markdown(results: Results) -> str:
    """Tables: claims, right answers in the target, differences, the source, what was chosen.

    Args:
        results: As :meth:`plait.studies.domains.DomainShift.run` gives them.
    """
    parts = [
        _claims(results),
        _accuracy(results, "target"),
        _differences(results, "target"),
        _accuracy(results, "source"),
        _chosen(results),
        _lost(results),
    ]
    return "\n\n".join(parts) + "\n"


def _claims(results: Results) -> str:
    rows = [[one["row"], one["claim"], one["found"], one["verdict"]] for one in results["claims"]]
    return f"claims, each with its verdict\n\n{table([['row', 'claim', 'less no alignment', 'verdict'], *rows])}"


def _accuracy(results: Results, domain: str) -> str:
    at = {(one["arm"], one["case"]): one[domain] for one in results["scores"]}
    cases, arms = _names(results["scores"], "case"), _names(results["scores"], "arm")
    rows = [[arm, *(percent(at[arm, case]) for case in cases)] for arm in arms]
    about = f"{domain}: % right, mean of {results['spec']['seeds']} seeds (95 % interval)"
    return f"{about}\n\n{table([['alignment', *cases], *rows])}"


def _differences(results: Results, domain: str) -> str:
    at = {(one["arm"], one["case"]): one for one in results["differences"] if one["domain"] == domain}
    cases, arms = (list(dict.fromkeys(names)) for names in ([case for _, case in at], [arm for arm, _ in at]))
    rows = [[arm, *(_points(at[arm, case]) for case in cases)] for arm in arms]
    about = f"{domain}: points less no alignment, paired by seed (95 % interval)"
    return f"{about}\n\n{table([['alignment', *cases], *rows])}"


def _chosen(results: Results) -> str:
    at = {(one["arm"], one["case"]): one for one in results["candidates"] if one["chosen"]}
    cases, arms = _names(results["candidates"], "case"), _names(results["candidates"], "arm")
    rows = [[arm, *(f"{at[arm, case]['lr']:g}, {at[arm, case]['strength']:g}" for case in cases)] for arm in arms]
    about = "chosen of four candidates each, by reverse validation with a seed of its own: learning rate, strength"
    return f"{about}\n\n{table([['alignment', *cases], *rows])}"


def _lost(results: Results) -> str:
    """What a choice with labels of the target would have gained with the seed that chooses."""
    cases, arms = _names(results["candidates"], "case"), _names(results["candidates"], "arm")
    rows: list[list[str]] = []
    for arm in arms:
        row = [arm]
        for case in cases:
            of = [one for one in results["candidates"] if (one["arm"], one["case"]) == (arm, case)]
            best, taken = max(one["target"] for one in of), next(one["target"] for one in of if one["chosen"])
            row.append(f"{100 * (best - taken):.1f}")
        rows.append(row)
    about = "points by which the best candidate in the target was above the chosen one, with the seed that chooses"
    return f"{about}\n\n{table([['alignment', *cases], *rows])}"


def _points(one: Mapping[str, Any]) -> str:
    value, low, high = (100 * one[key] for key in ("value", "low", "high"))
    return f"{value:+.1f} ({low:+.1f} to {high:+.1f})"


def _names(rows: Sequence[Mapping[str, Any]], key: str) -> list[str]:
    return list(dict.fromkeys(one[key] for one in rows))
