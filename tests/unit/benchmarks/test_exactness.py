"""The gradient of a step is that of the whole batch, however it is computed: the bounds of the published table."""

from __future__ import annotations

import importlib.util
import json
import sys
from pathlib import Path
from typing import Any

import pytest

SCRIPT = Path(__file__).parents[3] / "benchmarks" / "exactness.py"


@pytest.fixture(scope="module")
def exactness() -> Any:
    spec = importlib.util.spec_from_file_location("benchmark_exactness", SCRIPT)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # dataclasses look their module up
    spec.loader.exec_module(module)
    return module


@pytest.mark.row("S2-26")
def test_every_way_gives_the_gradient_of_the_whole_batch(exactness: Any) -> None:
    records = exactness.measure()
    assert len(records) == len(exactness.ways())
    for record in records:
        assert record["from_reference"] <= exactness.BOUNDS[record["format"]], record
    # What makes them comparable: formats do differ from float64, by their own rounding.
    assert min(r["from_float64"] for r in records if r["format"] == "bfloat16") > 1e-4


def test_another_loss_is_told_apart(exactness: Any) -> None:
    """A wrong way is far beyond the bounds: one token more that is trained."""
    way = exactness.Way(dtype="float64")
    right = exactness.gradient(way)
    plain = exactness.conversations

    def other() -> Any:
        from dataclasses import replace

        first, *rest = plain()
        trained = (*first.rendered.trained[:-1], not first.rendered.trained[-1])
        return [replace(first, rendered=replace(first.rendered, trained=trained)), *rest]

    exactness.conversations = other
    try:
        wrong = exactness.gradient(way)
    finally:
        exactness.conversations = plain
    assert float((wrong - right).norm() / right.norm()) > 1e-3


def test_the_published_table_is_of_these_ways(exactness: Any) -> None:
    published = json.loads(exactness.RESULTS.read_text(encoding="utf-8"))
    assert [(r["format"], r["way"]) for r in published["rows"]] == [(w.dtype, str(w)) for w in _in_order(exactness)]
    assert published["bounds"] == exactness.BOUNDS


def _in_order(exactness: Any) -> list[Any]:
    return [way for dtype in exactness.FORMATS for way in exactness.ways() if way.dtype == dtype]
