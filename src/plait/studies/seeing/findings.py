"""What the figures say about the claims: differences paired by seed, and a verdict that follows from each interval."""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from plait.evaluation.statistics import seeds_mean
from plait.studies.fusing.variance import by_chance, fusion_share
from plait.studies.seeing.advice import advised
from plait.studies.verdicts import Verdict, verdict

LOCAL, ACROSS = "marks", "far"
"""The task of details, and the one that needs what is at the other end of the picture."""
ATTRIBUTE, RELATIONS = ("shape",), ("left", "same")
ALL = ("shape", "left", "same", "count", "far", "marks")


@dataclass(frozen=True, slots=True, kw_only=True)
class Finding:
    """One claim beside one figure.

    Attributes:
        claim: Row of the checklist.
        says: What the claim says, as a difference or a number that is more than ``limit``.
        value: The figure, a mean over seeds.
        low: Of its 95 % interval; that of a counted number is the number.
        high: Likewise.
        limit: What it has to exceed.
        verdict: By :func:`~plait.studies.verdicts.verdict`.
    """

    claim: str
    says: str
    value: float
    low: float
    high: float
    limit: float
    verdict: Verdict


def findings(results: Mapping[str, Any]) -> list[dict[str, Any]]:
    """All claims, in the order of the checklist."""
    parts: list[Callable[[Mapping[str, Any]], list[Finding]]] = [
        _questions,
        _swin,
        _details,
        _aligned,
        _hybrid,
        _data,
        _compute,
        _shift,
        _layers,
        _advice,
    ]
    return [asdict(found) for part in parts for found in part(results)]


def seeds_of(results: Mapping[str, Any], encoder: str, tasks: Sequence[str], **where: Any) -> list[float]:
    """Mean over tasks, for each seed."""
    same = {"part": "main", "pictures": 0, "place": "as trained", **where, "encoder": encoder}
    columns = [
        score["seeds"]
        for score in results["scores"]
        if score["task"] in tasks and all(score[key] == value for key, value in same.items())
    ]
    assert len(columns) == len(tasks), f"{same} has {len(columns)} of {len(tasks)} tasks"
    return [math.fsum(values) / len(values) for values in zip(*columns, strict=True)]


def _difference(
    claim: str, says: str, sides: tuple[Sequence[float], Sequence[float]], *, limit: float = 0.0
) -> Finding:
    """The first less the second, seed by seed."""
    gains = [a - b for a, b in zip(*sides, strict=True)]
    return _number(claim, says, gains, limit=limit)


def _number(claim: str, says: str, values: Sequence[float], *, limit: float = 0.0) -> Finding:
    score = seeds_mean(values, name=says, rule="paired by seed")
    return Finding(
        claim=claim,
        says=says,
        value=score.value,
        low=score.low,
        high=score.high,
        limit=limit,
        verdict=verdict(score.low, score.high, limit=limit),
    )


def _counted(claim: str, says: str, value: float, *, limit: float) -> Finding:
    said = verdict(value, value, limit=limit)
    return Finding(claim=claim, says=says, value=value, low=value, high=value, limit=limit, verdict=said)


def _questions(results: Mapping[str, Any]) -> list[Finding]:
    """S0-C04."""
    own = {e: {t: seeds_of(results, e, t) for t in (ATTRIBUTE, RELATIONS, ALL)} for e in ("cnn", "vit")}
    speed = {one["encoder"]: one["ms"] for one in results["latency"]}
    return [
        *_choice(results),
        _difference(
            "S0-C04",
            "Transformer for reasoning: vit less cnn, relations",
            (own["vit"][RELATIONS], own["cnn"][RELATIONS]),
        ),
        _difference(
            "S0-C04", "the same for attributes: vit less cnn, shape", (own["vit"][ATTRIBUTE], own["cnn"][ATTRIBUTE])
        ),
        _counted(
            "S0-C04", "CNN for real time: milliseconds of vit over those of cnn", speed["vit"] / speed["cnn"], limit=1.0
        ),
    ]


def _choice(results: Mapping[str, Any]) -> list[Finding]:
    """How much of the differences the encoder explains, beside what it explains where it makes none."""
    table = np.array([seeds_of(results, cost["encoder"], ALL) for cost in results["costs"]])
    score, limit = fusion_share(table), by_chance(*table.shape)
    if score is None:
        return []
    return [
        Finding(
            claim="S0-C04",
            says="the choice matters: share of variance over encoders and seeds, mean of all tasks",
            value=score.value,
            low=score.low,
            high=score.high,
            limit=limit,
            verdict=verdict(score.low, score.high, limit=limit),
        )
    ]


