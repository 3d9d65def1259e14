"""The arithmetic of the benchmark beside TRL: when the work is not the same, medians and ratios, what is chosen."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

pytestmark = pytest.mark.light

SCRIPT = Path(__file__).parents[3] / "benchmarks" / "sft_vs_trl.py"
WORK = {"tokens": 1264, "trained": 190, "loss": 10.985}


@pytest.fixture(scope="module")
def bench() -> Any:
    name = "benchmark_sft_vs_trl"
    spec = importlib.util.spec_from_file_location(name, SCRIPT)
    assert spec is not None
    assert spec.loader is not None
    module: ModuleType = importlib.util.module_from_spec(spec)
    sys.modules[name] = module  # dataclasses look their module up
    try:
        spec.loader.exec_module(module)
        yield module
    finally:
        del sys.modules[name]


def run(speed: float, above: float) -> dict[str, float]:
    return {"samples_per_s": speed, "seconds": 16 / speed, "above": above, "peak": above + 8, "loaded": 8}


@pytest.mark.parametrize(
    ("change", "word"),
    [
        ({"tokens": 1265}, "tokens"),
        ({"trained": 206}, "trained"),
        ({"loss": 11.15}, "loss"),
        ({"loss": float("nan")}, "loss"),
    ],
)
def test_other_work_is_seen(bench: Any, change: dict[str, float], word: str) -> None:
    (why,) = bench.unequal(WORK | change, WORK)
    assert why.startswith(word)


def test_the_same_work_within_bfloat16(bench: Any) -> None:
    assert bench.unequal(WORK, WORK | {"loss": 10.9847}) == []


def test_a_summary_by_hand(bench: Any) -> None:
    runs = {"plait": [run(3.0, 6.0), run(1.0, 60.0), run(2.0, 2.0)], "peer": [run(1.0, 12.0), run(1.0, 12.0)]}
    summary = bench.summarize(runs)
    assert summary["medians"]["plait"]["samples_per_s"] == 2.0
    assert summary["above_range"] == {"plait": [2.0, 60.0], "peer": [12.0, 12.0]}
    assert summary["ratios"] == {"samples_per_s": 2.0, "above": 0.5, "peak": 0.7}
    assert not bench.kept(summary)  # twice as fast is not enough
    assert bench.kept(bench.summarize({"plait": [run(2.5, 6.0)], "peer": [run(1.0, 12.0)]}))
    slow = bench.summarize({"plait": [run(2.4, 1.0)], "peer": [run(1.0, 12.0)]})
    large = bench.summarize({"plait": [run(9.0, 9.0)], "peer": [run(1.0, 12.0)]})
    assert not bench.kept(slow)
    assert not bench.kept(large)
    rows = bench.table({"1 epoch": summary | {"peer": "TRL"}}).splitlines()
    assert len(rows) == 5
    assert {row.count("|") for row in rows} == {7}
    assert "**2.00** | | **0.50** | 0.70" in rows[-1]


def test_loss_curves_are_laid_together(bench: Any) -> None:
    assert bench.apart([10.0, 5.05], [10.0, 5.0]) == pytest.approx(0.01)
    assert bench.apart([10.0], [10.0, 5.0]) == float("inf")


def test_switches_beside_none(bench: Any) -> None:
    rows = bench.switches_table({"nothing off": run(4.0, 8.0), "float32": run(1.0, 16.0)}).splitlines()
    assert rows[-1].startswith("| float32 | 1.00 | 0.25 |")
    assert rows[-1].endswith("| 2.00 |")
    assert next(iter(bench.SWITCHES.values())) == {}


def test_the_peer_is_measured_at_its_fastest(bench: Any) -> None:
    names = list(bench.PEER)
    tried = {name: {"samples_per_s": float(number)} for number, name in enumerate(names)}
    assert bench.fastest(tried) == names[-1]
    assert all(bench.SETTINGS["batch_size"] % peer["micro_batch"] == 0 for peer in bench.PEER.values())
    assert {bench.LEAN, *bench.OTHERS} <= set(bench.PEER)
