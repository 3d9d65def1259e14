"""NT-Xent, supervised contrast and N-pair against loops that write their equations out."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tests.unit.objectives.view_ranks import Tower, views
from torch import Tensor
from torch.nn import functional
from torch.utils._python_dispatch import TorchDispatchMode

from plait.core.errors import ConfigError, DataError
from plait.core.tensors import IGNORE
from plait.objectives.contrastive import match_groups
from plait.objectives.views import (
    NPair,
    NTXent,
    SupervisedContrastive,
    n_pair,
    nt_xent,
    supervised_contrastive,
)


def some(n: int, d: int = 3, seed: int = 0, *, unit: bool = True) -> Tensor:
    found = torch.randn(n, d, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return (functional.normalize(found, dim=1) if unit else found).requires_grad_()


def same_with_gradients(found: Callable[..., Tensor], expected: Callable[..., Tensor], *inputs: Tensor) -> None:
    one, other = found(*inputs), expected(*inputs)
    torch.testing.assert_close(one, other, rtol=1e-12, atol=1e-12)
    for mine, theirs in zip(torch.autograd.grad(one, inputs), torch.autograd.grad(other, inputs), strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-10, atol=1e-12)


# --- NT-Xent -------------------------------------------------------------------------------------------------------


def nt_xent_by_hand(one: Tensor, other: Tensor, *, temperature: float) -> Tensor:
    """SimCLR's equation 1, and its Algorithm 1: l(2k-1, 2k) + l(2k, 2k-1)."""
    z, n = torch.cat([one, other]), len(one)
    total = z.new_zeros(())
    for i in range(2 * n):
        j = (i + n) % (2 * n)
        scores = [(z[i] @ z[k]) / temperature for k in range(2 * n)]
        total = total - torch.log(scores[j].exp() / sum(scores[k].exp() for k in range(2 * n) if k != i))
    return total


@pytest.mark.row("S2-18")
@pytest.mark.row("S2-21")
@given(n=st.integers(2, 5), seed=st.integers(0, 50), temperature=st.sampled_from([0.1, 0.5, 2.0]))
@settings(max_examples=15)
def test_nt_xent_is_its_equation(n: int, seed: int, temperature: float) -> None:
    same_with_gradients(
        lambda a, b: nt_xent(a, b, temperature=temperature),
        lambda a, b: nt_xent_by_hand(a, b, temperature=temperature),
        some(n, seed=seed),
        some(n, seed=seed + 99),
    )


@pytest.mark.row("S2-21")
def test_nt_xent_is_a_cross_entropy_of_torch_over_the_others() -> None:
    one, other = some(6), some(6, seed=1)
    z = torch.cat([one, other])
    scores = (z @ z.T / 0.3)[~torch.eye(12, dtype=torch.bool)].view(12, 11)  # the diagonal taken out
    partner = torch.tensor([i + 6 - 1 for i in range(6)] + list(range(6)))
    expected = functional.cross_entropy(scores, partner, reduction="sum")
    assert nt_xent(one, other, temperature=0.3).item() == pytest.approx(expected.item(), rel=1e-12)


@pytest.mark.row("S2-21")
@pytest.mark.parametrize("n", [2, 3, 40])
@pytest.mark.parametrize("temperature", [0.01, 1.0])
def test_all_alike_cost_the_log_of_the_others(n: int, temperature: float) -> None:
    alike = functional.normalize(torch.ones(n, 4, dtype=torch.float64), dim=1)
    loss = nt_xent(alike, alike, temperature=temperature) / (2 * n)
    assert loss.item() == pytest.approx(math.log(2 * n - 1), rel=1e-12)


@pytest.mark.row("S2-21")
def test_limits_of_the_temperature_and_the_bound_on_information() -> None:
    eye = torch.eye(8, dtype=torch.float64)
    cold, hot = (nt_xent(eye, eye, temperature=t).item() / 16 for t in (1e-3, 1e6))
    assert cold == pytest.approx(0, abs=1e-12)
    assert hot == pytest.approx(math.log(15), abs=1e-5)
    closed = math.log(1 + 14 * math.exp(-1 / 0.5))
    assert nt_xent(eye, eye, temperature=0.5).item() / 16 == pytest.approx(closed, rel=1e-12)
    # log(2N - 1) - loss, the bound on mutual information, is above 0 here and never above log(2N - 1).
    for seed in range(5):
        view = some(8, 5, seed)
        found = math.log(15) - nt_xent(view, view, temperature=0.1).item() / 16
        assert 0 < found <= math.log(15)


