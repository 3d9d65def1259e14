"""Figures: accepted by plotly, nothing lost by thinning, nothing drawn that is no number."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from plait.report.charts import Charts, Curve, Metrics, draw_metrics, read_metrics
from plait.report.folder import RunFolder
from plait.report.scores import Score, draw_scores, read_scores

pytestmark = pytest.mark.light


def test_plotly_accepts_every_figure(run: Path) -> None:
    figures = pytest.importorskip("plotly.graph_objects")
    folder, charts = RunFolder(run), Charts(drawn=True)
    draw_metrics(charts, read_metrics(folder, run / "02-pretrain" / "metrics.jsonl"))
    draw_scores(charts, read_scores(folder, run / "02-pretrain" / "scores.json"))
    assert len(charts.figures) == 3 + 1  # loss, gradient norm and rate; one direction of retrieval
    for figure in charts.figures.values():
        figures.Figure(figure)  # refuses what it does not know


def test_whiskers_reach_the_ends_of_the_interval(run: Path) -> None:
    charts = Charts(drawn=True)
    draw_scores(charts, read_scores(RunFolder(run), run / "02-pretrain" / "scores.json"))
    (figure,) = charts.figures.values()
    first = figure["data"][0]
    assert (first["name"], first["x"]) == ("R@1", ["test-concept", "test-both"])
    for value, up, down in zip(first["y"], first["error_y"]["array"], first["error_y"]["arrayminus"], strict=True):
        assert (value - down, value, value + up) == pytest.approx((15.0, 20.0, 26.0))
    assert {trace["name"] for trace in figure["data"]} == {"R@1", "R@5", "untrained", "chance"}, "MRR is no share"


def test_failed_cases_are_told() -> None:
    drawn = draw_scores(Charts(drawn=False), [Score("a/b/R@1", 0.5, 0.4, 0.6, 20, "hit@1", 3)])
    assert "3 cases failed while scoring" in drawn


@given(st.lists(st.floats(-1e6, 1e6), min_size=1, max_size=400), st.integers(2, 50))
def test_thinning_keeps_order_and_every_spike(values: list[float], points: int) -> None:
    curve = Curve()
    for step, value in enumerate(values):
        curve.steps.append(step)
        curve.values.append(value)
    steps, kept = curve.thin(points)
    assert len(kept) <= max(points, 2)
    assert steps == sorted(set(steps))
    assert [values[int(step)] for step in steps] == kept
    assert (min(kept), max(kept)) == (min(values), max(values))


def test_parts_share_a_figure_and_a_lone_part_is_the_whole() -> None:
    names = ["lr", "loss", "loss/a", "loss/b", "kl", "kl/only", "samples", "units/a", "skipped"]
    metrics = Metrics(curves={name: Curve() for name in names})
    assert metrics.groups() == {"loss": ["loss", "loss/a", "loss/b"], "lr": ["lr"], "kl": ["kl"]}


def test_figures_cannot_leave_their_script_element() -> None:
    charts = Charts(drawn=True, figures={"a": {"name": "</script><!--&"}})
    assert not set("<>&") & set(charts.data())
    assert json.loads(charts.data()) == charts.figures