def _swin(results: Mapping[str, Any]) -> list[Finding]:
    """S0-C05."""
    flops = {(one["encoder"], one["size"]): one["flops"] for one in results["growth"]}
    sizes = sorted({size for _, size in flops})
    ratio = {size: flops["vit", size] / flops["swin", size] for size in sizes}
    margin = results["spec"]["margin"]
    return [
        _counted(
            "S0-C05",
            f"better efficiency: operations of vit over swin at {sizes[-1]} pixels, over those at {sizes[0]}",
            ratio[sizes[-1]] / ratio[sizes[0]],
            limit=1.0,
        ),
        _difference(
            "S0-C05",
            f"keeps the power: swin less vit, mean of all tasks, more than -{100 * margin:g} points",
            (seeds_of(results, "swin", ALL), seeds_of(results, "vit", ALL)),
            limit=-margin,
        ),
    ]


def _details(results: Mapping[str, Any]) -> list[Finding]:
    """S0-C06."""
    own = {e: {t: seeds_of(results, e, (t,)) for t in (LOCAL, ACROSS, "count")} for e in ("cnn", "vit")}
    return [
        _difference("S0-C06", "suits details: cnn less vit, marks", (own["cnn"][LOCAL], own["vit"][LOCAL])),
        _difference("S0-C06", "limited on the whole: vit less cnn, far", (own["vit"][ACROSS], own["cnn"][ACROSS])),
        _difference("S0-C06", "limited on the whole: vit less cnn, count", (own["vit"]["count"], own["cnn"]["count"])),
    ]


def _aligned(results: Mapping[str, Any]) -> list[Finding]:
    """S0-C07."""
    return [
        _difference(
            "S0-C07",
            f"two Transformers are easier to align: vit less cnn, {task}",
            (
                seeds_of(results, "vit", (task,), part="align"),
                seeds_of(results, "cnn", (task,), part="align"),
            ),
        )
        for task in ("r@1", "cka")
    ]


def front(points: Mapping[str, tuple[float, ...]]) -> list[str]:
    """Names that no other is as good as in everything and better in something.

    Example:
        >>> front({"a": (1.0, 0.0), "b": (0.0, 1.0), "c": (0.5, 0.0)})
        ['a', 'b']
    """

    def beaten(ours: tuple[float, ...], theirs: tuple[float, ...]) -> bool:
        return ours != theirs and all(b >= a for a, b in zip(ours, theirs, strict=True))

    return [name for name, own in points.items() if not any(beaten(own, other) for other in points.values())]


def local_and_far(results: Mapping[str, Any]) -> dict[str, tuple[float, ...]]:
    """Mean scores of marks and of ``far`` for each encoder."""
    return {
        cost["encoder"]: tuple(
            math.fsum(found := seeds_of(results, cost["encoder"], (task,))) / len(found) for task in (LOCAL, ACROSS)
        )
        for cost in results["costs"]
    }


def _hybrid(results: Mapping[str, Any]) -> list[Finding]:
    """S0-C08: on the front by the means; not to be on it is no support, whatever the rest says."""
    on = "hybrid" in front(local_and_far(results))
    own = {e: {t: seeds_of(results, e, (t,)) for t in (LOCAL, ACROSS)} for e in ("cnn", "vit", "hybrid")}
    return [
        Finding(
            claim="S0-C08",
            says="hybrid on the front of marks and far (1: yes)",
            value=float(on),
            low=float(on),
            high=float(on),
            limit=0.5,
            verdict="supported" if on else "not shown",
        ),
        _difference("S0-C08", "local strength: hybrid less vit, marks", (own["hybrid"][LOCAL], own["vit"][LOCAL])),
        _difference("S0-C08", "global strength: hybrid less cnn, far", (own["hybrid"][ACROSS], own["cnn"][ACROSS])),
    ]


def sizes_of(results: Mapping[str, Any]) -> list[tuple[int, dict[str, Any]]]:
    """Different training pictures, and where their scores are."""
    spec = results["spec"]
    few: list[tuple[int, dict[str, Any]]] = [(n, {"part": "data", "pictures": n}) for n in spec["data"]["pictures"]]
    return [*few, (spec["steps"] * spec["batch"], {})]


def slope(sizes: Sequence[int], values: Sequence[float]) -> float:
    """Gain for each doubling of the size, by least squares.

    Example:
        >>> slope([1, 2, 4], [0.1, 0.2, 0.3]).__round__(3)
        0.1
    """
    x = [math.log2(size) for size in sizes]
    center = math.fsum(x) / len(x)
    spread = math.fsum((a - center) ** 2 for a in x)
    return math.fsum((a - center) * value for a, value in zip(x, values, strict=True)) / spread


