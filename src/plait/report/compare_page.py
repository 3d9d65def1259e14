"""``compare.html``: runs beside each other in one page that is complete in itself."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from plait.core.files import write_atomic
from plait.core.yamltext import came
from plait.report.charts import COLORS, MISSING, Charts, Figure, label, layout, plotly_source
from plait.report.markup import Html, alert, duration, el, fold, join, mebibytes, number, table
from plait.report.page import document
from plait.report.scores import Score
from plait.report.sides import Side, last

NAME = "compare.html"

_CURVES = ("evaluation", "loss", "lr", "grad_norm")
_TITLES = {
    "evaluation": "Evaluation",
    "loss": "Loss",
    "lr": "Learning rate",
    "grad_norm": "Gradient norm",
}
_DASHES = ("solid", "dash", "dot", "dashdot")  # beside colors, for those who see none


@dataclass(frozen=True, slots=True, kw_only=True)
class Difference:
    """A score minus that of the first run.

    Attributes:
        low: Lower end of its 95 % interval, from the same samples in both; None where they cannot be paired.
        high: Upper end.
        n: Samples that both answered.
    """

    value: float
    low: float | None = None
    high: float | None = None
    n: int = 0

    @property
    def sign(self) -> str:
        """``+`` or ``-`` where the interval leaves out 0, ``~`` where it holds it; ``?`` without an interval."""
        if self.low is None or self.high is None:
            return "?"
        return "+" if self.low > 0 else "-" if self.high < 0 else "~"


@dataclass(frozen=True, slots=True, kw_only=True)
class Comparison:
    """Runs beside each other.

    Attributes:
        sides: The runs; the others differ from the first.
        settings: Dotted settings that differ → value in each run; None where a run has none.
        machine: Versions, threads and processes that differ, likewise.
        data: What is wrong with comparing their scores; empty if nothing is.
        scores: Stage and name of every score that a run has.
        differences: By number of the run and score.
    """

    sides: Sequence[Side]
    settings: dict[str, list[Any]]
    machine: dict[str, list[Any]]
    data: str
    scores: Sequence[tuple[str, str]]
    differences: dict[tuple[int, tuple[str, str]], Difference]


def write_comparison(found: Comparison, path: Path) -> Path:
    """Write the page.

    Raises:
        ResourceError: The disk is full or not writable.
    """
    write_atomic(path, render(found))
    return path


def render(found: Comparison) -> str:
    """The page as text."""
    plotly = plotly_source()
    charts = Charts(drawn=plotly is not None)
    names = [side.name for side in found.sides]
    title = f"{' and '.join(names) if len(names) == 2 else f'{len(names)} runs'} beside each other"
    body = join(
        el(
            "header",
            el("p", "Comparison of runs", cls="eyebrow"),
            el("h1", title),
            el("ul", [_run(side) for side in found.sides], cls="results"),
        ),
        _alerts(found, drawn=charts.drawn),
        _differing("What differs in the recipes", found.settings, names, nothing="The recipes say the same."),
        _scores(found),
        _curves(found, charts),
        _costs(found),
        _differing("Machine and versions", found.machine, names, nothing="Versions, threads and processes are equal."),
        el("footer", el("p", "Made by Plait from the folders of the runs.")),
    )
    return document(f"{title} – Plait", body, plotly if charts.figures else None, charts=charts)


def _run(side: Side) -> Html:
    state = el("span", side.run.state, cls=f"tag {side.run.state}")
    stops = [f"{s.path.name}: {s.stop or 'begun, not finished'}" for s in side.run.stages if s.state in _ENDED]
    return el("li", el("b", side.name), " ", state, [el("p", text) for text in stops])


_ENDED = ("stopped", "unfinished")


def _alerts(found: Comparison, *, drawn: bool) -> Html:
    same = "All runs have the same samples: their shards have one digest."
    told = [alert(found.data, kind="warning") if found.data else el("p", same, cls="note")]
    told += [alert(f"{side.name}: {text}") for side in found.sides for text in side.run.faults]
    if not drawn:
        told.append(alert(f"plotly is not installed, so there are tables in place of charts: {MISSING}", kind="note"))
    return el("section", el("h2", "What to look at"), told)


def value_text(value: Any) -> str:
    """A setting as a cell."""
    if value is None:
        return "–"
    return value if isinstance(value, str) else number(value) if isinstance(value, bool | int | float) else came(value)


def _differing(title: str, rows: dict[str, list[Any]], names: Sequence[str], *, nothing: str) -> Html:
    if not rows:
        return el("section", el("h2", title), el("p", nothing, cls="note"))
    cells = [[key, *map(value_text, values)] for key, values in rows.items()]
    return el("section", el("h2", title), table(["", *names], cells, label=title, left=len(names) + 1))


def _scores(found: Comparison) -> Html | None:
    if not found.scores:
        return el("section", el("h2", "Scores"), el("p", "No run has been scored so far.", cls="note"))
    first, *others = found.sides
    head = ["score", first.name]
    for side in others:
        head += [side.name, f"{side.name} – {first.name}" if len(others) > 1 else "difference"]
    parts: list[Html] = []
    for stage in dict.fromkeys(stage for stage, _ in found.scores):
        rows = [_score_row(found, key) for key in found.scores if key[0] == stage]
        parts += [el("h3", stage), table(head, rows, label=f"Scores of {stage} side by side")]
    told = (
        "With 95 % intervals. A difference is taken sample by sample where both runs kept their answers to the same "
        "questions (✓ and ✗: its interval leaves out 0; ~: it does not); where they did not, it has no interval."
    )
    return el(
        "section",
        el("h2", "Scores"),
        alert("these scores do not compare: the data are not the same") if "not the same" in found.data else None,
        el("p", told, cls="note"),
        parts,
    )


def _score_row(found: Comparison, key: tuple[str, str]) -> list[str]:
    row: list[str] = [key[1]]
    for at, side in enumerate(found.sides):
        score = side.scores.get(key)
        row.append("–" if score is None else _two_lines(score))
        if at:
            difference = found.differences.get((at, key))
            row.append("–" if difference is None or score is None else _difference(difference, score))
    return row


def _two_lines(score: Score) -> Html:
    """Value, and its interval below: so that three columns fit beside each other."""
    return Html(score.show().replace('<span class="interval">', '<br><span class="interval">'))


def _difference(found: Difference, score: Score) -> Html:
    factor, unit = (100.0, " %") if score.is_share else (1.0, "")

    def one(value: float) -> str:
        return f"{factor * value:+.1f}" if score.is_share else f"{value:+.3g}"

    if found.low is None or found.high is None:
        return join(one(found.value), unit, el("br"), el("span", "not paired", cls="interval"))
    mark = {"+": "✓ ", "-": "✗ ", "~": "~ "}[found.sign]
    span = el("span", f"{one(found.low)} to {one(found.high)}", cls="interval")
    return join(el("b", mark), one(found.value), unit, el("br"), span)


def _curves(found: Comparison, charts: Charts) -> Html | None:
    places = list(dict.fromkeys(name for side in found.sides for name in side.curves))
    parts: list[Html] = []
    for place in places:
        plots = [drawn for what in _CURVES if (drawn := _overlay(found, charts, place, what=what))]
        if plots:
            parts += [el("h3", place), el("div", plots, cls="plots") if charts.drawn else join(plots)]
            parts.append(charts.numbers(_ends(found, place), title="Last values"))
    return el("section", el("h2", "How they learned"), parts) if parts else None


def _overlay(found: Comparison, charts: Charts, place: str, *, what: str) -> Html | None:
    """One quantity of all runs that measured it, in one figure."""
    data: list[Figure] = []
    ends: list[str] = []
    for at, side in enumerate(found.sides):
        curve = side.curves[place].curves.get(what) if place in side.curves else None
        if curve is None or not curve.values:
            continue
        steps, values = curve.thin()
        line = {"color": COLORS[at % len(COLORS)], "width": 2, "dash": _DASHES[at % len(_DASHES)]}
        data.append(
            {
                "type": "scatter",
                "mode": "lines+markers" if len(values) < 3 else "lines",
                "x": steps,
                "y": values,
                "name": label(side.name),
                "line": line,
                "hovertemplate": "step %{x}: %{y:.4g}<extra>%{fullData.name}</extra>",
            }
        )
        ends.append(f"{side.name} from {number(values[0])} to {number(values[-1])}")
    if not data:
        return None
    figure = {
        "data": data,
        "layout": layout(
            {
                "xaxis": {"title": {"text": "step"}, "showgrid": False},
                "yaxis": {"rangemode": "normal", "exponentformat": "power"},
                "showlegend": True,
            }
        ),
    }
    title = _TITLES[what]
    return charts.place(figure, title=title, said=f"{title} over steps: {'; '.join(ends)}")


def _ends(found: Comparison, place: str) -> Html:
    there = [side for side in found.sides if place in side.curves]
    names = [what for what in _CURVES if any(last(side.curves[place], what) is not None for side in there)]
    rows = [
        [
            side.name,
            number(int(max(curve.steps, default=0))) if (curve := side.curves[place].curves.get("loss")) else "–",
            *(number(last(side.curves[place], what)) for what in names),
        ]
        for side in there
    ]
    return table(["", "steps", *names], rows, label=f"Last values of {place}")


COSTS: dict[str, Callable[[Any], str]] = {
    "seconds": duration,
    "steps": number,
    "tokens": number,
    "memory": mebibytes,
    "disk": mebibytes,
}
"""What is told of the cost of a stage, and how."""


def _costs(found: Comparison) -> Html:
    stages = list(dict.fromkeys(name for side in found.sides for name in side.costs))
    parts: list[Html] = []
    for what, show in COSTS.items():
        rows = [
            [stage, *(show(value) if (value := _cost_of(side, stage, what)) else "–" for side in found.sides)]
            for stage in stages
        ]
        if any(cell != "–" for row in rows for cell in row[1:]):
            title = {"memory": "memory at its highest", "disk": "size on disk", "seconds": "time"}.get(what, what)
            drawn = table([title, *(side.name for side in found.sides)], rows, label=title)
            parts.append(drawn if what == "seconds" else fold(title.capitalize(), drawn))
    return el("section", el("h2", "What they took"), parts)


def _cost_of(side: Side, stage: str, what: str) -> Any:
    return getattr(side.costs[stage], what) if stage in side.costs else None
