"""Losses by distance against loops and torch's own, and what the margin is there for."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable
from itertools import combinations, pairwise
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tests.unit.objectives.test_views import same_with_gradients, some
from tests.unit.objectives.view_ranks import Tower, naive, views
from torch import Tensor
from torch.nn import functional

from plait.core.errors import ConfigError, DataError
from plait.core.tensors import IGNORE
from plait.objectives.margins import MarginContrastive, NaiveContrastive, margin_contrastive, naive_contrastive

MARGIN = 1.7


def by_hand(vectors: Tensor, groups: list[int], *, margin: float) -> tuple[Tensor, Tensor]:
    """Hadsell et al., equation 4, with Y = 0 for pairs that match."""
    together = apart = vectors.new_zeros(())
    for i, j in combinations(range(len(groups)), 2):
        distance = torch.linalg.vector_norm(vectors[i] - vectors[j])
        if groups[i] == groups[j]:
            together = together + distance**2 / 2
        else:
            apart = apart + functional.relu(margin - distance) ** 2 / 2
    return together, apart


@pytest.mark.row("S2-18")
@given(groups=st.lists(st.integers(0, 3), min_size=2, max_size=8), seed=st.integers(0, 50))
@settings(max_examples=20)
def test_margin_contrast_is_its_equation(groups: list[int], seed: int) -> None:
    for at in range(2):
        same_with_gradients(
            lambda x, at=at: margin_contrastive(x, torch.tensor(groups), margin=MARGIN)[at],
            lambda x, at=at: by_hand(x, groups, margin=MARGIN)[at] + 0 * x.sum(),
            some(len(groups), seed=seed, unit=False),
        )


@pytest.mark.row("S2-18")
def test_pairs_that_do_not_match_are_torchs_hinge() -> None:
    """HingeEmbeddingLoss of the distances, of the squared hinge's root: the same pairs lie inside the margin."""
    x, groups = some(7, unit=False), torch.arange(7)
    distances = torch.pdist(x)
    hinges = functional.hinge_embedding_loss(distances, -torch.ones(21), margin=MARGIN, reduction="none")
    apart = margin_contrastive(x, groups, margin=MARGIN)[1]
    assert apart.item() == pytest.approx((hinges.square() / 2).sum().item(), rel=1e-12)
    together = margin_contrastive(x, torch.zeros(7, dtype=torch.long), margin=MARGIN)[0]
    assert together.item() == pytest.approx((distances.square() / 2).sum().item(), rel=1e-12)


@pytest.mark.row("S2-19")
@given(groups=st.lists(st.integers(0, 3), min_size=2, max_size=8), seed=st.integers(0, 50))
@settings(max_examples=15)
def test_the_naive_objective_is_its_equation(groups: list[int], seed: int) -> None:
    def equation(x: Tensor) -> Tensor:
        total = 0 * x.sum()
        for i, j in combinations(range(len(groups)), 2):
            square = (x[i] - x[j]).square().sum()
            total = total + (square if groups[i] == groups[j] else -square)
        return total

    same_with_gradients(
        lambda x: naive_contrastive(x, torch.tensor(groups)), equation, some(len(groups), seed=seed, unit=False)
    )


def test_gradients_are_the_numerical_ones() -> None:
    groups = torch.tensor([0, 1, 0, 2, 1])
    inputs = (some(5, unit=False),)
    assert torch.autograd.gradcheck(lambda x: margin_contrastive(x, groups, margin=MARGIN), inputs)
    assert torch.autograd.gradcheck(lambda x: naive_contrastive(x, groups), inputs)


@pytest.mark.row("S2-19")
def test_the_naive_objective_diverges_and_the_margin_holds() -> None:
    """The same points, the same descent: one falls without end, the other comes to rest at a value from 0."""
    groups = torch.arange(8) // 2

    def descend(loss: Callable[[Tensor], Tensor]) -> list[float]:
        x, values = some(8, 2, unit=False).detach().requires_grad_(), []
        for _ in range(60):
            value = loss(x)
            values.append(value.item())
            (gradient,) = torch.autograd.grad(value, x)
            x = (x - 0.1 * gradient).detach().requires_grad_()
        return values

    falling = descend(lambda x: naive_contrastive(x, groups) / 28)
    assert all(later < before for before, later in pairwise(falling))
    assert falling[-1] < -1e3
    assert falling[-1] - falling[-2] < 10 * (falling[10] - falling[9])  # faster and faster
    held = descend(lambda x: margin_contrastive(x, groups).sum() / 4)
    assert all(0 <= value <= held[0] for value in held)
    assert held[-1] < 0.05 * held[0]


@pytest.mark.row("S2-19")
def test_who_builds_the_naive_objective_is_warned() -> None:
    with pytest.warns(UserWarning, match="no minimum: it falls without end"):
        NaiveContrastive()


def test_vectors_that_are_equal_have_a_gradient_that_is_a_number() -> None:
    x = torch.ones(4, 3, dtype=torch.float64, requires_grad=True)
    together, apart = margin_contrastive(x, torch.tensor([0, 0, 1, 1]))
    (gradient,) = torch.autograd.grad(together + apart, x)
    assert apart.item() == pytest.approx(4 / 2)
    assert not gradient.any()


# --- what is averaged ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("unit", [False, True])
def test_each_term_is_a_mean_over_its_pairs_or_over_all(unit: bool) -> None:
    model, batch = Tower(), views([0, 0, IGNORE, 1])
    x = model(batch)[0]
    x = functional.normalize(x, dim=1) if unit else x
    together, apart = by_hand(x, [0, 0, 0, 0, 9, 9, 1, 1], margin=MARGIN)  # two views a row
    for average, pairs in (("kind", (8, 20)), ("pairs", (28, 28))):
        loss = MarginContrastive(margin=MARGIN, average=average, unit=unit)
        counts = {name: int(count) for name, count in loss.count(batch).items()}
        assert counts == {"together": 4, "apart": 4}
        found = {name: value.item() / counts[name] for name, value in loss(model, batch).items()}
        expected = {"together": together.item() / pairs[0], "apart": apart.item() / pairs[1]}
        assert found == pytest.approx(expected, rel=1e-12)
    total = naive()(model, views([0, 0, IGNORE, 1]))["naive"].item() / 4
    plain = naive_contrastive(model(batch)[0], torch.tensor([0, 0, 0, 0, 9, 9, 1, 1])).item()
    assert total == pytest.approx(plain / 28, rel=1e-12)


# --- what is refused -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("loss", [MarginContrastive(), naive()])
@pytest.mark.parametrize(
    ("batch", "match"),
    [
        (views([4]), "nothing to tell them from"),
        (views([4, 4, 4]), "nothing to tell them from"),
        (views([0, 1, IGNORE], each=1), "no two of 3 vectors"),
    ],
)
def test_batches_without_a_comparison_are_refused(loss: Any, batch: Any, match: str) -> None:
    with pytest.raises(DataError, match=match):
        loss(Tower(), batch)


@pytest.mark.parametrize("margin", [0.0, -1.0, math.inf, math.nan])
def test_margins_that_are_none_are_refused(margin: float) -> None:
    with pytest.raises(ConfigError, match="margin"):
        MarginContrastive(margin=margin)
    with pytest.raises(ConfigError, match="margin"):
        margin_contrastive(some(3), torch.tensor([0, 0, 1]), margin=margin)


def test_the_warning_is_the_only_one() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        MarginContrastive()
