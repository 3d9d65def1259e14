"""What was found of each claim: figures with intervals, a verdict that follows by rule, and one word a claim."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from functools import partial
from typing import Any, Literal

from plait.evaluation.statistics import seeds_mean
from plait.studies.teaching.memory import expected_peak
from plait.studies.training import TrainingStudy
from plait.studies.verdicts import Verdict, verdict

Row = dict[str, Any]
Word = Literal["holds", "does not hold", "depends", "not shown"]
CLAIMS = {
    "S2-C10": "gradient accumulation reduces memory",
    "S4-C09": "parameters, optimizer states and activations dominate memory",
    "S2-C11": "mixed precision balances speed and accuracy",
    "S0-C31": "full fine-tuning may overfit with limited data",
    "S3-27": "layer-wise rates help on little data",
    "S4-C08": "freezing, progressive training and modality balance help",
}
"""Row → the claim."""
EQUAL = 1e-6
"""Gradients are equal up to this, as a share of their norm, in float64."""
HALF = 0.6
"""What autograd keeps is halved where it is no more than this share: sums and norms stay in float32."""


def word(verdicts: Sequence[Verdict]) -> Word:
    """One word for all that was tried of a claim.

    Example:
        >>> word(["supported", "supported"]), word(["contradicted", "not shown"])
        ('holds', 'does not hold')
        >>> word(["supported", "contradicted"]), word(["supported", "not shown"]), word(["not shown"])
        ('depends', 'depends', 'not shown')
    """
    kinds = set(verdicts)
    if kinds == {"supported"}:
        return "holds"
    if "supported" in kinds:
        return "depends"
    return "does not hold" if "contradicted" in kinds else "not shown"


def words(found: Sequence[Mapping[str, Any]]) -> dict[str, Word]:
    """Row → word, of the rows that were tried."""
    rows = dict.fromkeys(one["row"] for one in found)
    return {row: word([one["verdict"] for one in found if one["row"] == row]) for row in rows}


def within(low: float, high: float, *, least: float, most: float) -> Verdict:
    """Of a claim that a figure lies between two.

    Example:
        >>> [within(low, high, least=0.85, most=1.15) for low, high in ((0.9, 1.0), (0.5, 0.8), (0.8, 0.9))]
        ['supported', 'contradicted', 'not shown']
    """
    if low >= least and high <= most:
        return "supported"
    return "contradicted" if high < least or low > most else "not shown"


def findings(study: TrainingStudy, results: Mapping[str, Any]) -> list[Row]:
    """Of all parts that ran."""
    made: Mapping[str, Callable[[TrainingStudy, Mapping[str, Any]], list[Row]]] = {
        "memory": _memory,
        "precision": _precision,
        "few": _few,
        "layers": _layers,
        "mixing": _mixing,
    }
    return [one for name, make in made.items() if name in results for one in make(study, results[name])]


def _memory(study: TrainingStudy, part: Mapping[str, Any]) -> list[Row]:
    settings, at = study.memory, {(s["size"], s["micro"], s["dtype"]): s["seeds"] for s in part["steps"]}
    found: list[Row] = []
    for size in settings.sizes:
        whole = _peaks(at[size, settings.batch, "float32"])
        for micro in settings.micro[1:]:
            about = f"{size} pixels, {settings.batch // micro} micro-batches: the peak is lower, by a share of"
            found.append(_less("S2-C10", about, _peaks(at[size, micro, "float32"]), than=whole))
    for size in settings.sizes:
        gap = max((g["gap"] for g in part["gradients"] if g["size"] == size and g["dtype"] == "float64"), default=0.0)
        about = f"{size} pixels: gradients of micro-batches are equal up to {EQUAL:g} in float64"
        found.append(_exact("S2-C10", about, gap, holds=gap <= EQUAL))
    most = settings.tolerance
    for (size, micro, dtype), seeds in at.items():
        if dtype == "float32":
            sums = [expected_peak(one) / one["peak"] for one in seeds]
            about = f"{size} pixels, micro-batches of {micro}: sum of parts over the peak, within {most:.0%} of 1"
            found.append(_score("S4-C09", about, sums, judge=partial(within, least=1 - most, most=1 + most)))
    for size in settings.sizes:
        seeds = at[size, settings.batch, "float32"]
        shares = [(one["parameters"] + one["state"] + one["activations"]) / one["peak"] for one in seeds]
        about = f"{size} pixels: parameters, state and activations are more than half of the peak"
        found.append(_score("S4-C09", about, shares, judge=partial(verdict, limit=0.5)))
    plain = at[settings.sizes[0], settings.batch, "float32"]
    for dtype in settings.dtypes[1:]:
        seeds = at[settings.sizes[0], settings.batch, dtype]
        kept = seeds[0]["activations"] / plain[0]["activations"]
        about = f"{dtype}: what autograd keeps is halved ({HALF:g} or less of float32)"
        found.append(_exact("S2-C11", about, kept, holds=kept <= HALF))
        about = f"{dtype}: the peak is lower, by a share of"
        found.append(_less("S2-C11", about, _peaks(seeds), than=_peaks(plain)))
        about = f"{dtype}: a step takes less time, by a share of"
        found.append(_less("S2-C11", about, _times(seeds), than=_times(plain)))
    return found


def _precision(study: TrainingStudy, part: Mapping[str, Any]) -> list[Row]:
    margin, (plain, *others) = study.precision.margin, part["scores"]
    found: list[Row] = []
    for other in others:
        pairs = list(zip(plain["seeds"], other["seeds"], strict=True))
        about = f"{other['dtype']}: accuracy is kept: no more than {100 * margin:g} points are lost"
        lost = [a["right"] - b["right"] for a, b in pairs]
        found.append(_score("S2-C11", about, lost, judge=partial(within, least=-1.0, most=margin)))
    return found


def _few(study: TrainingStudy, part: Mapping[str, Any]) -> list[Row]:
    at = {tuple(one["arm"]): one["seeds"] for one in part["scores"]}
    others = [method for method in study.few.methods if method != "full"]
    found: list[Row] = []
    for pictures in study.few.pictures:
        full = at.get(("full", pictures))
        if full is None:
            continue
        gaps = [_gap(one) for one in full]
        found.append(_above("S0-C31", f"{pictures} pictures: full is better on them than on others, by", gaps))
        for method in others:
            other = at[method, pictures]
            wider = [a - _gap(b) for a, b in zip(gaps, other, strict=True)]
            found.append(_above("S0-C31", f"{pictures} pictures: that gap is wider than that of {method}, by", wider))
            pairs = zip(full, other, strict=True)
            better = [b["unseen"]["right"] - a["unseen"]["right"] for a, b in pairs]
            found.append(_above("S0-C31", f"{pictures} pictures: {method} is better than full on others, by", better))
    return found


def _layers(study: TrainingStudy, part: Mapping[str, Any]) -> list[Row]:
    at = {tuple(one["arm"]): one["seeds"] for one in part["scores"]}
    found: list[Row] = []
    for pictures in study.layers.pictures:
        pairs = zip(at["decayed", pictures], at["uniform", pictures], strict=True)
        gains = [a["unseen"]["right"] - b["unseen"]["right"] for a, b in pairs]
        about = f"{pictures} pictures: rates that fall from layer to layer are better than one rate, by"
        found.append(_above("S3-27", about, gains))
    return found


def _mixing(study: TrainingStudy, part: Mapping[str, Any]) -> list[Row]:
    at = {tuple(one["arm"]): one["seeds"] for one in part["scores"]}

    def gain(ours: tuple[str, bool], theirs: tuple[str, bool], what: str) -> list[float]:
        return [a["right"][what] - b["right"][what] for a, b in zip(at[ours], at[theirs], strict=True)]

    found: list[Row] = []
    for order in (o for o in study.mixing.orders if o != "joint" and "joint" in study.mixing.orders):
        for balanced in (False, True):
            said = "balanced" if balanced else "not balanced"
            gains = gain((order, balanced), ("joint", balanced), "both")
            found.append(_above("S4-C08", f"{order} is better than joint, {said}, by", gains))
    for order in study.mixing.orders:
        for what, name in (("both", "both modalities"), ("image", "the picture alone")):
            gains = gain((order, True), (order, False), what)
            found.append(_above("S4-C08", f"balance helps with {name}, {order}, by", gains))
    return found


def _gap(one: Mapping[str, Any]) -> float:
    return one["seen"]["right"] - one["unseen"]["right"]


def _peaks(seeds: Sequence[Mapping[str, float]]) -> list[float]:
    return [one["peak"] for one in seeds]


def _times(seeds: Sequence[Mapping[str, float]]) -> list[float]:
    return [one["cpu_s"] for one in seeds]


def _less(row: str, claim: str, ours: Sequence[float], *, than: Sequence[float]) -> Row:
    """What is saved as a share; processes are no pairs, so that the ends are those of both intervals at their worst."""
    a, b = (seeds_mean(values, name=claim, rule="mean over processes") for values in (than, ours))
    low, high = 1 - b.high / max(a.low, 1e-9), 1 - b.low / a.high
    about = {"value": 1 - b.value / a.value, "low": low, "high": high, "seeds": list(ours)}
    return {"row": row, "claim": claim, **about, "verdict": verdict(low, high)}


def _above(row: str, claim: str, values: Sequence[float]) -> Row:
    return _score(row, claim, values, judge=verdict)


def _score(row: str, claim: str, values: Sequence[float], *, judge: Callable[[float, float], Verdict]) -> Row:
    score = asdict(seeds_mean(values, name=claim, rule="mean over seeds, or processes"))
    about = {name: score[name] for name in ("value", "low", "high")}
    return {"row": row, "claim": claim, **about, "seeds": list(values), "verdict": judge(score["low"], score["high"])}


def _exact(row: str, claim: str, value: float, *, holds: bool) -> Row:
    said: Verdict = "supported" if holds else "contradicted"
    return {"row": row, "claim": claim, "value": value, "low": value, "high": value, "seeds": [], "verdict": said}
