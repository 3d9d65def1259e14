"""Results of the study of training as Markdown tables that also read well on a terminal."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from plait.evaluation.statistics import seeds_mean
from plait.studies.teaching.findings import CLAIMS, words
from plait.studies.teaching.memory import expected_peak
from plait.studies.text import table

Results = Mapping[str, Any]
_MIB = 2**20


def markdown(results: Results) -> str:
    """Tables: a word for each claim, findings, and what they come from, of the parts that ran.

    Args:
        results: As :meth:`plait.studies.training.TrainingStudy.run` gives them.
    """
    made: Mapping[str, Callable[[Results], list[str]]] = {
        "memory": _memory,
        "precision": _precision,
        "few": _few,
        "layers": _layers,
        "mixing": _mixing,
    }
    parts = [_words(results), _findings(results)]
    for name, make in made.items():
        parts += make(results) if name in results else []
    return "\n\n".join(parts) + "\n"


def _words(results: Results) -> str:
    rows = [[row, CLAIMS[row], said] for row, said in words(results["findings"]).items()]
    return f"claims\n\n{table([['row', 'claim', 'word'], *rows])}"


def _findings(results: Results) -> str:
    rows = [[one["row"], one["claim"], _figure(one), one["verdict"]] for one in results["findings"]]
    return f"what was found, with 95 % intervals\n\n{table([['row', 'what', 'found', 'verdict'], *rows])}"


def _figure(one: Mapping[str, Any]) -> str:
    if not one["seeds"]:
        return f"{one['value']:.2g} (exact)"
    return f"{one['value']:+.3f} ({one['low']:+.3f} to {one['high']:+.3f})"


def _memory(results: Results) -> list[str]:
    rows: list[list[str]] = []
    for one in results["memory"]["steps"]:
        seeds = one["seeds"]

        def mean(name: str, seeds: Sequence[Mapping[str, float]] = seeds) -> str:
            return f"{statistics.fmean(s[name] for s in seeds) / _MIB:.1f}"

        counted = [mean(name) for name in ("parameters", "state", "gradients", "activations")]
        summed = statistics.fmean(expected_peak(s) for s in seeds)
        peak = statistics.fmean(s["peak"] for s in seeds)
        measured = [f"{summed / _MIB:.1f}", f"{peak / _MIB:.1f}", f"{100 * summed / peak:.0f}", mean("between")]
        took = f"{statistics.fmean(s['cpu_s'] for s in seeds):.2f}"
        rows.append([f"{one['size']}", f"{one['micro']}", one["dtype"], *counted, *measured, took])
    head = ["pixels", "micro-batch", "format", "weights", "state", "gradients", "activations"]
    head += ["sum alive", "peak", "sum, %", "between steps", "CPU s a step"]
    about = f"memory of a step in MiB; counted, then measured (mean of {len(results['memory']['steps'][0]['seeds'])}"
    gaps = [
        [f"{g['size']}", f"{g['micro']}", g["dtype"], f"{g['gap']:.1e}", f"{g['loss']:.1e}"]
        for g in results["memory"]["gradients"]
    ]
    heads = ["pixels", "micro-batch", "format", "gradient", "loss"]
    return [
        f"{about} processes)\n\n{table([head, *rows])}",
        f"micro-batches beside the whole batch: largest difference over a part\n\n{table([heads, *gaps])}",
    ]


def _precision(results: Results) -> list[str]:
    rows: list[list[str]] = []
    for one in results["precision"]["scores"]:
        seeds = one["seeds"]
        figures = [_percent([s["right"] for s in seeds]), _mean([s["loss"] for s in seeds], 3)]
        skipped, took = (statistics.fmean(s[name] for s in seeds) for name in ("skipped", "cpu_s"))
        rows.append([one["dtype"], *figures, f"{skipped:.1f}", f"{took:.1f}"])
    head = ["format", "% of cells right", "cross-entropy", "updates left out", "CPU s"]
    steps = results["spec"]["precision"]["steps"]
    return [f"a tower after {steps} updates by number format, {_seeds(results)}\n\n{table([head, *rows])}"]


def _few(results: Results) -> list[str]:
    part = results["few"]
    rows: list[list[str]] = []
    for one in part["scores"]:
        method, pictures = one["arm"]
        rows.append([f"{pictures}", method, f"{one['seeds'][0]['trainable']:,}", f"{one['lr']:g}", *_sides(one)])
    head = ["pictures", "method", "weights", "rate", "% right on them", "% right on others", "gap", "loss on others"]
    return [f"fine-tuning on few pictures, {_seeds(results)}\n\n{table([head, *rows])}", _rates(part, "few")]


def _layers(results: Results) -> list[str]:
    part = results["layers"]
    rows: list[list[str]] = []
    for one in part["scores"]:
        kind, pictures = one["arm"]
        rows.append([f"{pictures}", kind, f"{one['lr']:g}", f"{one['decay']:g}", *_sides(one)])
    head = ["pictures", "rates", "rate", "decay", "% right on them", "% right on others", "gap", "loss on others"]
    about = f"full fine-tuning, one rate or rates by layer, {_seeds(results)}"
    return [f"{about}\n\n{table([head, *rows])}", _rates(part, "layers")]


def _sides(one: Mapping[str, Any]) -> list[str]:
    sides = [[s[side]["right"] for s in one["seeds"]] for side in ("seen", "unseen")]
    gap = [a - b for a, b in zip(*sides, strict=True)]
    return [*(_percent(side) for side in sides), _percent(gap), _mean([s["unseen"]["loss"] for s in one["seeds"]], 2)]


def _mixing(results: Results) -> list[str]:
    part = results["mixing"]
    rows: list[list[str]] = []
    for one in part["scores"]:
        order, balanced = one["arm"]
        steps = ", ".join(f"{name} {count}" for name, count in one["seeds"][0]["steps"].items())
        right = [_percent([s["right"][name] for s in one["seeds"]]) for name in ("both", "image", "text")]
        seen = _percent([s["seen"] for s in one["seeds"]])
        flops = f"{one['seeds'][0]['flops'] / 1e9:.1f}"
        still = f"{sum(s['still'] for s in one['seeds'])} of {len(one['seeds'])}"
        rows.append([order, "yes" if balanced else "no", f"{one['lr']:g}", steps, flops, *right, seen, still])
    head = ["order", "balanced", "rate", "updates", "GFLOP", "% both", "% picture alone", "% words alone"]
    head += ["% both, trained on", "towers as they were"]
    return [f"two modalities, {_seeds(results)}\n\n{table([head, *rows])}", _rates(part, "mixing")]


def _rates(part: Mapping[str, Any], name: str) -> str:
    rows: list[list[str]] = []
    for arm in dict.fromkeys(tuple(one["arm"]) for one in part["rates"]):
        tries = [one for one in part["rates"] if tuple(one["arm"]) == arm]
        said = [
            f"{one['lr']:g}{'' if one.get('decay', 1) == 1 else ' x {:g}'.format(one['decay'])}: "
            f"{100 * one['score']:.0f}{'*' if one['chosen'] else ''}"
            for one in tries
        ]
        rows.append([" ".join(map(str, arm)), ", ".join(said)])
    about = f"{name}: % right of what chooses the rate, one seed that does not count (* is used)"
    return f"{about}\n\n{table([['arm', 'rate: % right'], *rows])}"


def _percent(values: Sequence[float]) -> str:
    score = seeds_mean(values, name="", rule="")
    return f"{100 * score.value:.1f} ({100 * score.low:.1f} to {100 * score.high:.1f})"


def _mean(values: Sequence[float], digits: int) -> str:
    score = seeds_mean(values, name="", rule="")
    return f"{score.value:.{digits}f} ({score.low:.{digits}f} to {score.high:.{digits}f})"


def _seeds(results: Results) -> str:
    return f"mean of {results['spec']['seeds']} seeds (95 % interval)"
