"""Results of the study of fusions as Markdown tables that also read well on a terminal."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from plait.studies.text import percent, table

Results = Mapping[str, Any]


def markdown(results: Results) -> str:
    """Tables of every part: interaction, scale, missing modalities, differences, rates, costs, variance.

    Args:
        results: As :meth:`plait.studies.fusion.FusionStudy.run` gives them.
    """
    parts = [_interaction(results), *_scale(results), *_missing(results), _differences(results), _rates(results)]
    return "\n\n".join(part for part in [*parts, *_costs(results), *_variance(results)] if part) + "\n"


def _interaction(results: Results) -> str:
    scores = _of(results, "interaction")
    tasks = list(dict.fromkeys(s["task"] for s in scores))
    rows = [[fusion, *(percent(s) for s in of)] for fusion, of in _by_fusion(scores).items()]
    about = f"interaction: % right, {_seeds(results)}; chance is 50"
    return f"{about}\n\n{table([['fusion', *tasks], *rows])}" if scores else ""


def _scale(results: Results) -> list[str]:
    scores = _of(results, "scale")
    if not scores:
        return []
    settings = list(dict.fromkeys((s["factor"], s["norm"]) for s in scores))
    head = ["fusion", *(f"x{factor:g}, {norm}" for factor, norm in settings)]
    rows = [[fusion, *(percent(s) for s in of)] for fusion, of in _by_fusion(scores).items()]
    shares = {(g["fusion"], g["factor"], g["norm"], g["when"]): g for g in results["gradients"]}
    moves = [(*setting, when) for when in ("start", "end") for setting in settings]
    gradients = [[f, *(_tenths(shares[(f, *move)]) for move in moves)] for f in _by_fusion(scores)]
    names = ["fusion", *(f"x{factor:g}, {norm}, {when}" for factor, norm, when in moves)]
    return [
        "scale: % right where one modality tells the label and the other is noise, by the factor of the noise and the "
        f"normalization of each; {_seeds(results)}\n\n{table([head, *rows])}",
        "gradient: % of it that the modality gets that tells the label, at the start and the end of training; "
        f"{_seeds(results)}\n\n{table([names, *gradients])}",
    ]


def _missing(results: Results) -> list[str]:
    scores, drops = _of(results, "missing"), results["spec"]["missing"]["drops"]
    found: list[str] = []
    for task, trained in dict.fromkeys((s["task"], s["trained"]) for s in scores):
        chosen = [s for s in scores if (s["task"], s["trained"]) == (task, trained)]
        rows = [[fusion, *(percent(s) for s in of)] for fusion, of in _by_fusion(chosen).items()]
        first = next(iter(_by_fusion(chosen).values()))
        ceiling = ["best rule", *(f"{100 * s['ceiling']:.0f}" for s in first)]
        how = f"trained with modalities dropped at {trained:g}" if trained else "trained with all modalities"
        about = (
            f"missing, {task}, {how}: % right by share of test samples without b, and with b noisy; {_seeds(results)}"
        )
        head = ["fusion", *(f"{drop:g}" for drop in drops), f"noise of {results['spec']['missing']['noise']:g}"]
        found.append(f"{about}\n\n{table([head, ceiling, *rows])}")
    return found


def _differences(results: Results) -> str:
    if not results["differences"]:
        return ""
    rows = [[d["name"], *(f"{100 * d[key]:+.1f}" for key in ("value", "low", "high"))] for d in results["differences"]]
    most = max(results["spec"]["missing"]["drops"], default=0.0)
    about = f"differences in points, paired by seed (95 % interval); of missing modalities at a share of {most:g}"
    return f"{about}\n\n{table([['difference', 'points', 'low', 'high'], *rows])}"


def _rates(results: Results) -> str:
    scores = _of(results, "rates")
    if not scores:
        return ""
    rates = list(dict.fromkeys(s["lr"] for s in scores))
    rows = []
    for fusion, of in _by_fusion(scores).items():
        values = [100 * s["value"] for s in of]
        rows.append([fusion, *(percent(s) for s in of), f"{max(values) - min(values):.0f}"])
    about = f"learning rates: % right on xor, {_seeds(results)}"
    return f"{about}\n\n{table([['fusion', *(f'{rate:g}' for rate in rates), 'range'], *rows])}"


def _costs(results: Results) -> list[str]:
    found: list[str] = []
    for d in dict.fromkeys(c["d"] for c in results["costs"]):
        rows = [
            [c["fusion"], f"{c['size']}", f"{c['weights']:,}", f"{c['flops']:,}"]
            for c in results["costs"]
            if c["d"] == d
        ]
        about = f"cost of one sample forward, two modalities of width {d}, head and all"
        found.append(f"{about}\n\n{table([['fusion', 'size', 'weights', 'FLOPs'], *rows])}")
    return found


def _variance(results: Results) -> list[str]:
    found = results["variance"]
    if not found["conditions"]:
        return []
    rows: list[list[str]] = []
    for one in found["conditions"]:
        split, sure = one["shares"], one["fusion"]
        name = ", ".join([one["task"], *_conditions(one)])
        share = "all equal" if split is None else f"{100 * split['fusion']:.0f}"
        share = percent(sure) if sure is not None else share
        rest = ["", ""] if split is None else [f"{100 * split[key]:.0f}" for key in ("seed", "rest")]
        rows.append([name, f"{100 * one['spread']:.0f}", share, *rest])
    head = ["condition", "best - worst, points", "fusion, %", "seed, %", "rest, %"]
    chance = 100 * found["by_chance"]
    about = (
        f"variance of accuracy explained (95 % interval from leaving seeds out); fusion by chance alone {chance:.0f} %"
    )
    overall = found["overall"]
    words = {"condition": "condition", "fusion": "fusion", "together": "fusion x condition", "rest": "rest"}
    shares = [[word, f"{100 * overall[key]:.0f}"] for key, word in words.items()]
    return [
        f"{about}\n\n{table([head, *rows])}",
        f"variance over all these conditions\n\n{table([['explained by', '%'], *shares])}",
    ]


def _conditions(one: Mapping[str, Any]) -> list[str]:
    if one["part"] == "scale":
        return [f"x{one['factor']:g}, {one['norm']}"]
    if one["part"] == "missing":
        return [f"trained at {one['trained']:g}", f"lost {one['drop']:g}"]
    return []


def _of(results: Results, part: str) -> list[Mapping[str, Any]]:
    return [score for score in results["scores"] if score["part"] == part]


def _by_fusion(scores: Sequence[Mapping[str, Any]]) -> dict[str, list[Mapping[str, Any]]]:
    return {name: [s for s in scores if s["fusion"] == name] for name in dict.fromkeys(s["fusion"] for s in scores)}


def _seeds(results: Results) -> str:
    return f"mean of {results['spec']['seeds']} seeds (95 % interval)"


def _tenths(score: Mapping[str, Any]) -> str:
    value, low, high = (100 * score[key] for key in ("value", "low", "high"))
    return f"{value:.1f} ({low:.1f}-{high:.1f})"