@given(n=st.integers(2, 6), seed=st.integers(0, 30))
@settings(max_examples=20)
def test_neither_the_order_of_samples_nor_of_views_matters(n: int, seed: int) -> None:
    one, other = some(n, seed=seed), some(n, seed=seed + 1)
    keys = torch.Generator().manual_seed(seed)
    order, swap = torch.randperm(n, generator=keys), torch.rand(n, 1, generator=keys) < 0.5
    loss = nt_xent(one, other).item()
    assert nt_xent(one[order], other[order]).item() == pytest.approx(loss, rel=1e-12)
    assert nt_xent(one.where(swap, other), other.where(swap, one)).item() == pytest.approx(loss, rel=1e-12)


def test_gradients_are_the_numerical_ones() -> None:
    assert torch.autograd.gradcheck(nt_xent, (some(3), some(3, seed=1)))
    groups = torch.tensor([0, 1, 0, 2, 1])
    assert torch.autograd.gradcheck(lambda x: supervised_contrastive(x, groups), (some(5),))
    assert torch.autograd.gradcheck(
        lambda a, b: n_pair(a, b, groups=groups), (some(5, unit=False), some(5, seed=1, unit=False))
    )


class Largest(TorchDispatchMode):
    """Numbers of the largest tensor that is made."""

    def __init__(self) -> None:
        super().__init__()
        self.size = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        if isinstance(out, Tensor):
            self.size = max(self.size, out.numel())
        return out


def test_no_table_of_all_views_is_ever_there() -> None:
    one, other = some(256), some(256, seed=1)
    with Largest() as whole:
        expected = torch.autograd.grad(nt_xent(one, other), (one, other))
    with Largest() as parts:
        found = torch.autograd.grad(nt_xent(one, other, cells=16 * 512), (one, other))
    assert whole.size == 512**2
    assert parts.size == 16 * 512
    for mine, theirs in zip(found, expected, strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-10, atol=1e-13)


# --- supervised ----------------------------------------------------------------------------------------------------


def supcon_by_hand(vectors: Tensor, groups: list[int], *, temperature: float) -> Tensor:
    """Khosla et al., equation 2; anchors without a positive have no term."""
    total, n = vectors.new_zeros(()), len(groups)
    for i in range(n):
        scores = [(vectors[i] @ vectors[k]) / temperature for k in range(n)]
        below = sum(scores[k].exp() for k in range(n) if k != i)
        positives = [p for p in range(n) if p != i and groups[p] == groups[i]]
        for p in positives:
            total = total - torch.log(scores[p].exp() / below) / len(positives)
    return total


@pytest.mark.row("S2-18")
@given(groups=st.lists(st.integers(0, 3), min_size=3, max_size=9), seed=st.integers(0, 50))
@settings(max_examples=20)
def test_supervised_contrast_is_its_equation(groups: list[int], seed: int) -> None:
    if len(set(groups)) in (1, len(groups)):
        with pytest.raises(DataError):
            supervised_contrastive(some(len(groups)), torch.tensor(groups))
        return
    same_with_gradients(
        lambda x: supervised_contrastive(x, torch.tensor(groups), temperature=0.2),
        lambda x: supcon_by_hand(x, groups, temperature=0.2),
        some(len(groups), seed=seed),
    )


def test_without_classes_supervised_contrast_is_nt_xent() -> None:
    model, batch = Tower(), views([IGNORE] * 5)
    counts = {name: int(c) for loss in (SupervisedContrastive(), NTXent()) for name, c in loss.count(batch).items()}
    assert counts == {"supcon": 5, "nt-xent": 10}
    mean = SupervisedContrastive(temperature=0.3)(model, batch)["supcon"] / 5
    other = NTXent(temperature=0.3)(model, batch)["nt-xent"] / 10
    assert mean.item() == pytest.approx(other.item(), rel=1e-12)


def test_the_mean_is_over_anchors_with_a_positive() -> None:
    """One view a row: the rows of class 7 and of no class are alone."""
    classes = [0, 0, 1, 1, 1, 7, IGNORE]
    loss, model, batch = SupervisedContrastive(temperature=0.4), Tower(), views(classes, each=1)
    found = loss.embed(model, batch)
    groups = match_groups(torch.tensor(classes)).tolist()
    expected = supcon_by_hand(found.vectors["views"], groups, temperature=0.4) / 5
    assert {k: int(v) for k, v in loss.count(batch).items()} == {"supcon": 7}
    assert loss(model, batch)["supcon"].item() / 7 == pytest.approx(expected.item(), rel=1e-12)


