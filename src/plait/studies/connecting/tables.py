"""Results of the study of connectors as Markdown tables that also read well on a terminal."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from plait.studies.text import percent, table

Results = Mapping[str, Any]


def markdown(results: Results) -> str:
    """Tables: claims, accuracy, the blank picture, differences, costs, rates, and what was frozen.

    Args:
        results: As :meth:`plait.studies.connectors.ConnectorStudy.run` gives them.
    """
    parts = [
        _claims(results),
        _accuracy(results),
        _blank(results),
        _differences(results),
        *_costs(results),
        _rates(results),
        _prepared(results),
    ]
    return "\n\n".join(parts) + "\n"


def _claims(results: Results) -> str:
    rows = [[one["row"], one["claim"], one["found"], one["verdict"]] for one in results["claims"]]
    return f"claims, each with its verdict\n\n{table([['row', 'claim', 'found', 'verdict'], *rows])}"


def _accuracy(results: Results) -> str:
    kinds = list(dict.fromkeys(one["kind"] for one in results["baselines"]))
    rows: list[list[str]] = []
    for name, words in (("constant", "best constant answer"), ("words", "decoder, scene in words")):
        at = {one["kind"]: one for one in results["baselines"] if one["baseline"] == name}
        rows.append([words, "", "", *(percent(at[kind]) for kind in kinds), ""])
    slots = {one["arm"]: one["slots"] for one in results["costs"] if one["size"] == "study"}
    for arm in results["spec"]["arms"]:
        at = {one["kind"]: one for one in results["scores"] if one["arm"] == arm and one["picture"]}
        weights = f"{at['mean']['trainable']:,}"
        rows.append([arm, f"{slots[arm]}", weights, *(percent(at[kind]) for kind in (*kinds, "mean"))])
    head = ["connector", "tokens", "weights", *kinds, "mean"]
    return f"accuracy: % right, {_seeds(results)}\n\n{table([head, *rows])}"


def _blank(results: Results) -> str:
    scores = [one for one in results["scores"] if not one["picture"]]
    kinds = list(dict.fromkeys(one["kind"] for one in scores))
    at = {(one["arm"], one["kind"]): one for one in scores}
    rows = [[arm, *(percent(at[arm, kind]) for kind in kinds)] for arm in results["spec"]["arms"]]
    about = f"the same questions with the picture of nothing: % right, {_seeds(results)}"
    return f"{about}\n\n{table([['connector', *kinds], *rows])}"


def _differences(results: Results) -> str:
    kinds = list(dict.fromkeys(one["kind"] for one in results["differences"]))
    pairs = list(dict.fromkeys((one["ours"], one["theirs"]) for one in results["differences"]))
    at = {(one["ours"], one["theirs"], one["kind"]): one for one in results["differences"]}
    rows = [[f"{a} - {b}", *(_points(at[a, b, kind]) for kind in kinds)] for a, b in pairs]
    about = "differences in points, paired by seed (95 % interval)"
    return f"{about}\n\n{table([['difference', *kinds], *rows])}"


def _costs(results: Results) -> list[str]:
    found: list[str] = []
    for size in dict.fromkeys(one["size"] for one in results["costs"]):
        rows: list[list[str]] = []
        chosen = [one for one in results["costs"] if one["size"] == size]
        most = next((one["flops"] for one in chosen if one["arm"] == "mlp"), chosen[0]["flops"])
        times = results["prefill_ms"] if size == "study" else {}
        for one in chosen:
            numbers = [f"{one[key]:,}" for key in ("trainable", "tokens", "slots")]
            flops = [f"{one[key] / 1e6:,.2f}" for key in ("connector_flops", "prefill_flops", "flops")]
            cache = f"{one['cache_bytes'] / 1024:,.1f}"
            row = [one["arm"], *numbers, *flops, f"{one['flops'] / most:.2f}", cache]
            rows.append([*row, f"{times[one['arm']]:.1f}"] if times else row)
        head = ["connector", "weights", "tokens made", "in the text", "MFLOP connector", "MFLOP prefill", "MFLOP both"]
        head += ["of mlp's", "cache, KiB", *(["ms a batch"] if times else [])]
        about = f"cost of one picture until the first word of the answer, {size}"
        found.append(f"{about}\n\n{table([head, *rows])}")
    return found


def _rates(results: Results) -> str:
    lrs = results["spec"]["lrs"]
    at = {(one["arm"], one["lr"]): one for one in results["rates"]}
    rows: list[list[str]] = []
    for arm in results["spec"]["arms"]:
        cells = [f"{100 * at[arm, lr]['tuned']:.0f}{' *' if at[arm, lr]['chosen'] else ''}" for lr in lrs]
        rows.append([arm, *cells])
    about = "learning rates: % right of the questions that choose it, seed 0, mean of all kinds (* is used)"
    return f"{about}\n\n{table([['connector', *(f'{lr:g}' for lr in lrs)], *rows])}"


def _prepared(results: Results) -> str:
    rows = [
        [one["part"], f"{one['seed']}", ", ".join(f"{kind} {100 * share:.1f}" for kind, share in one["right"].items())]
        for one in results["prepared"]
    ]
    about = "what was frozen: % right of the decoder from words, and of the tower about cells"
    return f"{about}\n\n{table([['part', 'seed', 'right'], *rows])}"


def _points(one: Mapping[str, Any]) -> str:
    value, low, high = (100 * one[key] for key in ("value", "low", "high"))
    return f"{value:+.1f} ({low:+.1f} to {high:+.1f})"


def _seeds(results: Results) -> str:
    return f"mean of {results['spec']['seeds']} seeds (95 % interval)"
