"""Results of the study of Transformers as Markdown tables that also read well on a terminal."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from plait.evaluation.statistics import seeds_mean
from plait.studies.text import percent, table

Results = Mapping[str, Any]
Row = Sequence[str]


def markdown(results: Results) -> str:
    """Tables of every part: distance, norms and residuals, heads, claims, rates and weights.

    Args:
        results: As :meth:`plait.studies.transformer.TransformerStudy.run` gives them.
    """
    parts = [*_distance(results), *_ablation(results), *_heads(results), *_claims(results), _rates(results)]
    return "\n\n".join([*parts, _weights(results)]) + "\n"


def _distance(results: Results) -> list[str]:
    lags, readers = results["spec"]["distance"]["lags"], results["spec"]["distance"]["readers"]
    scores = {(s["part"], s["arm"], s["question"]): s for s in results["scores"]}
    head, found = ["reader", *(f"{lag}" for lag in lags)], list[str]()
    words = {"copy": "which word stood so far back?", "keep": "which word was marked, so far back?"}
    chance = 100 / results["spec"]["distance"]["words"]
    for part, question in words.items():
        names = [f"back {lag}" if part == "copy" else f"{lag}" for lag in lags]
        rows = [[arm, *(percent(scores[part, arm, name]) for name in names)] for arm in readers]
        about = f"{part}, {question} % right by distance, {_seeds(results)}; chance is {chance:.1f}"
        found.append(f"{about}\n\n{table([head, *rows])}")
    influence = {(i["arm"], i["distance"]): i for i in results["influence"]}
    rows = [[arm, *(_influence(influence[arm, lag]) for lag in lags)] for arm in readers]
    about = (
        "gradient of what is said last to a word so far back, as a share of that at the nearest distance, untrained; "
        f"in brackets the fewest layers or steps between them; mean of {results['spec']['seeds']} seeds"
    )
    return [*found, f"{about}\n\n{table([head, *rows])}"]


def _influence(one: Mapping[str, Any]) -> str:
    return "0 (never)" if one["hops"] is None else f"{one['value']:.2g} ({one['hops']})"


def _ablation(results: Results) -> list[str]:
    spec = results["spec"]["ablation"]
    steps = {(s["arm"], s["level"]): s for s in results["steps"]}
    arms = list(dict.fromkeys(s["arm"] for s in results["gradients"]))
    rows = [[*_arm(arm), *(_reached(steps[arm, depth], results) for depth in spec["depths"])] for arm in arms]
    head = ["norm", "residual", *(f"depth {depth}" for depth in spec["depths"])]
    about = (
        f"steps to a loss of {spec['loss']:g}, {_seeds(results)}; one that is not there after {spec['steps']} "
        "counts with so many (in brackets: how many got there)"
    )
    first = f"{about}\n\n{table([head, *rows])}"
    falls = {(g["arm"], g["level"]): g for g in results["gradients"]}
    rows = [[*_arm(arm), *(_signed(falls[arm, depth]) for depth in spec["gradients"])] for arm in arms]
    head = ["norm", "residual", *(f"depth {depth}" for depth in spec["gradients"])]
    about = (
        f"log10 of the gradient's norm before the first block over that before the last, untrained, {_seeds(results)}"
    )
    return [first, f"{about}\n\n{table([head, *rows])}"]


def _arm(arm: str) -> Row:
    return [arm[:-1], "yes" if arm.endswith("+") else "no"]


def _reached(one: Mapping[str, Any], results: Results) -> str:
    value, low, high = (one[key] for key in ("value", "low", "high"))
    return f"{value:.0f} ({low:.0f} to {high:.0f}) ({one['reached']} of {results['spec']['seeds']})"


def _heads(results: Results) -> list[str]:
    scores = [s for s in results["scores"] if s["part"] in ("three", "one")]
    questions = list(dict.fromkeys((s["part"], s["question"]) for s in scores))
    by = {(s["part"], s["question"], s["arm"]): s for s in scores}
    numbers = [f"{n}" for n in results["spec"]["several"]["heads"]]
    rows = [[n, *(percent(by[part, question, n]) for part, question in questions)] for n in numbers]
    head = ["heads", *(f"{part}: {question}" for part, question in questions)]
    chance = 100 / results["spec"]["several"]["words"]
    about = f"three relations at once, or one: % right, {_seeds(results)}; chance is {chance:.1f}"
    found = [f"{about}\n\n{table([head, *rows])}"]
    if not results["heads"]:
        return found
    names = ["distance start", "distance end", "keys start", "keys end", "values start", "values end"]
    rows = [[one["arm"], *(_mean(one[name], name) for name in names)] for one in results["heads"]]
    about = (
        "heads on three relations: how far apart they look (0 alike, 1 disjoint), and shared part of the subspaces of "
        f"keys and values that they read (1 the same); {_seeds(results)}"
    )
    found.append(f"{about}\n\n{table([['heads', *names], *rows])}")
    return [*found, _pruning(results)]


def _pruning(results: Results) -> str:
    asked = [s["question"] for s in results["scores"] if s["part"] == "three"]
    questions = list(dict.fromkeys(asked))
    rows: list[Row] = []
    for one in results["heads"]:
        for head, without in enumerate(one["without"][0]):
            lost = [f"{100 * (a - b):.0f}" for a, b in zip(one["whole"][0], without, strict=True)]
            rows.append([one["arm"], f"{head + 1}", *lost])
    about = "points that three relations lose where one head says nothing, seed 0"
    return f"{about}\n\n{table([['heads', 'without', *questions], *rows])}"


def _claims(results: Results) -> list[str]:
    found: list[str] = []
    for row in dict.fromkeys(claim["row"] for claim in results["claims"]):
        rows = [
            [c["name"], *(_in_unit(c[key], c["unit"]) for key in ("value", "low", "high", "against")), c["verdict"]]
            for c in results["claims"]
            if c["row"] == row
        ]
        about = f"{row}: differences paired by seed (95 % interval); supported where all of it is above the last number"
        found.append(f"{about}\n\n{table([['what', 'value', 'low', 'high', 'above', 'verdict'], *rows])}")
    return found


def _in_unit(value: float, unit: str) -> str:
    match unit:
        case "points":
            return f"{100 * value:+.1f} points"
        case "steps":
            return f"{value:+.0f} steps"
        case _:
            return f"{value:+.2f}"


def _rates(results: Results) -> str:
    rows: list[Row] = [["part", "level", "arms and their rates"]]
    for part, level in dict.fromkeys((rate["part"], rate["level"]) for rate in results["rates"]):
        chosen = [r for r in results["rates"] if (r["part"], r["level"]) == (part, level)]
        rows.append([part, f"{level or ''}", ", ".join(f"{r['arm']} {r['lr']:g}" for r in chosen)])
    return f"learning rates that were chosen, on {results['spec']['tuning']} seeds that do not count\n\n{table(rows)}"


def _weights(results: Results) -> str:
    rows: list[Row] = [["part", "arm", "width", "depth", "weights"]]
    for one in results["costs"]:
        depth = "" if one["depth"] is None else f"{one['depth']}"
        rows.append([one["part"], one["arm"], f"{one['d']}", depth, f"{one['weights']:,}"])
    return f"weights, words and head too\n\n{table(rows)}"


def _seeds(results: Results) -> str:
    return f"mean of {results['spec']['seeds']} seeds (95 % interval)"


def _mean(values: Sequence[float], name: str) -> str:
    score = seeds_mean(values, name=name, rule="mean")
    return f"{score.value:.2f} ({score.low:.2f} to {score.high:.2f})"


def _signed(score: Mapping[str, Any]) -> str:
    return f"{score['value']:+.2f} ({score['low']:+.2f} to {score['high']:+.2f})"