# --- N-pair --------------------------------------------------------------------------------------------------------


@pytest.mark.row("S2-18")
@given(groups=st.lists(st.integers(0, 4), min_size=2, max_size=6), seed=st.integers(0, 50))
@settings(max_examples=15)
def test_n_pair_is_its_equation(groups: list[int], seed: int) -> None:
    if len(set(groups)) == 1:
        groups[0] += 1

    def by_hand(a: Tensor, p: Tensor) -> Tensor:
        total, n = a.new_zeros(()), len(groups)
        for i in range(n):
            others = [(a[i] @ p[j] - a[i] @ p[i]).exp() for j in range(n) if groups[j] != groups[i]]
            total = total + torch.log(1 + sum(others))
        return total

    same_with_gradients(
        lambda a, p: n_pair(a, p, groups=torch.tensor(groups)),
        by_hand,
        some(len(groups), seed=seed, unit=False),
        some(len(groups), seed=seed + 1, unit=False),
    )


def test_lengths_are_held_back_where_they_shall_be() -> None:
    batch, model = views([0, 1, 2]), Tower()
    vectors = model(batch)[0]
    assert NPair(shrink=0.5)(model, batch)["length"].item() == pytest.approx(0.5 * vectors.square().sum().item())
    assert NPair(shrink=0.0)(model, batch).keys() == NPair(shrink=0.0).count(batch).keys() == {"n-pair"}
    expected = n_pair(vectors[::2], vectors[1::2]).item()
    assert NPair()(model, batch)["n-pair"].item() == pytest.approx(expected, rel=1e-12)


# --- what is refused -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("loss", [NTXent(), SupervisedContrastive(), NPair()])
def test_a_batch_of_one_is_refused(loss: Any) -> None:
    with pytest.raises(DataError, match="nothing to tell them from"):
        loss(Tower(), views([4]))


@pytest.mark.parametrize("loss", [SupervisedContrastive(), NPair()])
def test_a_batch_of_one_class_is_refused(loss: Any) -> None:
    with pytest.raises(DataError, match="belong together: there is nothing to tell them from"):
        loss(Tower(), views([4, 4, 4]))


def test_no_positive_at_all_is_refused() -> None:
    with pytest.raises(DataError, match="no two of 3 vectors belong together"):
        SupervisedContrastive()(Tower(), views([0, 1, IGNORE], each=1))


@pytest.mark.parametrize("temperature", [0.0, -0.1, math.inf, math.nan, 1e-39, 5e-324])
def test_temperatures_that_overflow_are_refused(temperature: float) -> None:
    for build in (NTXent, SupervisedContrastive):
        with pytest.raises(ConfigError, match="temperature"):
            build(temperature=temperature)
    with pytest.raises(ConfigError, match="temperature"):
        nt_xent(some(2), some(2), temperature=temperature)


def test_the_coldest_temperature_stays_finite_in_float32() -> None:
    one, other = some(4).detach().float().requires_grad_(), some(4, seed=1).detach().float()
    loss = nt_xent(one, other, temperature=1e-30)
    (gradient,) = torch.autograd.grad(loss, one)
    assert loss.isfinite()
    assert gradient.isfinite().all()


@pytest.mark.parametrize("shrink", [-0.1, math.inf, math.nan])
def test_lengths_are_not_made_to_grow(shrink: float) -> None:
    with pytest.raises(ConfigError, match="shrink"):
        NPair(shrink=shrink)


@pytest.mark.parametrize("loss", [NTXent(), NPair()])
def test_a_row_without_two_views_is_named(loss: Any) -> None:
    batch = views([0, 1, 2])
    batch.item_row["image"][-1] = 1
    with pytest.raises(DataError, match="3 views where 2 must be") as caught:
        loss(Tower(), batch)
    assert caught.value.place == "sample s1"


def test_half_precision_is_compared_in_float32() -> None:
    batch = views([IGNORE] * 6)
    pictures = replace(batch.media["image"], values=batch.media["image"].values.float())
    model, loss = Tower().float(), NTXent(temperature=0.01)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = loss.embed(model, replace(batch, media={"image": pictures}))
        inside = loss.loss(found)["nt-xent"]
    assert found.vectors["views"].dtype == inside.dtype == torch.float32
    assert inside.item() == loss.loss(found)["nt-xent"].item()
