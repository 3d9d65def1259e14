"""A model cut into stages ends where one process does, in every grid; its checkpoints, hooks, faults and refusals."""

from __future__ import annotations

from pathlib import Path

import pytest
from benchmarks.layouts import BOUNDS
from hypothesis import given
from hypothesis import strategies as st
from tests.rank_script import Case, case_of

from plait.training.parallel.deal import divided


@pytest.fixture(scope="module")
def case(tmp_path_factory: pytest.TempPathFactory) -> Case:
    """What the processes of a case say."""
    return case_of(Path(__file__).with_name("pipeline_ranks.py"), str(tmp_path_factory.mktemp("stages")))


@pytest.mark.row("S2-29")
@pytest.mark.row("S2-30")
@pytest.mark.row("S4-67")
def test_stages_end_where_one_process_does(case: Case) -> None:
    found = case("equal")
    log = found.pop("log")
    for name, apart in found.items():
        bound = next(limit for form, limit in BOUNDS.items() if form in name)
        assert all(isinstance(one, float) and one <= bound for one in apart), (name, apart, log)
        assert len(set(apart)) == 1, f"{name}: processes end apart: {apart}"
    assert len(found) == 6


@pytest.mark.row("S2-30")
def test_whatever_learns_and_however_it_is_cut(case: Case) -> None:
    found = case("cuts")
    log = found.pop("log")
    for name, apart in found.items():
        assert all(isinstance(one, float) and one <= 1e-12 for one in apart), (name, apart, log)
        assert len(set(apart)) == 1, f"{name}: copies of a table are no copies: {apart}"
    assert len(found) == 8


@pytest.mark.row("S2-31")
def test_a_run_goes_on_with_a_buffer_that_one_stage_has(case: Case) -> None:
    found = case("buffers")
    assert found["said"] == [["done", "done"]] * 2, found["log"]


@pytest.mark.row("S2-31")
def test_a_run_goes_on_in_another_layout_after_every_step(case: Case) -> None:
    found = case("resumed")
    log = found.pop("log")
    assert found.pop("through") == ["kept"], log
    *before, last = found.items()
    for done, (name, ranks) in enumerate(before):
        assert ranks == [[f"resumed at step {done} of {done + 1}"] if done else []] * len(ranks), (name, log)
    for said, apart in last[1]:
        assert said == ["resumed at step 4 of 5"], log
        assert apart <= BOUNDS["float64"], log
    assert [len(ranks) for ranks in found.values()] == [1, 4, 1, 4, 3]


@pytest.mark.row("S4-66")
def test_rows_of_weights_are_moved_to_the_bits_of_whole_ones_with_a_part_of_the_state(case: Case) -> None:
    found = case("rows")
    held = {
        "whole": ([9, 9, 6, 6], 15),
        "short": ([2, 2, 0, 0], 2),
        "scalar": ([1] * 4, 1),
        "channels last": ([24] * 4, 24),
        "by outputs": ([6] * 4, 24),
        "by inputs": ([8, 8, 4, 4], 24),
        "uneven words": ([6] * 4, 12),  # three words of two processes each: not dealt out further
        "bias": ([2, 2, 1, 1], 3),
    }
    for name, (mine, whole) in held.items():
        assert [one[name] for one in found["said"]] == [[True, count, whole] for count in mine], (name, found["log"])


def test_a_loss_that_is_not_finite_in_one_last_stage_is_left_out_in_all_which_name_its_samples(case: Case) -> None:
    said = case("skipped")["said"]
    weights, _, (warning,) = said[0]
    for other, _, warnings in said:
        assert other == weights
        assert warnings == [warning]
    assert warning.startswith("step 3: loss nan")
    assert warning.endswith(f"samples {', '.join(said[-1][1])}")


def test_hooks_see_the_whole_model_in_the_first_process_alone(case: Case) -> None:
    found = case("shown")
    log = found.pop("log")
    for name, (first, *others) in found.items():
        assert first["seen"] == 11, log  # five steps, three evaluations, three checkpoints
        assert first["whole"], name
        assert first["last"] == [True], name
        for other in others:
            assert other["seen"] == 0, name
            assert other["left"] == first["left"], name


def test_a_fault_of_one_stage_ends_all_with_its_words_and_leaves_the_last_checkpoint(case: Case) -> None:
    found = case("faults")
    own = "the picture is cut off | at sample c3 | fix: take it out"
    assert found["said"] == [f"DataError: process 1 of 2: {own}", f"DataError: {own}"], found["log"]
    assert found["saved"] == ["000001", "000002"]


def test_what_does_not_go_with_stages_is_refused_with_the_reason(case: Case) -> None:
    found = case("refused")
    reasons = {
        "too many": "4 stages, and the decoder has 3 blocks",
        "odd": "2 processes cannot be divided into pipeline 3",
        "blocks": "2 + 2 blocks for 2 stages, and the decoder has 3 blocks",
        "weights": "Weighted has weights of its own",
        "twice": "the objective runs the model more than once for a micro-batch",
        "pairs": "DualEncoder cannot be cut into stages",
        "no plan": "MultimodalLM has no language model whose family says how it is cut",
    }
    for name, reason in reasons.items():
        assert all(said.startswith("ConfigError: ") and reason in said for said in found[name]), (name, found)


@pytest.mark.row("S2-C14")
def test_a_run_keeps_the_measured_timeline_of_a_step(case: Case) -> None:
    found = case("timeline")
    record = found["record"]
    assert record == {
        "step": 2,
        "schedule": "1f1b",
        "stages": 2,
        "micro_batches": 2,
        "idle": found["idle"],
        "bubble": pytest.approx(1 / 3),
    }
    assert found["spans"] == 2 * 2 * 2 + 4  # forward and backward of each; a wait for each message
    assert [len(said) for said in found["said"]] == [1, 0]
    assert found["said"][0][0].startswith("pipeline of 2 stages, 2 micro-batches: idle for ")


@given(st.lists(st.integers(1, 9).map(float), min_size=1, max_size=7), st.data())
def test_blocks_are_cut_so_that_the_largest_load_is_smallest(loads: list[float], data: st.DataObject) -> None:
    stages = data.draw(st.integers(1, len(loads)))
    before, after = (float(data.draw(st.integers(0, 9))) for _ in (1, 2))

    def largest(parts: list[range]) -> float:
        each = [sum(loads[number] for number in part) for part in parts]
        each[0] += before
        each[-1] += after
        return max(each)

    def ways(first: int, left: int) -> list[list[range]]:
        if left == 1:
            return [[range(first, len(loads))]]
        ends = range(first + 1, len(loads) - left + 2)
        return [[range(first, end), *rest] for end in ends for rest in ways(end, left - 1)]

    parts = divided(loads, stages, before=before, after=after)
    assert [number for part in parts for number in part] == list(range(len(loads)))
    assert all(parts)
    assert largest(parts) == min(map(largest, ways(0, stages)))
