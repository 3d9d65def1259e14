"""Training in several processes equals training in one, in every layout; and what happens when one of them fails."""

from __future__ import annotations

from pathlib import Path

import pytest
from benchmarks.layouts import BOUNDS
from tests.rank_script import Case, case_of


@pytest.fixture(scope="module")
def case(tmp_path_factory: pytest.TempPathFactory) -> Case:
    """What the processes of a case say."""
    return case_of(Path(__file__).with_name("fit_ranks.py"), str(tmp_path_factory.mktemp("ranks")))


@pytest.mark.row("S2-28")
@pytest.mark.row("S4-66")
def test_several_processes_end_where_one_does(case: Case) -> None:
    found = case("equal")
    log = found.pop("log")
    for name, apart in found.items():
        bound = next(limit for form, limit in BOUNDS.items() if form in name)
        assert all(isinstance(one, float) and one <= bound for one in apart), (name, apart, log)
        assert len(set(apart)) == 1, f"{name}: processes end apart: {apart}"
    assert len(found) > 10


@pytest.mark.row("S2-31")
@pytest.mark.row("S4-66")
def test_a_run_goes_on_with_another_number_of_processes_in_another_layout(case: Case) -> None:
    found = case("resumed")
    log = found.pop("log")
    assert found.pop("through") == ["kept"], log
    for name, (first, then) in found.items():
        assert set(first) == {"part"}, (name, first, log)
        for resumed, apart in then:
            assert resumed == ["resumed at step 3 of 5"], name
            assert apart <= BOUNDS["float64"], name
    assert len(found) == 5


def test_a_fault_of_one_process_ends_all_with_its_words_and_leaves_the_last_checkpoint(case: Case) -> None:
    found = case("faults")
    log = found.pop("log")
    said = {name: one["said"] for name, one in found.items()}
    own = "the picture is cut off | at sample c3 | fix: take it out"
    for name in ("refused", "refused in pieces"):
        assert said[name] == [f"DataError: process 1 of 2: {own}", f"DataError: {own}"], log
    for name in ("killed", "killed in pieces"):
        assert said[name][1] == "killed"
        assert said[name][0].startswith("ResourceError: another of 2 processes is gone, and said nothing: ")
        assert "fix: it was killed" in said[name][0]
    bug = "AttributeError: no such thing"
    assert said["bug"] == [f"PlaitError: process 1 of 2: {bug}", bug]
    assert said["stopped"] == ["Stopped: stopped after step 2 of 5, which is saved"] * 2
    for name, one in found.items():
        assert one["saved"] == ["000001", "000002"], name
        assert one["s"] < 60, name


def test_a_fault_before_the_processes_have_made_their_groups_ends_all(case: Case) -> None:
    found = case("begun")
    own = "no batch | at step 0 | fix: check that the data set is not empty and the batch not larger than it"
    assert found["said"] == [f"DataError: process 1 of 2: {own}", f"DataError: {own}"], found["log"]
    assert found["s"] < 60


def test_a_loss_that_is_not_finite_in_one_process_is_left_out_in_all_which_name_its_samples(case: Case) -> None:
    found = case("skipped")
    del found["log"]
    for name, (first, second) in found.items():
        assert first[0] == second[0], name
        (warning,) = first[2]
        assert second[2] == [warning]
        assert warning.startswith("step 3: loss nan")
        assert warning.endswith(f"samples {', '.join(second[1])}")


@pytest.mark.row("S4-60")
def test_memory_that_runs_out_in_one_process_makes_all_take_smaller_pieces(case: Case) -> None:
    found = case("guarded")
    (first, told, far), (second, also, _) = found["memory, ZeRO-0"]
    assert first == second
    assert len(told) == len(also) == 2  # three rows: in halves, then one by one
    assert all(text.startswith("step 3: memory ran out (in another process); done again") for text in told)
    assert also[0].startswith("step 3: memory ran out (CUDA out of memory.)")
    assert far <= BOUNDS["float64"]
    # Where passes wait for each other, nobody can do one again: it ends with what to do.
    for name in ("memory, ZeRO-2", "memory, tensor 2"):
        assert all("processes pass in step here" in said and "micro_batch" in said for said in found[name]), name


def test_a_spike_of_one_process_is_left_out_or_taken_back_in_all(case: Case) -> None:
    found = case("guarded")
    for name in ("skip", "rewind"):
        (first, told), (second, also) = found[name]
        assert first == second, name
        assert told == also, name
        assert told[0].startswith("step 25: ")
        assert "update left out" in told[0]
        assert "samples 24:" in told[0]
    for name in ("rewind", "rewind, tensor 2"):
        assert found[name][0][1][1].startswith("went back to the weights of step 24"), name
        assert found[name][0] == found[name][1], name


def test_hooks_see_the_whole_model_in_the_first_process_alone(case: Case) -> None:
    found = case("shown")
    log = found.pop("log")
    for name, (first, second) in found.items():
        assert isinstance(first, dict), (name, first, second, log)
        assert first["seen"] == 11, log  # five steps, three evaluations, three checkpoints
        assert first["whole"], name
        assert first["last"] == [True], name
        assert second["seen"] == 0, name
        assert first["left"] == second["left"], name
        assert second["whole"], name


@pytest.mark.row("S4-66")
def test_a_process_without_a_picture_or_all_of_them_hold_nobody_up_and_change_nothing(case: Case) -> None:
    found = case("lacking")
    log = found.pop("log")
    assert len(found) == 4
    for name, apart in found.items():
        assert all(isinstance(one, float) and one <= BOUNDS["float64"] for one in apart), (name, apart, log)


def test_processes_that_begin_unlike_are_made_alike_or_refused(case: Case) -> None:
    found = case("unlike")
    (first, said), (second, _) = found["weights"]
    assert first == second
    assert said == ["process 1 began with other trained weights than process 0, and takes those"]
    assert [text.split(" | ")[0] for text in found["frozen"]] == [
        "CheckpointError: process 1 has other frozen weights than process 0"
    ] * 2
    assert [text.split(" | ")[0] for text in found["settings"]] == [
        "ConfigError: process 1 has other settings than process 0"
    ] * 2
