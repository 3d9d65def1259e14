"""Hard negatives against the equations written out in plain exponentials, and what they become at the ends."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tests.unit.objectives.test_views import same_with_gradients, some
from tests.unit.objectives.view_ranks import Tower, views
from tests.unit.training.pairwise_model import dual, pairs
from torch import Tensor
from torch.nn import functional

from plait.core.errors import ConfigError, DataError
from plait.core.tensors import IGNORE
from plait.objectives.contrastive import Contrastive
from plait.objectives.hardness import HardContrastive, HardNTXent, hard_nce
from plait.objectives.views import NTXent


def by_hand(
    z: Tensor, partner: list[int], groups: list[int], *, hardness: float, prior: float, temperature: float
) -> Tensor:
    """The paper's objective for each view, with weights that have mean 1 over the negatives."""
    total, n = z.new_zeros(()), len(partner)
    for i in range(n):
        positive = (z[i] @ z[partner[i]] / temperature).exp()
        negatives = [(z[i] @ z[j] / temperature).exp() for j in range(n) if groups[j] != groups[i]]
        weights = [x**hardness for x in negatives]
        mean = sum(weights) / len(weights)
        reweighted = sum(w / mean * x for w, x in zip(weights, negatives, strict=True))
        estimate = (reweighted - prior * len(negatives) * positive) / (1 - prior)
        estimate = estimate.clamp(min=len(negatives) * math.exp(-1 / temperature))
        total = total - torch.log(positive / (positive + estimate))
    return total


@pytest.mark.row("S4-51")
@given(
    classes=st.lists(st.integers(0, 2), min_size=2, max_size=5),
    seed=st.integers(0, 50),
    hardness=st.sampled_from([0.0, 0.5, 2.0]),
    prior=st.sampled_from([0.0, 0.1, 0.6]),
)
@settings(max_examples=40)
def test_hard_negatives_are_their_equation(classes: list[int], seed: int, hardness: float, prior: float) -> None:
    if len(set(classes)) == 1:
        classes = [9, *classes[1:]]
    rows = len(classes)
    groups, partner = [c for c in classes for _ in "ab"], [i ^ 1 for i in range(2 * rows)]

    def found(z: Tensor) -> Tensor:
        own, kinds = torch.tensor(partner), torch.tensor(groups)
        different = kinds[:, None] != kinds
        return hard_nce(z @ z.T / 0.5, own, different, hardness=hardness, prior=prior, lowest=-2.0)

    same_with_gradients(
        found,
        lambda z: by_hand(z, partner, groups, hardness=hardness, prior=prior, temperature=0.5),
        some(2 * rows, seed=seed),
    )


def test_the_objective_over_views_takes_the_other_view_for_its_positive() -> None:
    model, batch = Tower(), views([0, 1, IGNORE, 0])
    z = functional.normalize(model(batch)[0], dim=1)
    expected = by_hand(z, [1, 0, 3, 2, 5, 4, 7, 6], [0, 0, 1, 1, 9, 9, 0, 0], hardness=1.5, prior=0.05, temperature=0.4)
    loss = HardNTXent(hardness=1.5, prior=0.05, temperature=0.4)
    assert {k: int(v) for k, v in loss.count(batch).items()} == {"hard-nt-xent": 8}
    assert loss(model, batch)["hard-nt-xent"].item() == pytest.approx(expected.item(), rel=1e-12)


@pytest.mark.row("S4-51")
def test_without_hardness_it_is_the_plain_loss() -> None:
    model, batch = Tower(), views([IGNORE] * 6)
    plain = NTXent(temperature=0.3)(model, batch)["nt-xent"]
    assert HardNTXent(hardness=0.0, temperature=0.3)(model, batch)["hard-nt-xent"].item() == pytest.approx(
        plain.item(), rel=1e-12
    )
    two, (of_pairs,) = dual(), pairs().step_batches(0)
    of_pairs.labels.fill_(IGNORE)
    found = HardContrastive(hardness=0.0)(two, of_pairs)
    assert {k: v.item() for k, v in found.items()} == pytest.approx(
        {k: v.item() for k, v in Contrastive()(two, of_pairs).items()}, rel=1e-12
    )


@pytest.mark.row("S4-51")
def test_the_nearest_negative_gets_a_larger_share_of_the_gradient() -> None:
    logits = torch.tensor([[2.0, 1.5, 0.5, -1.0]], dtype=torch.float64, requires_grad=True)
    own, different = torch.tensor([0]), torch.tensor([[False, True, True, True]])
    shares = []
    for hardness in (0.0, 1.0, 4.0):
        (gradient,) = torch.autograd.grad(hard_nce(logits, own, different, hardness=hardness), logits)
        shares.append((gradient[0, 1] / gradient[0, 1:].clamp(min=0).sum()).item())
    assert shares == sorted(shares)
    assert shares[-1] > 0.95 > shares[0]


@pytest.mark.row("S4-51")
def test_the_guard_leaves_duplicates_where_they_are() -> None:
    """Two rows of one class with one vector: told apart by no gradient, as they would be without the classes."""
    vectors = functional.normalize(torch.randn(6, 3, generator=torch.Generator().manual_seed(0)), dim=1).double()
    logits = vectors.requires_grad_() @ vectors.T / 0.5
    own = torch.tensor([1, 0, 3, 2, 5, 4])
    for kinds, pushed in (([0, 0, 1, 1, 1, 1], False), ([0, 0, 1, 1, 2, 2], True)):
        different = torch.tensor(kinds)[:, None] != torch.tensor(kinds)
        loss = hard_nce(logits, own, different, hardness=2.0)
        (gradient,) = torch.autograd.grad(loss, logits, retain_graph=True)
        assert bool(gradient[2, 4] > 0) == pushed


