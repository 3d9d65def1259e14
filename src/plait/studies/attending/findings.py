"""What the claims come to: differences paired by seed, and a verdict that follows from the interval."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from statistics import fmean
from typing import Any

from plait.evaluation.statistics import seeds_mean
from plait.studies.attending.students import ATTENTION, OTHERS
from plait.studies.verdicts import verdict

Results = Mapping[str, Any]

KINDS = ("attribute", "relation", "detail")


@dataclass(slots=True)
class _Table:
    results: Results
    rows: list[dict[str, Any]] = field(default_factory=list)

    def accuracy(self, arm: str, kind: str) -> Sequence[float] | None:
        found = (s["seeds"] for s in self.results["scores"] if (s["arm"], s["kind"]) == (arm, kind))
        return next(found, None)

    def map(self, arm: str, kind: str, *, measure: str, name: str) -> Sequence[float] | None:
        key = (arm, kind, measure, name)
        found = (m["seeds"] for m in self.results["maps"] if (m["arm"], m["kind"], m["measure"], m["map"]) == key)
        return next(found, None)

    def add(self, claim: str, what: str, *, more: Sequence[float] | None, less: Sequence[float] | None) -> None:
        """A part of a claim that says that the first is more; nothing where the settings leave one out."""
        if more is None or less is None:
            return
        gains = [a - b for a, b in zip(more, less, strict=True)]
        score = seeds_mean(gains, name=what, rule="difference, paired")
        said = verdict(score.low, score.high)
        found = {"claim": claim, "what": what, "value": score.value, "low": score.low, "high": score.high}
        self.rows.append({**found, "seeds": gains, "verdict": said})


def findings(results: Results, tuned: Mapping[str, Mapping[Any, float]]) -> list[dict[str, Any]]:
    """Every part of every claim.

    Args:
        results: Scores, maps, layers and costs.
        tuned: Accuracy of each arm by kind, with the seed that chooses.
    """
    table = _Table(results)
    scenes = results["spec"]["scenes"]
    cells = scenes["rows"] * scenes["columns"]
    for arm, layers in results["layers"].items():
        if arm not in ATTENTION:
            continue
        for kind in ("attribute", "relation"):
            layer = layers[kind]
            seen = table.map(arm, kind, measure="pointed", name=layer)
            chance = (2 if kind == "relation" else 1) / cells
            table.add("S3-C07", f"{kind}: {arm} {layer} points - chance", more=seen, less=seen and [chance] * len(seen))
            for other in ("late", "late-tower"):
                ours, theirs = table.accuracy(arm, kind), table.accuracy(other, kind)
                table.add("S3-C07", f"{kind}: {arm} - {other}, right", more=ours, less=theirs)
    for arm, layers in results["layers"].items():
        for kind, layer in layers.items():
            top = table.map(arm, kind, measure="fell", name=f"{layer} top")
            for other in ("random", f"{layer} least"):
                name = other.removeprefix(f"{layer} ")
                less = table.map(arm, kind, measure="fell", name=other)
                table.add("S0-C14", f"{kind}: {arm} {layer}, top - {name}", more=top, less=less)
    _others(table, tuned)
    return table.rows


def _others(table: _Table, tuned: Mapping[str, Mapping[Any, float]]) -> None:
    for plain, gated in (("late", "gated"), ("cross-1", "cross-gated")):
        ours, theirs = table.accuracy(plain, "detail"), table.accuracy(gated, "detail")
        table.add("S0-C16, gates", f"detail: {plain} - {gated}, right", more=ours, less=theirs)
    for other in ("graph-random", "graph-full"):
        ours, theirs = table.accuracy("graph-true", "chain"), table.accuracy(other, "chain")
        table.add("S0-C16, graphs", f"chain: graph-true - {other}, right", more=ours, less=theirs)
    for kind in KINDS:
        best = max((arm for arm in ATTENTION if arm in tuned), key=lambda arm: tuned[arm][kind], default="")
        for other in OTHERS:
            ours, theirs = table.accuracy(best, kind), table.accuracy(other, kind)
            table.add("S4-C05", f"{kind}: {best} - {other}, right", more=ours, less=theirs)


def ratios(costs: Sequence[Mapping[str, Any]], beside: str) -> list[dict[str, Any]]:
    """FLOPs of arms that attend, over those of another, at each size; the claim says above 1."""
    found: list[dict[str, Any]] = []
    for size in dict.fromkeys((c["regions"], c["words"]) for c in costs):
        flops = {c["arm"]: c["flops"] for c in costs if (c["regions"], c["words"]) == size}
        for arm in ATTENTION:
            if arm in flops and beside in flops:
                found.append({"regions": size[0], "arm": arm, "ratio": flops[arm] / flops[beside]})
    return found


def together(rows: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """How many parts of each claim came out how, and the mean difference."""
    found: list[dict[str, Any]] = []
    for claim in dict.fromkeys(row["claim"] for row in rows):
        parts = [row for row in rows if row["claim"] == claim]
        counts = {v: sum(p["verdict"] == v for p in parts) for v in ("supported", "contradicted", "not shown")}
        found.append({"claim": claim, **counts, "mean": fmean(p["value"] for p in parts), "whole": whole(counts)})
    return found


def whole(counts: Mapping[str, int]) -> str:
    """Of a claim: as its parts where all agree, "in part" where some are supported; else "contradicted in part".

    Example:
        >>> whole({"supported": 2, "contradicted": 0, "not shown": 1})
        'in part'
    """
    said = [name for name, number in counts.items() if number]
    if len(said) == 1:
        return said[0]
    return "in part" if "supported" in said else "contradicted in part"
