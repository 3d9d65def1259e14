"""What the stages of a pipeline did in a measured step: ``timeline.json`` as bars over time, and the time of each."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from plait.core.yamltext import is_list, is_mapping
from plait.report.charts import COLORS, Charts, Figure, layout
from plait.report.folder import RunFolder, number_of
from plait.report.markup import Html, el, join, number, origin, table

_KINDS = ("forward", "backward", "wait")


def draw_timeline(run: RunFolder, path: Path, charts: Charts, *, level: int = 5) -> Html | None:
    """A bar for each pass of a micro-batch; gaps are idle. Nothing where there is no such file.

    Args:
        run: The run.
        path: ``timeline.json`` of a phase.
        charts: Of the page.
        level: Of headings.
    """
    record = run.mapping(path)
    given = record.get("spans")
    spans = [span for span in given if is_mapping(span)] if is_list(given) else []
    if not spans:
        return None
    stages = sorted({int(span["stage"]) for span in spans})
    names = {stage: f"stage {stage + 1}" for stage in stages}
    data = [_bars(kind, spans, names, color=COLORS[at]) for at, kind in enumerate(_KINDS[:2])]
    figure: Figure = {
        "data": data,
        "layout": layout(
            {
                "barmode": "overlay",
                "bargap": 0.25,
                "height": 110 + 44 * len(stages),
                "xaxis": {"title": {"text": "ms"}},
                "yaxis": {"autorange": "reversed", "showgrid": False},
                "showlegend": True,
            }
        ),
    }
    idle, bubble = number_of(record.get("idle")), number_of(record.get("bubble"))
    several = "es" if record.get("micro_batches") != 1 else ""
    said = (
        f"Step {number(record.get('step'))}, {record.get('schedule')}: {number(record.get('micro_batches'))} "
        f"micro-batch{several} through {len(stages)} stages, idle for {_share(idle)}; "
        f"{_share(bubble)} if all took as long"
    )
    rows = [[names[stage], *_times(stage, spans)] for stage in stages]
    drawn = table(["", *(f"{kind}, ms" for kind in _KINDS)], rows, label="Time of each stage")
    return join(
        charts.place(figure, title="One step of the pipeline", said=said, level=level),
        el("p", f"{said}.", cls="note"),
        charts.numbers(drawn, title="Time of each stage"),
        origin(run.relative(path)),
    )


def _bars(kind: str, spans: list[dict[str, Any]], names: dict[int, str], *, color: str) -> Figure:
    mine = [span for span in spans if span["kind"] == kind]
    return {
        "type": "bar",
        "orientation": "h",
        "name": kind,
        "y": [names[int(span["stage"])] for span in mine],
        "base": [1e3 * float(span["start"]) for span in mine],
        "x": [1e3 * (float(span["end"]) - float(span["start"])) for span in mine],
        "text": [str(int(span["micro"]) + 1) for span in mine],
        "textposition": "inside",
        "marker": {"color": color},
        "hovertemplate": "%{y}: micro-batch %{text}, %{x:.3g} ms<extra>%{fullData.name}</extra>",
    }


def _times(stage: int, spans: list[dict[str, Any]]) -> list[str]:
    each: dict[str, float] = dict.fromkeys(_KINDS, 0.0)
    for span in spans:
        if int(span["stage"]) == stage:
            each[str(span["kind"])] += 1e3 * (float(span["end"]) - float(span["start"]))
    return [f"{each[kind]:,.1f}" for kind in _KINDS]


def _share(value: float | None) -> str:
    return "an unknown share" if value is None else f"{value:.0%}"
