"""A measured step of a pipeline: every pass is a bar in its place, waiting is none, and plotly takes the figure."""

from __future__ import annotations

from pathlib import Path

import pytest

from plait.core.files import write_json
from plait.report.charts import Charts
from plait.report.folder import RunFolder
from plait.report.timeline import draw_timeline
from plait.training.parallel.order import SCHEDULES, simulated, timeline_record

pytestmark = pytest.mark.light


@pytest.mark.row("S2-30")
def test_bars_are_the_passes_and_plotly_accepts_them(run: Path) -> None:
    spans = simulated(SCHEDULES["1f1b"], forward=[0.1] * 3, backward=[0.2] * 3, micro=4)
    path = run / "02-pretrain" / "timeline.json"
    write_json(path, timeline_record(spans, step=2, schedule="1f1b"))
    charts = Charts(drawn=True)
    drawn = draw_timeline(RunFolder(run), path, charts)
    assert drawn is not None
    assert "4 micro-batches through 3 stages, idle for 33%; 33% if all took as long" in drawn
    assert "02-pretrain/timeline.json" in drawn
    (figure,) = charts.figures.values()
    bars = {
        (trace["name"], y, text): (base, base + x)
        for trace in figure["data"]
        for y, text, base, x in zip(trace["y"], trace["text"], trace["base"], trace["x"], strict=True)
    }
    assert len(bars) == 2 * 3 * 4
    for span in spans:
        if span.kind != "wait":
            key = span.kind, f"stage {span.stage + 1}", str(span.micro + 1)
            assert bars[key] == pytest.approx((1e3 * span.start, 1e3 * span.end))
    figures = pytest.importorskip("plotly.graph_objects")
    figures.Figure(figure)


def test_without_plotly_the_times_stand_in_a_table_and_without_a_file_there_is_nothing(run: Path) -> None:
    spans = simulated(SCHEDULES["gpipe"], forward=[0.1, 0.1], backward=[0.2, 0.2], micro=1)
    path = run / "02-pretrain" / "timeline.json"
    assert draw_timeline(RunFolder(run), path, Charts(drawn=False)) is None
    write_json(path, timeline_record(spans, step=2, schedule="gpipe"))
    drawn = draw_timeline(RunFolder(run), path, Charts(drawn=False))
    assert drawn is not None
    for cell in ("stage 1", "100.0", "200.0", "300.0"):
        assert cell in drawn
