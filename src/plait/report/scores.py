"""Scores with their intervals, beside chance and untrained models, as a chart with error bars and a table.

A name is a path: ``retrieval/test-concept/image-to-text/R@1``. The first word and the words between make a chart, the
second is the place on its axis, the last is the series. ``/chance``, ``/untrained`` and the like after it name what a
score is compared with.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from plait.core.yamltext import is_list, is_mapping
from plait.report.charts import COLORS, Charts, Figure, label, layout
from plait.report.folder import RunFolder, number_of
from plait.report.markup import Html, alert, el, join, number, table

_SHARE = re.compile(r"hit@|accuracy|exact|match|rate\b|\bf1\b|wilson")
_SHARES = frozenset({"precision", "recall"})
_NOT_SHARE = frozenset({"MRR"})
_SYMBOLS = ("circle", "diamond", "square", "triangle-up")  # beside colors, for those who see none
_MARKS = {"untrained": ("circle-open", 8), "chance": ("line-ew-open", 16)}


@dataclass(frozen=True, slots=True)
class Score:
    """One measured number.

    Attributes:
        low: Lower end of its 95 % interval.
        high: Upper end.
        n: Cases it was measured on.
        beside: What it is compared with, by name: chance, untrained, gain-over-untrained.
    """

    name: str
    value: float
    low: float
    high: float
    n: int
    rule: str
    failures: int
    beside: dict[str, Score] = field(default_factory=dict)

    @property
    def series(self) -> str:
        """The last word: the metric."""
        return self.name.rpartition("/")[2]

    @property
    def category(self) -> str:
        """The second word: the split; the whole name where it has fewer than three."""
        parts = self.name.split("/")
        return parts[1] if len(parts) > 2 else parts[0]

    @property
    def chart(self) -> str:
        """The first word and those between."""
        parts = self.name.split("/")
        return " · ".join([parts[0], *parts[2:-1]]) if len(parts) > 2 else parts[0]

    @property
    def is_share(self) -> bool:
        """Whether it is a share of cases, to be read in percent."""
        named = self.series.startswith("R@") or self.series in _SHARES or bool(_SHARE.search(self.rule))
        return named and self.series not in _NOT_SHARE and 0 <= self.low <= self.high <= 1

    def show(self, *, signed: bool = False, share: bool | None = None) -> Html:
        """Value and interval."""
        as_share = self.is_share if share is None else share

        def one(value: float) -> str:
            if as_share:
                return f"{value * 100:{'+' if signed else ''}.1f}"
            return f"{value:+.3g}" if signed else number(value)

        unit = " %" if as_share else ""
        if self.low == self.high:
            return join(one(self.value), unit)
        span = el("span", f" {one(self.low)} to {one(self.high)}", cls="interval")
        return join(el("b", one(self.value), unit), span)


def read_scores(run: RunFolder, path: Path) -> list[Score]:
    """The scores of a stage, each with what it is compared with; a record that is no score is a fault."""
    found: dict[str, Score] = {}
    value = run.json(path)
    if value is not None and not is_list(value):
        run.fault(f"{run.relative(path)}: expected a list of scores, came {type(value).__name__}")
    for at, record in enumerate(value if is_list(value) else [], 1):
        if (score := _score(record)) is None:
            run.fault(f"{run.relative(path)}: record {at} is not a score and was left out")
        else:
            found[score.name] = score
    for name in list(found):
        whole, _, beside = name.rpartition("/")
        if whole in found:
            found[whole].beside[beside] = found.pop(name)
    return list(found.values())


def _score(record: object) -> Score | None:
    if not is_mapping(record) or not isinstance(record.get("name"), str):
        return None
    value = number_of(record.get("value"))
    if value is None:
        return None
    low, high = (number_of(record.get(end)) for end in ("low", "high"))
    n, failures = (number_of(record.get(key)) or 0 for key in ("n", "failures"))
    ends = (value if low is None else low, value if high is None else high)
    return Score(record["name"], value, *ends, int(n), str(record.get("rule", "")), int(failures))


def draw_scores(charts: Charts, scores: Sequence[Score]) -> Html:
    """Every score: shares as charts, all in tables, faults of measuring in the open."""
    groups: dict[str, list[Score]] = {}
    for score in scores:
        groups.setdefault(score.chart, []).append(score)
    failures = sum(score.failures for score in scores)
    plots = [_draw_group(charts, name, [s for s in its if s.is_share]) for name, its in groups.items()]
    told = "Whiskers are 95 % intervals."
    if any(kind in score.beside for score in scores for kind in _MARKS):
        told += " Gray marks are what chance, or the same model untrained, reaches."
    rules = dict.fromkeys(score.rule for score in scores if score.rule)
    return join(
        alert(f"{failures:,} cases failed while scoring and count as wrong", kind="warning") if failures else None,
        join(el("div", plots, cls="plots two"), el("p", told, cls="note")) if charts.drawn and any(plots) else None,
        charts.numbers(
            *(join(el("h4", name), _table_of(name, its)) for name, its in groups.items()),
            el("p", "Rules: ", "; ".join(rules), cls="origin"),
            title="Scores in numbers",
        ),
    )


def _draw_group(charts: Charts, name: str, scores: Sequence[Score]) -> Html:
    if not scores:
        return Html("")
    series: dict[str, list[Score]] = {}
    for score in scores:
        series.setdefault(score.series, []).append(score)
    data = [_trace(metric, its, at) for at, (metric, its) in enumerate(series.items())]
    for kind in _MARKS:
        for at, (metric, its) in enumerate(series.items()):
            data += _marks(kind, metric, its, first=at == 0)
    figure = {
        "data": data,
        "layout": layout(
            {
                "height": 320,
                "xaxis": {"showgrid": False},
                "yaxis": {"rangemode": "tozero", "ticksuffix": " %"},
                "scattermode": "group",
                "scattergap": 0.3,
                "showlegend": True,
            }
        ),
    }
    said = "; ".join(f"{s.category} {s.series} {s.value:.1%}, {s.low:.1%} to {s.high:.1%}" for s in scores)
    return charts.place(figure, title=name, said=f"{name}: {said}")


def _trace(name: str, scores: Sequence[Score], at: int) -> Figure:
    color = COLORS[at % (len(COLORS) - 1)]
    return _points(scores, color) | {
        "type": "scatter",
        "mode": "markers",
        "name": label(name),
        "offsetgroup": name,
        "marker": {"color": color, "size": 10, "symbol": _SYMBOLS[at % len(_SYMBOLS)]},
        "hovertemplate": "%{x}: %{y:.1f} %<extra>%{fullData.name}</extra>",
    }


def _marks(kind: str, name: str, scores: Sequence[Score], *, first: bool) -> list[Figure]:
    with_it = [score for score in scores if kind in score.beside]
    if not with_it:
        return []
    symbol, size = _MARKS[kind]
    shown = {
        "type": "scatter",
        "mode": "markers",
        "name": kind,
        "legendgroup": kind,
        "offsetgroup": name,
        "marker": {
            "symbol": symbol,
            "size": size,
            "color": "var(--soft)",
            "line": {"width": 2, "color": "var(--soft)"},
        },
        "showlegend": first,
        "hovertemplate": "%{x}: %{y:.1f} %<extra>" + kind + "</extra>",
    }
    points = _points([score.beside[kind] for score in with_it], "var(--soft)")
    return [points | {"x": [label(score.category) for score in with_it]} | shown]


def _points(scores: Sequence[Score], color: str) -> Figure:
    """Values in percent, with their intervals."""
    whiskers = {
        "type": "data",
        "symmetric": False,
        "array": [100 * max(s.high - s.value, 0.0) for s in scores],
        "arrayminus": [100 * max(s.value - s.low, 0.0) for s in scores],
        "color": color,
        "thickness": 1.5,
        "width": 4,
    }
    return {"x": [label(s.category) for s in scores], "y": [100 * s.value for s in scores], "error_y": whiskers}


def _table_of(name: str, scores: Sequence[Score]) -> Html:
    columns = list(dict.fromkeys(key for score in scores for key in score.beside))
    rows: Iterable[list[str]] = (
        [score.category, score.series, score.show(), *_beside(score, columns), f"{score.n:,}"] for score in scores
    )
    head = ["", "metric", "value, 95 % interval", *(column.replace("-", " ") for column in columns), "n"]
    return table(head, rows, label=f"Scores: {name}", left=2)


def _beside(score: Score, columns: Sequence[str]) -> list[str]:
    known: Mapping[str, Score] = score.beside
    return [
        known[column].show(signed=column.startswith("gain"), share=score.is_share) if column in known else ""
        for column in columns
    ]
