"""Charts: figures as plain data drawn by plotly.js inside the page; without plotly their tables remain.

Colors are names of the page's own style (``var(--accent)``); ``page.js`` looks them up, in light and in dark.
"""

from __future__ import annotations

import json
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
_ORDER = ("loss", "grad_norm", "lr")
_TITLES = {"loss": "Loss", "grad_norm": "Gradient norm", "lr": "Learning rate"}
_BOOKKEEPING = frozenset(
    {"step", "epoch", "samples", "tokens", "seconds", "samples_per_s", "tokens_per_s", "data_wait", "memory_bytes"}
    | {"skipped", "units", "mfu"}
)


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
            if (head := name.partition("/")[0]) not in _BOOKKEEPING:
                found.setdefault(head, []).append(name)
        # One part alone is the whole again.
        found = {head: [head] if head in names and len(names) == 2 else names for head, names in found.items()}
        return dict(sorted(found.items(), key=lambda item: _ORDER.index(item[0]) if item[0] in _ORDER else len(_ORDER)))


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
    plots = [
        _draw_group(charts, head, {name: metrics.curves[name] for name in names}, level=level)
        for head, names in groups.items()
    ]
    names = [name for its in groups.values() for name in its]
    told: list[str] = []
    if any(len(metrics.curves[name].values) > _POINTS for name in names) and charts.drawn:
        told.append(
            f"{metrics.records:,} steps are drawn as {_POINTS:,} points: the lowest and the highest of each stretch."
        )
    told += [f"{name}: {count:,} values are not finite and not drawn." for name, count in metrics.missing.items()]
    if skipped := sum(metrics.curves["skipped"].values[-1:]) if "skipped" in metrics.curves else 0:
        told.append(f"{skipped:,.0f} steps were skipped.")
    return join(
        el("div", plots, cls="plots") if charts.drawn else None,
        el("p", " ".join(told), cls="note") if told else None,
        charts.numbers(_table_of(metrics, names), title="Some steps in numbers"),
    )


def _draw_group(charts: Charts, head: str, curves: Mapping[str, Curve], *, level: int) -> Html:
    data: list[Figure] = []
    for at, (name, curve) in enumerate(curves.items()):
        steps, values = curve.thin()
        line = {"color": COLORS[at % len(COLORS)], "width": 2}
        shown = {
            "name": label(name),
            "line": line,
            "hovertemplate": "step %{x}: %{y:.4g}<extra>%{fullData.name}</extra>",
        }
        data.append({"type": "scatter", "mode": "lines", "x": steps, "y": values} | shown)
    title = _TITLES.get(head, head)
    ends = [f"{name} from {number(c.values[0])} to {number(c.values[-1])}" for name, c in curves.items() if c.values]
    figure = {
        "data": data,
        "layout": layout(
            {
                "xaxis": {"title": {"text": "step"}, "showgrid": False},
                "yaxis": {"rangemode": "tozero", "exponentformat": "power"},
                "showlegend": len(data) > 1,
            }
        ),
    }
    return charts.place(figure, title=title, said=f"{title} over steps: {'; '.join(ends)}", level=level)


def _table_of(metrics: Metrics, names: Sequence[str]) -> Html:
    """Evenly spaced steps, the first and the last among them."""
    by_step = {name: dict(zip(metrics.curves[name].steps, metrics.curves[name].values, strict=True)) for name in names}
    steps = sorted({step for its in by_step.values() for step in its})
    last = len(steps) - 1
    chosen = sorted({round(at * last / (_ROWS - 1)) for at in range(_ROWS)}) if steps else []
    rows = [[number(int(steps[at])), *(number(by_step[name].get(steps[at])) for name in names)] for at in chosen]
    return table(["step", *names], rows, label="Measures at some steps", left=0)
