"""``sweep.html``: what a search tried, what came of it, and what the best settings reach on the test splits."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from plait.core.files import write_atomic
from plait.report.charts import COLORS, MISSING, Charts, Figure, label, layout, plotly_source
from plait.report.compare_page import value_text
from plait.report.folder import RunFolder, number_of
from plait.report.markup import Html, alert, el, fold, join, number, origin, table
from plait.report.page import document
from plait.report.scores import Score, draw_scores, read_scores

NAME = "sweep.html"

_TICKS = 30  # trials up to which each has its number on the axis
_FEW = 3  # points of a curve that would hardly be seen as a line
_POINTS = 200  # of a trial's curve
_SYMBOLS = {"complete": "circle", "pruned": "x", "failed": "line-ew-open"}
_STATES = {"complete": "done", "pruned": "stopped early", "failed": "failed"}


@dataclass(frozen=True, slots=True, kw_only=True)
class SweepFacts:
    """What the page tells.

    Attributes:
        sweep: Settings of the sweep, as plain data.
        trials: Number, state, value, step, values and error of each.
        best: Number of the best; None while there is none.
        metrics: Where a trial's metrics are, from its folder.
        judged: Of these, the one that judges.
        importance: Share of each setting in what separates good trials from others.
        final: Run folder of the best settings with test scores.
    """

    sweep: Mapping[str, Any]
    trials: Sequence[Mapping[str, Any]]
    best: int | None
    metrics: str
    judged: str
    importance: Mapping[str, float] = field(default_factory=dict[str, float])
    final: Path | None = None


def write_sweep_page(folder: Path, facts: SweepFacts) -> Path:
    """Write the page into the sweep's folder.

    Raises:
        ResourceError: The disk is full or not writable.
    """
    path = folder / NAME
    write_atomic(path, render(folder, facts))
    return path


def render(folder: Path, facts: SweepFacts) -> str:
    """The page as text."""
    plotly = plotly_source()
    charts = Charts(drawn=plotly is not None)
    run = RunFolder(folder.resolve())
    body = join(
        _head(folder, facts),
        None
        if charts.drawn
        else alert(f"plotly is not installed, so there are tables in place of charts: {MISSING}", kind="note"),
        _final(facts, charts),
        _values(facts, charts),
        _settings(facts, charts),
        _curves(run, facts, charts),
        _table(facts),
        el("footer", el("p", "Made by Plait from the folder of the sweep. Files named in small type lie beside it.")),
    )
    return document(f"{folder.name} – Plait", body, plotly if charts.figures else None, charts=charts)


def _head(folder: Path, facts: SweepFacts) -> Html:
    sweep, best = facts.sweep, _best(facts)
    counts = {state: sum(trial["state"] == state for trial in facts.trials) for state in _STATES}
    told = ", ".join(f"{count} {_STATES[state]}" for state, count in counts.items() if count)
    lines: list[Html] = [el("li", f"{len(facts.trials)} trials by {sweep['method']}: {told or 'none so far'}")]
    if best is not None:
        chosen = ", ".join(f"{key} = {value_text(value)}" for key, value in best["values"].items())
        lines.append(
            el("li", el("b", f"Trial {best['number']}"), f": {sweep['metric']} {number(best['value'])} with {chosen}")
        )
    note = (
        f"The best of {len(facts.trials)} values on the data that chose it is optimistic: part of it is luck. The "
        "number to quote is the test score of the last run, which looked at the test splits once."
    )
    return el(
        "header",
        el("p", f"Search over the recipe {Path(str(sweep['recipe'])).stem}", cls="eyebrow"),
        el("h1", folder.name),
        el("ul", lines, cls="results"),
        el("p", note, cls="note"),
    )


def _best(facts: SweepFacts) -> Mapping[str, Any] | None:
    return next((trial for trial in facts.trials if trial["number"] == facts.best), None)


def _final(facts: SweepFacts, charts: Charts) -> Html | None:
    if facts.final is None:
        return None
    run = RunFolder(facts.final.resolve())
    found: list[Score] = []
    for stage in run.stages:
        found += read_scores(run, stage.path / "scores.json")
    parts = [alert(text) for text in run.faults]
    page = f"final/{facts.final.name}/report.html"
    return el(
        "section",
        el("h2", "On the test splits"),
        parts,
        draw_scores(charts, found) if found else el("p", "The recipe scores nothing.", cls="note"),
        origin(page, "test_access.json"),
    )


def _values(facts: SweepFacts, charts: Charts) -> Html | None:
    """Value by trial, and the best so far."""
    data = [
        _points(facts, state, x=[t["number"] for t in its], y=[t["value"] for t in its], trials=its)
        for state in ("complete", "pruned")
        if (its := [t for t in facts.trials if t["state"] == state])
    ]
    best: list[float] = []
    numbers: list[int] = []
    pick = min if facts.sweep["direction"] == "minimize" else max
    for trial in facts.trials:
        if trial["state"] == "complete":
            best.append(pick([*best[-1:], trial["value"]]))
            numbers.append(trial["number"])
    if not data:
        return None
    line: Figure = {"color": "var(--soft)", "width": 1, "shape": "hv"}
    data.append({"type": "scatter", "mode": "lines", "x": numbers, "y": best, "name": "best so far", "line": line})
    axes = _axes("trial", facts.sweep["metric"], legend=True)
    if len(facts.trials) <= _TICKS:
        axes["xaxis"] |= {"dtick": 1}
    figure = {"data": data, "layout": axes}
    said = f"{facts.sweep['metric']} of {len(facts.trials)} trials"
    return el("section", el("h2", "Trials"), charts.place(figure, title="Value by trial", said=said, level=3))


def _points(
    facts: SweepFacts, state: str, *, x: list[Any], y: list[Any], trials: Sequence[Mapping[str, Any]]
) -> Figure:
    said = [label(f"trial {trial['number']}: {_chosen(trial)}") for trial in trials]
    color = COLORS[0] if state == "complete" else "var(--soft)"
    sizes = [14 if trial["number"] == facts.best else 8 for trial in trials]
    return {
        "type": "scatter",
        "mode": "markers",
        "x": x,
        "y": y,
        "name": _STATES[state],
        "text": said,
        "marker": {"color": color, "size": sizes, "symbol": _SYMBOLS[state]},
        "hovertemplate": "%{text}<br>%{y:.5g}<extra></extra>",
    }


def _chosen(trial: Mapping[str, Any]) -> str:
    return ", ".join(f"{key.rpartition('.')[2]} {value_text(value)}" for key, value in trial["values"].items())


def _axes(x: str, y: str, *, legend: bool = False, log: bool = False, words: bool = False) -> Figure:
    kind = {"type": "log"} if log else {"type": "category"} if words else {}
    return layout(
        {
            "xaxis": {"title": {"text": label(x)}, "showgrid": False, **kind},
            "yaxis": {"title": {"text": label(y)}, "exponentformat": "power"},
            "showlegend": legend,
            "height": 300,
        }
    )


def _settings(facts: SweepFacts, charts: Charts) -> Html | None:
    """Value by each setting."""
    plots: list[Html] = []
    for key, given in facts.sweep["search"].items():
        is_range = isinstance(given, Mapping)
        data: list[Figure] = []
        for state in ("complete", "pruned"):
            its = [t for t in facts.trials if t["state"] == state]
            if its:
                x = [t["values"][key] if is_range else value_text(t["values"][key]) for t in its]
                data.append(_points(facts, state, x=x, y=[t["value"] for t in its], trials=its))
        if data:
            axes = _axes(key, facts.sweep["metric"], log=is_range and bool(given["log"]), words=not is_range)
            share = facts.importance.get(key)
            title = key if share is None else f"{key} ({share:.0%} of the difference)"
            plots.append(charts.place({"data": data, "layout": axes}, title=title, said=f"Values by {key}", level=3))
    if not any(plots):
        return None
    told = "The larger mark is the best trial; crosses were stopped early, so that their values are of fewer steps."
    if facts.importance:
        told += " How much a setting separates good trials from others is PED-ANOVA's share."
    return el(
        "section",
        el("h2", "By setting"),
        el("div", plots, cls="plots two"),
        el("p", told, cls="note"),
    )


def _curves(run: RunFolder, facts: SweepFacts, charts: Charts) -> Html | None:
    """The metric of every trial over steps."""
    data: list[Figure] = []
    for trial in sorted(facts.trials, key=lambda t: t["number"] == facts.best):
        path = run.path / "trials" / f"trial-{trial['number']:04d}" / facts.metrics
        found = [
            (step, value)
            for record in run.lines(path)
            if (value := number_of(record.get(facts.judged))) is not None
            and (step := number_of(record.get("step"))) is not None
            and (trial["state"] != "pruned" or step <= (trial["reached"] or trial["step"]))
        ]
        if not found:
            continue
        found = found[:: max(1, len(found) // _POINTS)] + ([] if len(found) == 1 else found[-1:])
        best = trial["number"] == facts.best
        line = {
            "color": COLORS[0] if best else "var(--soft)",
            "width": 3 if best else 1,
            "dash": "dot" if trial["state"] == "pruned" else "solid",
        }
        data.append(
            {
                "type": "scatter",
                "mode": "lines+markers" if len(found) <= _FEW else "lines",
                "x": [step for step, _ in found],
                "y": [value for _, value in found],
                "name": f"trial {trial['number']}",
                "line": line,
                "opacity": 1.0 if best else 0.6,
                "hovertemplate": "step %{x}: %{y:.4g}<extra>%{fullData.name}</extra>",
            }
        )
    if not data:
        return None
    figure = {"data": data, "layout": _axes("step", facts.sweep["metric"])}
    drawn = charts.place(figure, title=str(facts.sweep["metric"]), said="The metric of every trial", level=3)
    told = "The strong line is the best trial; dotted ones were stopped early."
    return el("section", el("h2", "How they learned"), drawn, el("p", told, cls="note"))


def _table(facts: SweepFacts) -> Html:
    keys = list(facts.sweep["search"])
    sign = 1 if facts.sweep["direction"] == "minimize" else -1
    order = {"complete": 0, "pruned": 1, "failed": 2}
    ranked = sorted(facts.trials, key=lambda t: (order[t["state"]], sign * (t["value"] or 0.0), t["number"]))
    rows = [
        [
            str(trial["number"]),
            _STATES[trial["state"]],
            *(value_text(trial["values"].get(key)) for key in keys),
            number(trial["value"]),
            number(trial["step"]) if trial["step"] else "–",
        ]
        for trial in ranked
    ]
    failed = [el("p", f"Trial {t['number']}: {t['error']}", cls="note") for t in facts.trials if t["error"]]
    return el(
        "section",
        el("h2", "All trials, the best first"),
        table(["trial", "", *keys, str(facts.sweep["metric"]), "step"], rows, label="All trials", left=2),
        fold(f"Why {len(failed)} failed", failed) if failed else None,
        origin("sweep.csv", "sweep.yaml", *(["best.yaml"] if facts.best is not None else [])),
    )
