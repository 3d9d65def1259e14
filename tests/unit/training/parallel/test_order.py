"""Orders of a pipeline's stages: bubbles by the papers' formula, activations counted, the order that torch runs."""

from __future__ import annotations

import itertools
from fractions import Fraction
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.distributed.pipelining import schedules as torchs

from plait.training.parallel.order import SCHEDULES, Action, bubble, idle_share, most_kept, simulated

NAMES = sorted(SCHEDULES)
stages_and_micro = st.tuples(st.integers(1, 6), st.integers(1, 12))
dyadic = st.integers(1, 64).map(lambda number: number / 8)  # of which sums are exact


@pytest.mark.row("S2-30")
@pytest.mark.row("S2-C14")
@pytest.mark.parametrize("name", NAMES)
@given(stages_and_micro, dyadic, dyadic)
def test_equal_stages_are_idle_for_exactly_the_share_of_the_papers(
    name: str, sizes: tuple[int, int], forward: float, backward: float
) -> None:
    stages, micro = sizes
    spans = simulated(SCHEDULES[name], forward=[forward] * stages, backward=[backward] * stages, micro=micro)
    length = max(span.end for span in spans)
    idle = stages * length - sum(span.end - span.start for span in spans if span.kind != "wait")
    assert length == (micro + stages - 1) * (forward + backward)
    assert Fraction(idle) / Fraction(stages * length) == Fraction(stages - 1, micro + stages - 1)
    assert idle_share(spans) == pytest.approx(bubble(stages, micro), abs=1e-15)


@pytest.mark.row("S2-30")
@given(stages_and_micro)
def test_1f1b_keeps_no_more_micro_batches_than_stages_from_here_on_and_gpipe_all(sizes: tuple[int, int]) -> None:
    stages, micro = sizes
    for stage in range(stages):
        assert most_kept(SCHEDULES["1f1b"](stage, stages, micro)) == min(micro, stages - stage)
        assert most_kept(SCHEDULES["gpipe"](stage, stages, micro)) == micro


@pytest.mark.parametrize("name", NAMES)
@given(stages_and_micro, st.data())
def test_any_times_end_and_each_pass_comes_after_what_it_needs(
    name: str, sizes: tuple[int, int], data: st.DataObject
) -> None:
    stages, micro = sizes
    draw = st.lists(dyadic, min_size=stages, max_size=stages)
    spans = simulated(SCHEDULES[name], forward=data.draw(draw), backward=data.draw(draw), micro=micro)
    at = {(span.stage, Action(span.kind, span.micro)): span for span in spans if span.kind != "wait"}
    assert len(at) == 2 * stages * micro
    for (stage, action), span in at.items():
        other = stage - 1 if action.kind == "forward" else stage + 1
        if (other, action) in at:
            assert at[other, action].end <= span.start
        if action.kind == "backward":
            assert at[stage, Action("forward", action.micro)].end <= span.start
    for stage in range(stages):  # with its waits, a stage's time has no gap and no overlap
        mine = [span for span in spans if span.stage == stage]
        assert mine[0].start == 0
        assert all(one.end == other.start for one, other in itertools.pairwise(mine))


class Recorded:
    """A stage of torch's that computes nothing and tells what it was asked for."""

    def __init__(self, stage: int, stages: int) -> None:
        self.stage_index, self.num_stages = stage, stages
        self.is_first, self.is_last = stage == 0, stage == stages - 1
        self.order: list[Action] = []

    def forward_one_chunk(self, micro: int, *_: Any, **__: Any) -> torch.Tensor:
        self.order.append(Action("forward", micro))
        return torch.zeros(())

    def backward_one_chunk(self, micro: int, **_: Any) -> None:
        self.order.append(Action("backward", micro))

    def __getattr__(self, name: str) -> Any:
        if name.startswith(("get_", "perform_")):
            return lambda *_: []
        raise AttributeError(name)


@pytest.mark.row("S2-30")
@pytest.mark.parametrize(("name", "kind"), [("gpipe", torchs.ScheduleGPipe), ("1f1b", torchs.Schedule1F1B)])
@given(st.integers(1, 5), st.integers(0, 7))
def test_the_order_is_the_one_torch_runs(name: str, kind: Any, stages: int, more: int) -> None:
    micro = stages + more  # torch's 1F1B wants as many micro-batches as stages
    for number in range(stages):
        stage = Recorded(number, stages)
        theirs = kind.__new__(kind)
        theirs.__dict__ |= {"_stage": stage, "_n_microbatches": micro, "_num_stages": stages, "scale_grads": False}
        theirs._initialize_stage = lambda *_: None
        theirs._has_backward, theirs._loss_fn, theirs._internal_losses = False, None, []
        theirs._step_microbatches([()] * micro, [{}] * micro)
        assert SCHEDULES[name](number, stages, micro) == stage.order


def test_a_schedule_whose_stages_wait_for_each_other_is_an_error() -> None:
    def backward_first(_: int, __: int, micro: int) -> list[Action]:
        return [Action("backward", k) for k in range(micro)]

    with pytest.raises(ValueError, match="wait for each other"):
        simulated(backward_first, forward=[1.0, 1.0], backward=[1.0, 1.0], micro=2)
    with pytest.raises(ValueError, match="stage 2 of 2"):
        SCHEDULES["1f1b"](2, 2, 1)
    assert idle_share([]) == 0
