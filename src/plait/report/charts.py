"""Charts: figures as plain data drawn by plotly.js inside the page; without plotly their tables remain.

Colors are names of the page's own style (``var(--accent)``); ``page.js`` looks them up, in light and in dark.
"""

from __future__ import annotations

import json
import math
from array import array
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from plait.report.folder import RunFolder, number_of
from plait.report.markup import Html, el, fold, join, number, table

Figure = dict[str, Any]
"""``data`` and ``layout``, as plotly takes them."""

MISSING = "pip install 'plait[report]'"
"""What brings plotly."""

COLORS = ("var(--accent)", "var(--accent-2)", "var(--accent-3)", "var(--soft)")
"""Of the first series to the last; more begin again."""

_POINTS = 1_000
_ROWS = 10
_SHARES = "positions"  # a figure of several fields
_BOOKKEEPING = frozenset({"step", "epoch", "samples", "tokens", "seconds", "samples_per_s", "save_s", "units"})
_MARKED = {
    "skipped": "left out",
    "spikes": "a spike",
    "rewound": "gone back before",
}  # counters: what a step is where one has grown
_MOST_MARKS = 40
_FEW = 20  # points, which are marked
_SMOOTH = 50  # records from which on a mean over some of them is drawn


@dataclass(frozen=True, slots=True)
class _Look:
    """How a quantity is drawn: title, factor, format of the axis."""

    title: str
    factor: float = 1.0
    ticks: str = ""


_LOOKS = {
    "loss": _Look("Loss"),
    "evaluation": _Look("Evaluation"),
    "grad_norm": _Look("Gradient norm, before clipping"),
    "lr": _Look("Learning rate"),
    "tokens_per_s": _Look("Tokens a second"),
    "data_wait": _Look("Time spent waiting for data", ticks="~%"),
    "memory_bytes": _Look("Memory of the first process, MiB", factor=2.0**-20),
    "mfu": _Look("MFU: share of the measured peak", ticks="~%"),
    _SHARES: _Look("Shares of all positions", ticks="~%"),
}
"""In the order in which they are drawn; what else a stage measures follows."""


def plotly_source() -> str | None:
    """The text of plotly.js as the package carries it; None where plotly is not installed."""
    try:
        from plotly.offline import get_plotlyjs
    except ImportError:
        return None
    return get_plotlyjs()


@dataclass(slots=True)
class Charts:
    """The charts of one page.

    Attributes:
        drawn: Whether plotly is there; if not, tables stand open in the place of figures.
        figures: So far, by the id of their place.
    """

    drawn: bool
    figures: dict[str, Figure] = field(default_factory=dict[str, Figure])

    def place(self, figure: Figure, *, title: str, said: str, level: int = 4) -> Html:
        """A figure's place in the page, with words for those who do not see it; nothing where plotly is missing."""
        if not self.drawn:
            return Html("")
        name = f"chart-{len(self.figures) + 1}"
        self.figures[name] = figure
        box = el("div", cls="chart", attrs={"id": name, "role": "img", "aria-label": said})
        return el("div", el(f"h{level}", title), box, cls="plot")

    def numbers(self, *tables: Html, title: str) -> Html:
        """The numbers behind figures: folded below them, or open in their place."""
        return fold(title, *tables, shown=not self.drawn)

    def data(self) -> str:
        """All figures as JSON that may stand in a script element."""
        text = json.dumps(self.figures, allow_nan=False)
        return text.replace("<", "\\u003c").replace(">", "\\u003e").replace("&", "\\u0026")


def label(text: str) -> str:
    """Text for a figure, where plotly would take ``<b>`` for markup."""
    return text.replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;")


def layout(changes: Mapping[str, Any]) -> Figure:
    """What all figures share, with changes: top-level keys of a plotly layout; axes are changed key by key."""
    axis = {
        "gridcolor": "var(--line)",
        "linecolor": "var(--line)",
        "zeroline": False,
        "automargin": True,
        "fixedrange": True,
    }
    shared: Figure = {
        "height": 260,
        "margin": {"l": 48, "r": 12, "t": 8, "b": 36},
        "paper_bgcolor": "rgba(0,0,0,0)",
        "plot_bgcolor": "rgba(0,0,0,0)",
        "font": {"color": "var(--soft)", "size": 13},
        "hoverlabel": {"bgcolor": "var(--paper)", "font": {"color": "var(--ink)"}},
        "legend": {"orientation": "h", "y": 1.02, "yanchor": "bottom", "x": 0, "font": {"color": "var(--ink)"}},
        "showlegend": False,
    }
    axes = {key: axis | dict(changes.get(key, {})) for key in ("xaxis", "yaxis")}
    return shared | dict(changes) | axes


