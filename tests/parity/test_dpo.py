"""DPO against equation 7 written out by hand, loss and gradient, in float64."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from plait.objectives.preference import preference_loss

LOGPROBS = st.lists(st.tuples(*[st.floats(-60.0, 0.0)] * 4), min_size=1, max_size=7)


def margins(rows: Tensor, beta: float) -> Tensor:
    chosen, rejected, ref_chosen, ref_rejected = rows.unbind(1)
    return beta * ((chosen - ref_chosen) - (rejected - ref_rejected))


@pytest.mark.row("S2-34")
@settings(deadline=None)
@given(rows=LOGPROBS, beta=st.floats(0.01, 2.0))
def test_loss_and_gradient_are_those_of_equation_7(rows: list[tuple[float, ...]], beta: float) -> None:
    logprobs = torch.tensor(rows, dtype=torch.float64, requires_grad=True)
    loss = preference_loss(margins(logprobs, beta))
    # log sigma(m) by the plain formula, in Python's floats; m is the margin.
    by_hand = [beta * ((yes - yes_ref) - (no - no_ref)) for yes, no, yes_ref, no_ref in rows]
    expected = sum(math.log1p(math.exp(-abs(m))) + max(-m, 0.0) for m in by_hand)
    assert float(loss.detach()) == pytest.approx(expected, rel=1e-12, abs=1e-12)
    (gradient,) = torch.autograd.grad(loss, logprobs)
    for row, m in zip(gradient.tolist(), by_hand, strict=True):
        # The paper's gradient (section 4): beta sigma(-m), up for the chosen answer and down for the rejected one.
        pull = beta / (1 + math.exp(m)) if m < 700 else 0.0
        assert row == pytest.approx([-pull, pull, pull, -pull], rel=1e-9, abs=1e-15)


@settings(deadline=None)
@given(rows=LOGPROBS, beta=st.floats(0.01, 2.0))
def test_swapping_the_answers_costs_the_margin(rows: list[tuple[float, ...]], beta: float) -> None:
    """-log sigma(-m) - (-log sigma(m)) = m: what is gained by preferring right is what is lost by preferring wrong."""
    margin = margins(torch.tensor(rows, dtype=torch.float64), beta)
    difference = preference_loss(-margin) - preference_loss(margin)
    torch.testing.assert_close(difference, margin.sum(), rtol=1e-11, atol=1e-11)


def test_no_margin_costs_ln_2_a_pair() -> None:
    assert float(preference_loss(torch.zeros(5, dtype=torch.float64))) == pytest.approx(5 * math.log(2), rel=1e-15)


@pytest.mark.parametrize("margin", [-1e4, 1e4])
def test_far_margins_stay_finite(margin: float) -> None:
    value = torch.tensor([margin], requires_grad=True)
    loss = preference_loss(value)
    (gradient,) = torch.autograd.grad(loss, value)
    assert float(loss.detach()) == max(-margin, 0.0)
    assert float(gradient) == (-1.0 if margin < 0 else 0.0)