@pytest.mark.row("S4-51")
@pytest.mark.parametrize("prior", [0.0, 0.1])
def test_pairs_of_one_class_are_no_negatives(prior: float) -> None:
    """Written out for pairs; a pair of an unknown class is a negative of every other."""
    classes = [0, 0, 1, IGNORE, IGNORE]
    (batch,) = pairs(batch_size=len(classes)).step_batches(0)
    batch.labels[:, 0] = torch.tensor(classes)
    objective = HardContrastive(hardness=1.5, prior=prior)
    found = objective.embed(dual(), batch)
    image, text = (found.vectors[side].detach().requires_grad_() for side in ("image", "text"))
    scale = found.factors["scale"].item()
    expected = image.new_zeros(())
    for own, other in ((image, text), (text, image)):
        for i, kind in enumerate(classes):
            negatives = [j for j, c in enumerate(classes) if j != i and (c != kind or c == IGNORE)]
            positive = (scale * own[i] @ other[i]).exp()
            scores = torch.stack([(scale * own[i] @ other[j]).exp() for j in negatives])
            weights = scores**1.5 / (scores**1.5).mean()
            estimate = ((weights * scores).sum() - prior * len(negatives) * positive) / (1 - prior)
            estimate = estimate.clamp(min=len(negatives) * math.exp(-scale))
            expected = expected - torch.log(positive / (positive + estimate)) / 2
    known = type(found)(
        vectors={"image": image, "text": text},
        row_of={side: found.row_of[side] for side in ("image", "text")},
        classes=found.classes,
        factors={"scale": found.factors["scale"].detach()},
    )
    total = objective.loss(known)["contrastive"]
    assert total.item() == pytest.approx(expected.item(), rel=1e-12)
    for one, other in zip(
        torch.autograd.grad(total, [image, text]), torch.autograd.grad(expected, [image, text]), strict=True
    ):
        torch.testing.assert_close(one, other, rtol=1e-10, atol=1e-14)
    alone = torch.autograd.grad(objective.loss(known, rows=range(1))["contrastive"], [image, text])
    # Of the first pair alone, nothing goes to the vectors of the second one, which is of its class.
    assert [gradient[1].abs().max().item() for gradient in alone] == [0.0, 0.0]
    assert all(bool(gradient[2].abs().max() > 0) for gradient in alone)


def test_large_scores_do_not_overflow() -> None:
    logits = torch.tensor([[900.0, 880.0, -900.0], [-900.0, 900.0, 899.0]], requires_grad=True)
    different = torch.tensor([[False, True, True], [False, True, True]])
    for prior in (0.0, 0.1):
        loss = hard_nce(logits, torch.tensor([0, 0]), different, hardness=2.0, prior=prior, lowest=-900.0)
        (gradient,) = torch.autograd.grad(loss, logits)
        assert loss.isfinite()
        assert gradient.isfinite().all()


@pytest.mark.parametrize("prior", [0.0, 0.1])
def test_gradients_are_the_numerical_ones(prior: float) -> None:
    own, kinds = torch.tensor([1, 0, 3, 2, 5, 4]), torch.tensor([0, 0, 1, 1, 0, 0])
    assert torch.autograd.gradcheck(
        lambda z: hard_nce(z @ z.T, own, kinds[:, None] != kinds, hardness=0.7, prior=prior, lowest=-9.0), (some(6),)
    )


# --- what is refused -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("classes", [[4], [4, 4, 4]])
def test_batches_without_a_negative_are_refused(classes: list[int]) -> None:
    with pytest.raises(DataError, match="nothing to tell them from"):
        HardNTXent()(Tower(), views(classes))
    (batch,) = pairs(batch_size=len(classes)).step_batches(0)
    batch.labels.fill_(4)
    with pytest.raises(DataError, match="nothing to tell them from"):
        HardContrastive()(dual(), batch)


def test_a_sound_that_is_the_only_one_costs_nothing() -> None:
    (batch,) = pairs(batch_size=13).step_batches(0)
    first = [i for i, row in enumerate(batch.item_row["audio"].tolist()) if row == batch.item_row["audio"][0]]
    loss, model = HardContrastive(), dual()
    found = loss.embed(model, batch)
    row_of = {**found.row_of, "audio": found.row_of["audio"][first]}
    vectors = {**found.vectors, "audio": found.vectors["audio"][first]}
    terms = loss.loss(type(found)(vectors=vectors, row_of=row_of, classes=found.classes, factors=found.factors))
    assert terms["contrastive-image-audio"].item() == 0
    assert terms["contrastive"].item() > 0


@pytest.mark.parametrize("how", [{"hardness": -0.1}, {"hardness": math.inf}, {"prior": 1.0}, {"prior": -0.1}])
def test_what_is_out_of_range_is_refused(how: dict[str, Any]) -> None:
    for build in (HardNTXent, HardContrastive):
        with pytest.raises(ConfigError, match=next(iter(how))):
            build(**how)
