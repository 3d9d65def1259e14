"""Results of the study of encoders as Markdown tables that also read well on a terminal."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from plait.studies.seeing.findings import crossover, front, local_and_far
from plait.studies.text import percent, table

Results = Mapping[str, Any]


def markdown(results: Results) -> str:
    """Tables of every part, and the claims.

    Args:
        results: As :meth:`plait.studies.encoders.Encoders.run` gives them.
    """
    parts = [_claims, _costs, _main, _data, _shift, _align, _moving, _growth, _published, _layers, _rates]
    return "\n\n".join(part(results) for part in parts) + "\n"


def _claims(results: Results) -> str:
    rows = [["claim", "what has to exceed the limit", "figure", "low", "high", "limit", "verdict"]]
    for one in results["findings"]:
        numbers = [f"{one[key]:.3f}" if abs(one[key]) < 100 else f"{one[key]:.1f}" for key in ("value", "low", "high")]
        rows.append([one["claim"], one["says"], *numbers, f"{one['limit']:.2g}", one["verdict"]])
    about = "claims: figures with 95 % intervals, paired by seed; the verdict is that of the interval"
    return f"{about}\n\n{table(rows)}"


def _costs(results: Results) -> str:
    ms = {one["encoder"]: one["ms"] for one in results["latency"]}
    rows = [["encoder", "MFLOPs", "weights", "tokens", "ms a picture"]]
    for one in results["costs"]:
        numbers = [f"{one['flops'] / 1e6:.2f}", f"{one['weights']:,}", str(one["tokens"]), f"{ms[one['encoder']]:.2f}"]
        rows.append([one["encoder"], *numbers])
    return (
        f"costs: of one picture of 32 x 32 pixels; time with the readers, one thread, on this machine\n\n{table(rows)}"
    )


def _scores(results: Results, **where: Any) -> list[dict[str, Any]]:
    return [score for score in results["scores"] if all(score[key] == value for key, value in where.items())]


def _main(results: Results) -> str:
    scores = _scores(results, part="main")
    tasks = list(dict.fromkeys(score["task"] for score in scores))
    rows = [["encoder", *tasks], ["chance", *(f"{100 * results['chance'][task]:.0f}" for task in tasks)]]
    for name in dict.fromkeys(score["encoder"] for score in scores):
        rows.append([name, *(percent(score) for score in scores if score["encoder"] == name)])
    on = ", ".join(front(local_and_far(results)))
    about = f"main: % right, of marks average precision; {_seeds(results)}\n\n{table(rows)}"
    return f"{about}\n\nfront of marks and far: {on}"


def _data(results: Results) -> str:
    scores = _scores(results, part="data")
    tasks = list(dict.fromkeys(score["task"] for score in scores))
    rows = [["encoder", "pictures", *tasks]]
    names = list(dict.fromkeys(score["encoder"] for score in scores))
    many = str(results["spec"]["steps"] * results["spec"]["batch"])
    for name in names:
        for pictures in dict.fromkeys(score["pictures"] for score in scores):
            found = [percent(s) for s in scores if (s["encoder"], s["pictures"]) == (name, pictures)]
            rows.append([name, str(pictures), *found])
        rows.append([name, many, *(percent(s) for s in _scores(results, part="main", encoder=name))])
    about = f"data: the same by the number of different training pictures, with as many updates; {_seeds(results)}"
    met = crossover(results)
    where = f"from {met:,} pictures on" if met else f"none up to {int(many):,} pictures"
    return f"{about}\n\n{table(rows)}\n\ncrossover of ViT and CNN, mean of all tasks: {where}"


def _shift(results: Results) -> str:
    rows = [["encoder", "shape, left half (trained)", "shape, right half", "marks, left", "marks, right"]]
    for name in dict.fromkeys(score["encoder"] for score in _scores(results, part="shift")):
        cells = [
            percent(_scores(results, part="shift", encoder=name, task=task, place=place)[0])
            for task in ("shape", "marks")
            for place in ("as trained", "moved")
        ]
        rows.append([name, *cells])
    about = (
        "shift: trained with objects in the left half only, asked there and in the right half (marks were everywhere); "
        f"{_seeds(results)}"
    )
    return f"{about}\n\n{table(rows)}"


def _align(results: Results) -> str:
    rows = [["pictures", "R@1", "CKA, x 100"]]
    for name in dict.fromkeys(score["encoder"] for score in _scores(results, part="align")):
        found = _scores(results, part="align", encoder=name)
        rows.append([name, *(percent(score) for score in found)])
    pairs = results["spec"]["align"]["rows"]
    about = f"align: a tower of pictures with a Transformer of texts, R@1 in % among {pairs} pairs, mean of both ways"
    return f"{about}; {_seeds(results)}\n\n{table(rows)}"


def _moving(results: Results) -> str:
    rows = [["what, before training", "moved by, pixels", "change of features, %"]]
    rows += [[one["what"], str(one["pixels"]), f"{100 * one['change']:.3g}"] for one in results["moving"]]
    about = "moving: features of a picture that is rolled to the right beside rolled features, as a share of their norm"
    return f"{about}\n\n{table(rows)}"


def _growth(results: Results) -> str:
    flops = {(one["encoder"], one["size"]): one["flops"] for one in results["growth"]}
    rows = [["pixels a side", "ViT, GFLOPs", "Swin, GFLOPs", "ViT / Swin"]]
    for size in dict.fromkeys(one["size"] for one in results["growth"]):
        vit, swin = flops["vit", size], flops["swin", size]
        rows.append([str(size), f"{vit / 1e9:.2f}", f"{swin / 1e9:.2f}", f"{vit / swin:.2f}"])
    return f"growth: two blocks of width 96 on cells of 4 pixels, counted\n\n{table(rows)}"


def _published(results: Results) -> str:
    rows = [["encoder, 224 pixels", "GMACs counted", "published", "weights without classifier"]]
    for one in results["published"]:
        counted, known = f"{one['gmacs']:.2f}", f"{one['published_gmacs']:.1f}"
        rows.append([one["encoder"], counted, known, f"{one['weights']:,}"])
    return f"published sizes: billions of multiply-adds\n\n{table(rows)}"


def _layers(results: Results) -> str:
    found = results["layers"]
    what: Sequence[str] = list(dict.fromkeys(one["what"] for one in found))
    rows = [["ViT", *what]]
    for when in ("start", "end"):
        mine = {(one["what"], one["layer"]): one for one in found if one["when"] == when}
        for layer in range(1 + max(layer for _, layer in mine)):
            cells = []
            for name in what:
                one = mine.get((name, layer))
                if name == "distance":
                    cells.append(f"{one['value']:.1f} ({one['low']:.1f}-{one['high']:.1f})" if one else "")
                else:
                    cells.append(percent(one) if one else "")
            rows.append([f"{'before' if when == 'start' else 'after'} training, {layer} blocks", *cells])
    uniform = results["uniform_distance"]
    about = (
        f"layers: mean distance of attention of the next block in pixels (uniform: {uniform:.1f}), and % right of a "
        f"linear layer on what so many blocks give; {_seeds(results)}"
    )
    return f"{about}\n\n{table(rows)}"


def _rates(results: Results) -> str:
    lrs = list(dict.fromkeys(row["lr"] for row in results["rates"]))
    rows = [["part", "encoder", *(f"{lr:g}" for lr in lrs)]]
    for part, name in dict.fromkeys((row["part"], row["encoder"]) for row in results["rates"]):
        mine = [row for row in results["rates"] if (row["part"], row["encoder"]) == (part, name)]
        rows.append([part, name, *(f"{100 * row['score']:.0f}{' *' if row['taken'] else ''}" for row in mine)])
    about = "learning rates: % with the seed that chooses, mean over tasks or R@1 (* taken)"
    return f"{about}\n\n{table(rows)}"


def _seeds(results: Results) -> str:
    return f"mean of {results['spec']['seeds']} seeds (95 % interval)"
