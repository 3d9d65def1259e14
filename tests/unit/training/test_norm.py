"""Norms of parts in one process; of models in pieces see ``norm_ranks.py``."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from plait.training.norm import clip, parts_of

names = st.lists(st.sampled_from(["a.x", "a.y", "b.x", "b", "c.deep.down"]), min_size=1, unique=True)


@given(names, st.integers(0, 2**20), st.sampled_from([None, 0.1, 1e6]))
def test_squares_of_parts_add_up_to_that_of_the_total(given: list[str], seed: int, largest: float | None) -> None:
    draw = torch.Generator().manual_seed(seed)
    grads = {name: torch.randn(3, 2, generator=draw) * 10 for name in given}
    before = {name: grad.clone() for name, grad in grads.items()}
    norm = clip(grads, largest)
    assert norm.total == float(torch.nn.utils.get_total_norm(before.values()))
    assert math.sqrt(sum(one**2 for one in norm.parts.values())) == pytest.approx(norm.total, rel=1e-6)
    assert list(norm.parts) == parts_of(given)
    for part, one in norm.parts.items():
        own = torch.cat([g.flatten() for n, g in before.items() if n.split(".")[0] == part])
        assert one == pytest.approx(float(own.double().norm()), rel=1e-6)


@pytest.mark.row("S4-60")
def test_a_part_that_is_not_finite_is_named_and_the_others_have_their_norms() -> None:
    grads = {"tower.w": torch.tensor([3.0, 4.0]), "decoder.w": torch.tensor([float("inf")]), "head.w": torch.ones(4)}
    norm = clip(grads, 1.0)
    assert math.isinf(norm.total)
    assert norm.parts == {"tower": 5.0, "decoder": math.inf, "head": 2.0}
    assert torch.equal(grads["tower.w"], torch.tensor([3.0, 4.0]))  # nothing is scaled by what is not finite


def test_a_part_without_a_gradient_in_this_step_has_zero() -> None:
    norm = clip({"decoder.w": torch.ones(4)}, None, parts=["connectors", "decoder"])
    assert norm.parts == {"connectors": 0.0, "decoder": 2.0}
    assert clip({}, 1.0).total == 0.0


def test_number_formats_may_differ() -> None:
    grads = {"a.w": torch.tensor([3.0], dtype=torch.float64), "b.w": torch.tensor([4.0])}
    assert clip(grads, None).total == 5.0
