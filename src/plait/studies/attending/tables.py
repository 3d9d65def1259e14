"""Results of the study of attention as Markdown tables that also read well on a terminal."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from plait.studies.attending.findings import ratios, together
from plait.studies.text import percent, table

Results = Mapping[str, Any]


def markdown(results: Results) -> str:
    """Tables: answers, maps, deletions, costs, rates, and every part of every claim with its verdict.

    Args:
        results: As :meth:`plait.studies.attention.AttentionStudy.run` gives them.
    """
    parts = [*_answers(results), _pointing(results), _falls(results), *_costs(results), _rates(results)]
    return "\n\n".join(part for part in [*parts, *_findings(results)] if part) + "\n"


_BESIDE = ("late", "late-tower")
"""Of arms that do not attend across, those whose cost the others are held against."""


def _answers(results: Results) -> list[str]:
    found: list[str] = []
    groups: dict[tuple[str, ...], list[str]] = {}
    for arm in dict.fromkeys(s["arm"] for s in results["scores"]):
        groups.setdefault(tuple(s["kind"] for s in results["scores"] if s["arm"] == arm), []).append(arm)
    for kinds, arms in groups.items():
        cells = {(s["arm"], s["kind"]): s for s in results["scores"]}
        rules = [
            [word, *(f"{100 * cells[arms[0], kind][key]:.0f}" for kind in kinds)]
            for key, word in (("best", "rule that knows the codes"), ("counting", "rule that counts colours"))
        ]
        rows = [[arm, *(percent(cells[arm, kind]) for kind in kinds)] for arm in arms]
        about = f"answers to {', '.join(kinds)}: % right, {_seeds(results)}"
        found.append(f"{about}\n\n{table([['arm', *kinds], *rules, *rows])}")
    return found


def _pointing(results: Results) -> str:
    """Pointing and mass of every map."""
    cells = {(m["arm"], m["map"], m["measure"], m["kind"]): m for m in results["maps"]}
    kinds = list(dict.fromkeys(m["kind"] for m in results["maps"]))
    maps = list(dict.fromkeys((m["arm"], m["map"]) for m in results["maps"] if m["measure"] == "pointed"))
    if not maps:
        return ""
    scenes = results["spec"]["scenes"]
    share = 100 / (scenes["rows"] * scenes["columns"])
    chance = [f"{share * (2 if kind == 'relation' else 1):.0f}" for kind in kinds]
    rows = [
        [f"{arm}, {name}", *(_range(cells[arm, name, m, kind]) for m in ("pointed", "mass") for kind in kinds)]
        for arm, name in maps
    ]
    head = ["map", *(f"{kind}, points" for kind in kinds), *(f"{kind}, share" for kind in kinds)]
    about = f"maps: % largest on a region that is asked for, and % of the map that lies there; {_seeds(results)}"
    return f"{about}\n\n{table([head, ['chance', *chance, *chance], *rows])}"


def _falls(results: Results) -> str:
    cells = {(m["arm"], m["map"], m["kind"]): m for m in results["maps"] if m["measure"] == "fell"}
    kinds = list(dict.fromkeys(m["kind"] for m in results["maps"]))
    rows = [
        [f"{arm}, {name}", *(_range(cells[arm, name, kind]) for kind in kinds)]
        for arm, name in dict.fromkeys((a, m) for a, m, _ in cells)
    ]
    about = (
        f"deleting: points of probability that the answer loses when {results['spec']['deleted']} regions are taken "
        f"away; {_seeds(results)}"
    )
    return f"{about}\n\n{table([['regions', *kinds], *rows])}" if rows else ""


def _costs(results: Results) -> list[str]:
    found: list[str] = []
    for regions, words in dict.fromkeys((c["regions"], c["words"]) for c in results["costs"]):
        chosen = [c for c in results["costs"] if (c["regions"], c["words"]) == (regions, words)]
        rows = [[c["arm"], f"{c['width']}", f"{c['weights']:,}", f"{c['flops']:,}"] for c in chosen]
        for beside in _BESIDE:
            ratio = {r["arm"]: r["ratio"] for r in ratios(chosen, beside)}
            rows = [[*row, f"{ratio[row[0]]:.2f}" if row[0] in ratio else ""] for row in rows]
        about = f"cost of one sample forward, {words} words and {regions} regions, encoders and head and all"
        head = ["arm", "width", "weights", "FLOPs", *(f"by {beside}" for beside in _BESIDE)]
        found.append(f"{about}\n\n{table([head, *rows])}")
    for beside in _BESIDE:
        counted = ratios(results["costs"], beside)
        more = sum(r["ratio"] > 1 for r in counted)
        if counted:
            arms = ", ".join(dict.fromkeys(r["arm"] for r in counted))
            said = "supported" if more == len(counted) else "in part" if more else "contradicted"
            found.append(
                f"S0-C14, {arms} cost more than {beside}, counted: {more} of {len(counted)} times, which is {said}"
            )
    return found


def _rates(results: Results) -> str:
    rates = list(dict.fromkeys(r["lr"] for r in results["rates"]))
    cells = {(r["arm"], r["lr"]): r for r in results["rates"]}
    rows = []
    for arm in dict.fromkeys(r["arm"] for r in results["rates"]):
        row = [arm]
        for rate in rates:
            one = cells[arm, rate]
            mean = sum(one["accuracy"].values()) / len(one["accuracy"])
            row.append(f"{100 * mean:.0f}{' *' if one['taken'] else ''}")
        rows.append(row)
    about = "learning rates: % right, mean over kinds, with the seed that chooses (* taken)"
    return f"{about}\n\n{table([['arm', *(f'{rate:g}' for rate in rates)], *rows])}"


def _findings(results: Results) -> list[str]:
    if not results["findings"]:
        return []
    rows = [
        [f["claim"], f["what"], *(f"{100 * f[key]:+.1f}" for key in ("value", "low", "high")), f["verdict"]]
        for f in results["findings"]
    ]
    about = "what each claim says is above 0, in points, paired by seed (95 % interval)"
    head = ["claim", "difference", "points", "low", "high", "verdict"]
    names = ("supported", "contradicted", "not shown")
    counts = [[t["claim"], *(f"{t[name]}" for name in names), t["whole"]] for t in together(results["findings"])]
    return [
        f"{about}\n\n{table([head, *rows])}",
        f"parts of each claim by verdict\n\n{table([['claim', *names, 'together'], *counts])}",
    ]


def _seeds(results: Results) -> str:
    return f"mean of {results['spec']['seeds']} seeds (95 % interval)"


def _range(score: Mapping[str, Any]) -> str:
    """Value and interval, which may be below 0.

    Example:
        >>> _range({"value": 0.5, "low": -0.01, "high": 0.59})
        '50 (-1 to 59)'
    """
    value, low, high = (100 * score[key] for key in ("value", "low", "high"))
    return f"{value:.0f} ({low:.0f} to {high:.0f})"
