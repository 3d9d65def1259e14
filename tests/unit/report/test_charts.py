"""Figures: accepted by plotly, nothing lost by thinning, nothing drawn that is no number."""

from __future__ import annotations

import json
from array import array
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


def metrics_of(**curves: list[float]) -> Metrics:
    found = Metrics(records=max(len(values) for values in curves.values()))
    for name, values in curves.items():
        found.curves[name.replace("__", "/")] = Curve(array("d", range(1, len(values) + 1)), array("d", values))
    return found


def test_figures_stand_in_one_order_and_shares_of_positions_share_one() -> None:
    names = ["mfu", "padding", "image_tokens", "audio_tokens", "memory_bytes", "data_wait", "tokens_per_s", "lr"]
    names += ["lr__a", "grad_norm__a", "grad_norm__b", "grad_norm", "evaluation", "loss", "save_s"]
    found = metrics_of(**{name: [0.5, 0.25] for name in names}).groups()
    assert list(found) == [
        *("loss", "evaluation", "grad_norm", "lr", "tokens_per_s", "data_wait", "memory_bytes", "mfu", "positions")
    ]
    assert found["positions"] == ["padding", "image_tokens", "audio_tokens"]
    judged = metrics_of(**{"evaluation": [1.0], "evaluation/text": [1.0], "evaluation_training": [0.5]}).groups()
    assert judged == {"evaluation": ["evaluation", "evaluation_training"]}  # the gap is seen in one figure
    assert "positions" not in metrics_of(loss=[1.0], padding=[0.0]).groups()  # rows of one position have none


@pytest.mark.row("S4-60")
def test_steps_that_went_wrong_are_marked_and_told_with_plotly_and_without() -> None:
    steps = 60
    metrics = metrics_of(
        loss=[1.0] * steps,
        skipped=[0.0] * 9 + [1.0] * 20 + [2.0] * 31,
        spikes=[0.0] * 39 + [1.0] * 21,
        rewound=[0.0] * 49 + [12.0] * 11,
    )
    assert metrics.marks() == {"left out": [10, 30], "a spike": [40], "gone back before": [50]}
    charts = Charts(drawn=True)
    for drawn in (draw_metrics(charts, metrics), draw_metrics(Charts(drawn=False), metrics)):
        assert "Steps 10, 30: left out. Step 40: a spike. Step 50: gone back before." in drawn
    (loss,) = charts.figures.values()
    assert [shape["x0"] for shape in loss["layout"]["shapes"]] == [10, 30, 40, 50]
    assert {shape["x1"] - shape["x0"] for shape in loss["layout"]["shapes"]} == {0}


@given(st.lists(st.floats(-100, 100), min_size=1, max_size=80), st.integers(1, 20))
def test_the_smoothed_loss_is_the_mean_of_the_last_ones(values: list[float], window: int) -> None:
    found = Curve(array("d", range(len(values))), array("d", values)).smoothed(window)
    for at, value in enumerate(found.values):
        some = values[max(0, at + 1 - window) : at + 1]
        assert value == pytest.approx(sum(some) / len(some), abs=1e-9)


def test_smoothing_is_said_and_what_was_recorded_is_drawn_beside_it() -> None:
    charts = Charts(drawn=True)
    drawn = draw_metrics(charts, metrics_of(loss=[float(n) for n in range(200)]))
    (figure,) = charts.figures.values()
    assert [trace["name"] for trace in figure["data"]] == ["loss", "loss, mean of 10"]
    assert figure["data"][0]["y"] == [float(n) for n in range(200)]
    assert "the thick one its mean over the last 10 records" in drawn
    few = Charts(drawn=True)
    assert "mean over" not in draw_metrics(few, metrics_of(loss=[1.0] * 20))


def test_figures_cannot_leave_their_script_element() -> None:
    charts = Charts(drawn=True, figures={"a": {"name": "</script><!--&"}})
    assert not set("<>&") & set(charts.data())
    assert json.loads(charts.data()) == charts.figures
