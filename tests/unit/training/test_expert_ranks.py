"""Processes that divide experts end where one does, go on from each other's checkpoints, and fail alike."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from benchmarks.layouts import BOUNDS
from tests.rank_script import Case, case_of

from plait.core.grid import Grid
from plait.training.trainer import Parallel, Trainer


@pytest.fixture(scope="module")
def case(tmp_path_factory: pytest.TempPathFactory) -> Case:
    """What the processes of a case say."""
    return case_of(Path(__file__).with_name("expert_ranks.py"), str(tmp_path_factory.mktemp("experts")))


@pytest.mark.row("S4-68")
def test_processes_that_divide_experts_end_where_one_does(case: Case) -> None:
    found = case("equal")
    log = found.pop("log")
    for name, apart in found.items():
        assert all(isinstance(one, float) and one <= BOUNDS["float64"] for one in apart), (name, apart, log)
        assert len(set(apart)) == 1, f"{name}: processes end apart: {apart}"
    assert len(found) == 4


@pytest.mark.row("S4-68")
def test_unequal_micro_batches_and_a_process_without_a_trained_token_change_nothing(case: Case) -> None:
    found = case("uneven")
    assert found["kept"] == ["kept"], found["log"]
    assert all(isinstance(one, float) and one <= BOUNDS["float64"] for one in found["apart"]), found


@pytest.mark.row("S4-68")
def test_a_run_goes_on_in_another_layout_with_its_average(case: Case) -> None:
    found = case("resumed")
    log = found.pop("log")
    assert found.pop("through") == ["kept"], log
    for name, (first, then) in found.items():
        assert set(first) == {"part"}, (name, first, log)
        for resumed, apart in then:
            assert resumed == ["resumed at step 3 of 5"], name
            assert apart <= BOUNDS["float64"], name
    assert len(found) == 2


def test_each_process_holds_its_experts_alone(case: Case) -> None:
    found = case("held")["held"]
    assert found == [[[[2, 32, 16], [2, 32, 32]], 0]] * 4  # two of four experts; the caller's model is empty


def test_hooks_see_whole_experts_in_the_first_process_alone(case: Case) -> None:
    found = case("shown")
    assert found["shown"] == [[11, True, True], [0, True, None]], found["log"]


def test_a_fault_of_one_process_ends_the_others_that_wait_for_its_tokens(case: Case) -> None:
    found = case("faults")
    log = found.pop("log")
    own = "the picture is cut off | at sample c3 | fix: take it out"
    for said in found.values():
        assert said == [f"DataError: process 1 of 2: {own}", f"DataError: {own}"], log


def test_what_cannot_be_divided_is_refused_by_all(case: Case) -> None:
    found = case("refused")
    log = found.pop("log")
    causes = {
        "plain": "ConfigError: MultimodalLM has no layers with experts",
        "three": "ConfigError: 3 experts over 2 processes",
        "shares": "ConfigError: 4 processes are to divide the experts, and there are 2 data shares",
    }
    for name, cause in causes.items():
        assert [one.split(" | ")[0] for one in found[name]] == [cause] * 2, log


@pytest.mark.parametrize("other", [{"zero": 1}, {"zero": 3}, {"tensor": 2}])
def test_other_cuts_of_the_same_weights_are_refused(other: dict[str, int]) -> None:
    (name,) = other
    with pytest.raises(ValueError, match=f"expert is 2 and {name} is {other[name]}"):
        Parallel.model_validate({"expert": 2} | other)


@pytest.mark.parametrize(
    ("setting", "said"),
    [
        ({"optimizer": {"kind": "muon"}}, "optimizer.kind is muon"),
        ({"compile": True}, "compile is true"),
        ({"async_save": True}, "async_save is true"),
    ],
)
def test_what_needs_whole_weights_is_refused(setting: dict[str, Any], said: str) -> None:
    with pytest.raises(ValueError, match=said):
        Trainer.model_validate({"parallel": {"expert": 2}} | setting)


@pytest.mark.parametrize("dimension", ["tensor", "pipeline", "context", "expert"])
def test_one_process_goes_on_alone_with_what_several_divided(dimension: str) -> None:
    assert Parallel.model_validate({dimension: 4}).grid(0, 1) == Grid.of(0, 1)


def test_what_divides_data_alone_divides_no_experts() -> None:
    assert Parallel(expert=4).data_only() == Parallel()