# --- curves of metrics.jsonl -----------------------------------------------------------------------------------------


@dataclass(slots=True)
class Curve:
    """One quantity over steps."""

    steps: array[float] = field(default_factory=lambda: array("d"))
    values: array[float] = field(default_factory=lambda: array("d"))

    def thin(self, points: int = _POINTS) -> tuple[list[float], list[float]]:
        """At most ``points`` of them: the lowest and the highest of each stretch, so that no spike is lost."""
        count = len(self.values)
        if count <= points:
            return list(self.steps), list(self.values)
        stretches = points // 2
        kept: list[int] = []
        for part in range(stretches):
            span = range(part * count // stretches, (part + 1) * count // stretches)
            kept += sorted({min(span, key=self.values.__getitem__), max(span, key=self.values.__getitem__)})
        return [self.steps[at] for at in kept], [self.values[at] for at in kept]

    def smoothed(self, window: int) -> Curve:
        """The mean of each value and those before it, ``window`` in all; fewer at the beginning."""
        parts = [self.values[max(at + 1 - window, 0) : at + 1] for at in range(len(self.values))]
        return Curve(steps=self.steps, values=array("d", (math.fsum(part) / len(part) for part in parts)))


_BESIDE = {"evaluation_training": "evaluation"}
"""Curves that say something only beside another one: the gap of both."""


@dataclass(slots=True)
class Metrics:
    """What a stage measured while it worked.

    Attributes:
        curves: By name.
        records: Sound lines.
        missing: Values that were no finite number, by name.
    """

    curves: dict[str, Curve] = field(default_factory=dict[str, Curve])
    records: int = 0
    missing: dict[str, int] = field(default_factory=dict[str, int])

    def groups(self) -> dict[str, list[str]]:
        """Names to draw, by figure: a name and its parts (``loss``, ``loss/a``) share one."""
        found: dict[str, list[str]] = {}
        for name in self.curves:
            head = _SHARES if name == "padding" or name.endswith("_tokens") else name.partition("/")[0]
            head = _BESIDE.get(head, head)
            if head not in _BOOKKEEPING and head not in _MARKED:
                found.setdefault(head, []).append(name)
        if not any(any(self.curves[name].values) for name in found.get(_SHARES, ())):
            found.pop(_SHARES, None)  # rows of one position each
        # One part alone is the whole again.
        for head, names in found.items():
            parts = [name for name in names if name.startswith(f"{head}/")]
            if head in names and len(parts) == 1:
                names.remove(parts[0])
        order = list(_LOOKS)
        return dict(sorted(found.items(), key=lambda item: order.index(item[0]) if item[0] in order else len(order)))

    def marks(self) -> dict[str, list[float]]:
        """Steps at which something went wrong, by what it was."""
        found: dict[str, list[float]] = {}
        for name, said in _MARKED.items():
            curve, before = self.curves.get(name, Curve()), 0.0
            for step, value in zip(curve.steps, curve.values, strict=True):
                if value > before:
                    found.setdefault(said, []).append(step)
                before = value
        return found


def read_metrics(run: RunFolder, path: Path) -> Metrics:
    """Every number of ``metrics.jsonl``, in the order of steps as written."""
    metrics = Metrics()
    for record in run.lines(path):
        metrics.records += 1
        step = number_of(record.get("step"))
        for name, value in record.items():
            found = number_of(value)
            if name == "step" or isinstance(value, str | bool | list | dict):
                continue
            if found is None:
                metrics.missing[name] = metrics.missing.get(name, 0) + 1
                continue
            curve = metrics.curves.setdefault(name, Curve())
            curve.steps.append(metrics.records if step is None else step)
            curve.values.append(found)
    return metrics


def draw_metrics(charts: Charts, metrics: Metrics, *, level: int = 4) -> Html:
    """Curves side by side, under headings of a level, what was left out of them, and a table of some steps."""
    groups = metrics.groups()
    marks = metrics.marks()
    window = max(5, metrics.records // 20) if metrics.records >= _SMOOTH else 0
    plots = [
        _draw_group(
            charts, head, {name: metrics.curves[name] for name in names}, window=window, marks=marks, level=level
        )
        for head, names in groups.items()
    ]
    names = [name for its in groups.values() for name in its]
    told: list[str] = []
    if any(len(metrics.curves[name].values) > _POINTS for name in names) and charts.drawn:
        told.append(
            f"{metrics.records:,} steps are drawn as {_POINTS:,} points: the lowest and the highest of each stretch."
        )
    if window and "loss" in groups and charts.drawn:
        told.append(f"Loss: the thin line is what was recorded, the thick one its mean over the last {window} records.")
    told += [_told(said, steps) for said, steps in marks.items()]
    if any(len(steps) > _MOST_MARKS for steps in marks.values()) and charts.drawn:
        told.append(f"The last {_MOST_MARKS} of each are drawn.")
    told += [f"{name}: {count:,} values are not finite and not drawn." for name, count in metrics.missing.items()]
    return join(
        el("div", plots, cls="plots") if charts.drawn else None,
        el("p", " ".join(told), cls="note") if told else None,
        charts.numbers(_table_of(metrics, names), title="Some steps in numbers"),
    )


def _told(said: str, steps: Sequence[float]) -> str:
    """Which steps something happened to, in words; the dotted lines in the figures of loss and gradient norm."""
    named = ", ".join(f"{step:,.0f}" for step in steps[:10])
    more = f" and {len(steps) - 10:,} more" if len(steps) > 10 else ""
    return f"Steps {named}{more}: {said}." if len(steps) > 1 else f"Step {named}: {said}."


def _draw_group(
    charts: Charts,
    head: str,
    curves: Mapping[str, Curve],
    *,
    window: int,
    marks: Mapping[str, Sequence[float]],
    level: int,
) -> Html:
    look = _LOOKS.get(head, _Look(head))
    data: list[Figure] = []
    for at, (name, curve) in enumerate(curves.items()):
        color = COLORS[at % len(COLORS)]
        smooth = window if name == "loss" else 0
        short = name.partition("/")[2] or ("all" if len(curves) > 1 and name == head else name)
        data.append(_line(short, curve, look, color=color, width=1 if smooth else 2))
        if smooth:
            data[-1]["opacity"] = 0.5
            data.append(_line(f"{short}, mean of {window}", curve.smoothed(window), look, color=color, width=3))
    ends = [
        f"{name} from {number(c.values[0] * look.factor)} to {number(c.values[-1] * look.factor)}"
        for name, c in curves.items()
        if c.values
    ]
    lines = [
        {
            "type": "line",
            "x0": step,
            "x1": step,
            "yref": "paper",
            "y0": 0,
            "y1": 1,
            "line": {"color": COLORS[-1], "width": 1, "dash": "dot"},
        }
        for steps in marks.values()
        for step in steps[-_MOST_MARKS:]
        if head in ("loss", "grad_norm")
    ]
    form = {"tickformat": look.ticks} if look.ticks else {"exponentformat": "power"}
    figure = {
        "data": data,
        "layout": layout(
            {
                "xaxis": {"title": {"text": "step"}, "showgrid": False},
                "yaxis": {"rangemode": "tozero", **form},
                "showlegend": len(data) > 1,
                "shapes": lines,
            }
        ),
    }
    return charts.place(figure, title=look.title, said=f"{look.title} over steps: {'; '.join(ends)}", level=level)


def _line(name: str, curve: Curve, look: _Look, *, color: str, width: int) -> Figure:
    steps, values = curve.thin()
    few = len(steps) < _FEW  # evaluations are far apart
    return {
        "type": "scatter",
        "mode": "lines+markers" if few else "lines",
        "x": steps,
        "y": [value * look.factor for value in values],
        "name": label(name),
        "line": {"color": color, "width": width},
        "hovertemplate": f"step %{{x}}: %{{y:{look.ticks or '.4g'}}}<extra>%{{fullData.name}}</extra>",
    }


def _table_of(metrics: Metrics, names: Sequence[str]) -> Html:
    """Evenly spaced steps, the first and the last among them."""
    by_step = {name: dict(zip(metrics.curves[name].steps, metrics.curves[name].values, strict=True)) for name in names}
    steps = sorted({step for its in by_step.values() for step in its})
    last = len(steps) - 1
    chosen = sorted({round(at * last / (_ROWS - 1)) for at in range(_ROWS)}) if steps else []
    rows = [[number(int(steps[at])), *(number(by_step[name].get(steps[at])) for name in names)] for at in chosen]
    return table(["step", *names], rows, label="Measures at some steps", left=0)
