"""Pipelines of several processes: values and gradients of one, measured idle time, activations held, faults."""

from __future__ import annotations

import itertools
from pathlib import Path
from typing import Any

import pytest
from tests.rank_script import cases_of

from plait.training.parallel.order import Span, bubble, idle_share


@pytest.fixture(scope="module")
def cases() -> dict[str, Any]:
    """What the processes of all cases say, as JSON."""
    return cases_of(Path(__file__).with_name("runner_ranks.py"))


@pytest.mark.row("S2-30")
def test_values_and_gradients_of_micro_batches_of_all_shapes_are_those_of_one_process(cases: dict[str, Any]) -> None:
    found = {name: said for name, said in cases.items() if name.startswith(("equal", "frozen"))}
    assert len(found) == 8
    for name, said in found.items():
        for stage, one in enumerate(said):
            assert isinstance(one, dict), (name, said, cases["log"])
            assert one["apart"] == 0, name
            assert one["learns"] == (0 if name.startswith("frozen") and stage < 2 else 2)


@pytest.mark.row("S2-30")
def test_a_stage_of_1f1b_holds_no_more_micro_batches_than_stages_from_it_on(cases: dict[str, Any]) -> None:
    for name, said in cases.items():
        if name.startswith("equal"):
            stages, micro = map(int, name.split()[2:])
            kept = [one["kept"] for one in said]
            expected = [min(micro, stages - stage) for stage in range(stages)] if "1f1b" in name else [micro] * stages
            assert kept == expected, name


@pytest.mark.row("S2-30")
@pytest.mark.row("S2-C14")
def test_measured_idle_time_is_the_bubble_of_the_papers(cases: dict[str, Any]) -> None:
    found = {name: said for name, said in cases.items() if name.startswith("asleep")}
    assert len(found) == 4
    for name, said in found.items():
        stages, micro = map(int, name.split()[2:])
        spans = [Span(*span) for span in said]
        assert len([span for span in spans if span.kind != "wait"]) == 2 * stages * micro
        assert bubble(stages, micro) - 0.02 <= idle_share(spans) <= bubble(stages, micro) + 0.1, name  # + messages
        for one in range(stages):  # one thing at a time
            mine = [span for span in spans if span.stage == one]
            assert all(a.end <= b.start for a, b in itertools.pairwise(mine))


def test_a_fault_of_one_stage_ends_all_with_its_words(cases: dict[str, Any]) -> None:
    own = "the picture is cut off | at sample c3 | fix: take it out"
    other = f"DataError: process 2 of 4: {own}"
    for name in ("1f1b", "gpipe"):
        assert cases[f"fails {name}"] == [other, other, f"DataError: {own}", other], cases["log"]