def crossover(results: Mapping[str, Any]) -> int | None:
    """The least number of pictures from which on the mean of the ViT over all tasks is that of the CNN or more."""
    found: int | None = None
    for pictures, where in reversed(sizes_of(results)):
        if math.fsum(seeds_of(results, "vit", ALL, **where)) < math.fsum(seeds_of(results, "cnn", ALL, **where)):
            break
        found = pictures
    return found


def _data(results: Mapping[str, Any]) -> list[Finding]:
    """S2-C01, and the half of S2-C02 that is about few pictures."""
    sizes = sizes_of(results)
    own = {e: [seeds_of(results, e, ALL, **where) for _, where in sizes] for e in ("cnn", "vit")}
    slopes = {e: [slope([n for n, _ in sizes], seed) for seed in zip(*own[e], strict=True)] for e in own}
    found = [
        _number("S2-C01", "improves with data: vit, gain for each doubling", slopes["vit"]),
        _difference("S2-C01", "gains more than cnn for each doubling", (slopes["vit"], slopes["cnn"])),
        _difference(
            "S2-C01", f"strong with much data: vit less cnn, {sizes[-1][0]} pictures", (own["vit"][-1], own["cnn"][-1])
        ),
    ]
    return found + [
        _difference("S2-C02", f"worse on few: cnn less vit, {n} pictures", (own["cnn"][at], own["vit"][at]))
        for at, (n, _) in enumerate(sizes)
        if n <= 1000
    ]


def _compute(results: Mapping[str, Any]) -> list[Finding]:
    """The half of S2-C02 that is about operations."""
    flops = {one["encoder"]: one["flops"] for one in results["published"]}
    return [
        _counted(
            "S2-C02",
            f"costs more: operations of {name} over resnet-50, 224 pixels",
            flops[name] / flops["resnet-50"],
            limit=1.0,
        )
        for name in ("vit-b/16", "vit-s/16")
    ]


def _shift(results: Mapping[str, Any]) -> list[Finding]:
    """S2-C03."""
    drops: dict[str, list[float]] = {}
    for name in ("cnn", "vit"):
        still, moved = (seeds_of(results, name, ATTRIBUTE, part="shift", place=p) for p in ("as trained", "moved"))
        drops[name] = [a - b for a, b in zip(still, moved, strict=True)]
    change = {one["what"]: one["change"] for one in results["moving"]}
    first, last = _ends(results, "distance")
    return [
        _counted(
            "S2-C03",
            "a convolution (circular) moves with the picture, a vit with positions does not: change of vit",
            change["vit, learned positions"],
            limit=1e3 * max(change["convolution, circular padding"], 1e-7),
        ),
        _difference(
            "S2-C03",
            "where no object was in training: drop of vit less drop of cnn, shape",
            (drops["vit"], drops["cnn"]),
        ),
        _difference(
            "S2-C03", "local layers have to be learned: distance of the last less the first, pixels", (last, first)
        ),
    ]


def _layers(results: Mapping[str, Any]) -> list[Finding]:
    """S3-C01: what more layers make easier to read, and how much of that is there before any training."""
    found: list[Finding] = []
    for what, says in (("left", "a relation"), ("count", "a count"), ("far", "what is far"), ("color", "a color")):
        first, last = _ends(results, what)
        gain = f"{says}: read from the last layer less before the first"
        found.append(_difference("S3-C01", gain, (last, first)))
        before = [b - a for a, b in zip(*_ends(results, what, when="start"), strict=True)]
        after = [b - a for a, b in zip(first, last, strict=True)]
        found.append(_difference("S3-C01", f"{says}: that gain less the same before training", (after, before)))
    return found


def _advice(results: Mapping[str, Any]) -> list[Finding]:
    """S0-06: the share of tasks whose best encoder of a seed is the one that the rules would take."""
    pictures = sizes_of(results)[-1][0]
    hits = [0] * results["spec"]["seeds"]
    for task in ALL:
        taken = advised("dense" if task == LOCAL else "classify", pictures)
        own = {cost["encoder"]: seeds_of(results, cost["encoder"], (task,)) for cost in results["costs"]}
        for seed in range(len(hits)):
            hits[seed] += max(own, key=lambda name: own[name][seed]) == taken
    says = "`plait advise encoder` takes the winner of a task more often than one in four"
    return [_number("S0-06", says, [hit / len(ALL) for hit in hits], limit=1 / len(results["costs"]))]


def _ends(results: Mapping[str, Any], what: str, *, when: str = "end") -> tuple[list[float], list[float]]:
    """Of the first and of the last layer, at the start or at the end of training."""
    rows = [one for one in results["layers"] if (one["when"], one["what"]) == (when, what)]
    return rows[0]["seeds"], rows[-1]["seeds"]
