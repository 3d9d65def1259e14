"""The benchmark of several processes: fresh ones that train and count, sent bytes as in closed form, its arithmetic."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path
from typing import Any

import pytest

SCRIPT = Path(__file__).parents[3] / "benchmarks" / "scaling.py"


@pytest.fixture(scope="module")
def scaling() -> Any:
    spec = importlib.util.spec_from_file_location("benchmark_scaling", SCRIPT)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # dataclasses look their module up
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize(
    "zero", [pytest.param(0, marks=pytest.mark.row("S2-28")), pytest.param(3, marks=pytest.mark.row("S4-66"))]
)
def test_two_processes_send_what_the_closed_form_says(scaling: Any, zero: int) -> None:
    way = scaling.Way(processes=2, zero=zero)
    ranks = scaling.run(scaling.SIZES["5 M"], way, steps=1, warm=1)
    assert len(ranks) == 2
    for rank in ranks:
        assert rank["micro_batches"] == 2
        expected = scaling.sent_by_formula(rank, way)["gloo"]
        assert rank["written"] == pytest.approx(expected, rel=0.005)
        assert 0 < rank["busy_s"] <= rank["step_s"]
        assert rank["peak"] - rank["before"] > scaling.zero_bytes(rank["weights"], world=2, stage=zero)["optimizer"]
    # Headers and other programs of this machine come on top.
    assert ranks[0]["loopback"] > sum(rank["written"] for rank in ranks) * 0.99


@pytest.mark.parametrize(
    "dimension",
    [
        pytest.param("tensor", marks=pytest.mark.row("S2-29")),
        pytest.param("sequence", marks=pytest.mark.row("S4-65")),
        pytest.param("pipeline", marks=pytest.mark.row("S2-30")),
        pytest.param("context", marks=pytest.mark.row("S4-65")),
    ],
)
def test_two_processes_that_divide_send_what_the_closed_form_says(scaling: Any, dimension: str) -> None:
    grid = {"tensor": 2, "sequence": True} if dimension == "sequence" else {dimension: 2}
    way = scaling.Way(processes=2, grid=grid)
    ranks = scaling.run(scaling.SIZES["5 M"], way, steps=1, warm=1)
    sent = max(rank["written"] for rank in ranks)
    assert sent == pytest.approx(scaling.sent_by_formula(ranks[0], way)["gloo"], rel=0.02)
    whole = ranks[0]["weights"]
    assert all(rank["held"] <= (whole if dimension == "context" else 0.9 * whole) for rank in ranks)


def test_a_process_that_fails_is_told(scaling: Any) -> None:
    wrong = scaling.Size(width=256, inner=688, layers=4, heads=3, steps=1)  # 256 is no multiple of 3
    with pytest.raises(SystemExit, match=r"1 of 1 processes failed.*\n"):
        scaling.run(wrong, scaling.Way(), steps=1)


def test_a_summary_by_hand(scaling: Any) -> None:
    way = scaling.Way(processes=4, zero=2)

    def ranks(step: float, above: int) -> list[dict[str, Any]]:
        own = {"step_s": step, "busy_s": 0.25, "cpu_s": 0.3, "written": 7.0, "loopback": 30.0, "before": 100}
        own |= {"peak_start": 150, "peak": 100 + above, "weights": 10, "weights_in_blocks": 6, "micro_batches": 1}
        return [own | {"peak": 100 + above + rank} for rank in range(4)]

    found = scaling.summary(
        "5 M", way, runs=[ranks(1.0, 60), ranks(3.0, 80), ranks(2.0, 70)], live=ranks(9, 40), cores=2
    )
    assert found["layout"] == "ZeRO-2"
    assert (found["step_s"], found["step_s_range"], found["tokens_per_s"]) == (2.0, [1.0, 3.0], 256.0)
    assert found["waits"] == pytest.approx(0.75)  # the second of four that two cores could have worked
    assert [rank["above"] for rank in found["ranks"]] == [70, 71, 72, 73]
    assert [rank["live_above"] for rank in found["ranks"]] == [40, 41, 42, 43]
    assert found["states"] == 40 + 10 + 20
    assert found["sent_by_formula"] == {"ring": 60, "gloo": 90}  # 3/4 of 40 bytes, gathered and summed
    rows = scaling.table([found]).splitlines()
    assert len({row.count("|") for row in rows}) == 1


def test_utilization_by_hand(scaling: Any) -> None:
    run = {"step_s": 2.0, "busy_s": 1.9, "cpu_s": 2.0, "written": 0, "loopback": 0, "before": 1, "peak": 2}
    run |= {"peak_start": 2, "weights": 10, "weights_in_blocks": 6, "micro_batches": 4, "flops": 1e9, "gemm_rate": 1e9}
    found = scaling.summary("5 M", scaling.Way(), runs=[[run]], live=[run], cores=2)
    assert found["mfu"] == 0.5
    assert found["waits"] is found["sent_by_formula"] is None
    assert scaling.utilization_table([found]).splitlines()[-1].endswith("| 0.50 |")
    assert len({row.count("|") for row in scaling.table([found]).splitlines()}) == 1


def test_every_layout_is_measured(scaling: Any) -> None:
    assert [str(way) for way in scaling.ways(2)][:4] == ["alone", "alone", "data parallel", "ZeRO-1"]
    assert len(set(scaling.ways(1))) == 1 + 2 * (4 + 3) + 2  # and tensor with pipeline, in 4, and with sequence
    assert all(scaling.ROWS % way.processes == 0 for way in scaling.ways(2))
