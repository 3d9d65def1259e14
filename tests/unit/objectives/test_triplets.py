"""Triplets against torch's losses over every triplet written out, and mining against loops."""

from __future__ import annotations

import math
from functools import partial
from typing import Any

import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from tests.unit.objectives.test_views import Largest, same_with_gradients, some
from tests.unit.objectives.view_ranks import Tower, views
from torch import Tensor, nn

from plait.core.errors import ConfigError, DataError
from plait.core.tensors import IGNORE
from plait.objectives.triplets import Mining, Triplet, active_triplets, all_triplets, triplet

MININGS: tuple[Mining, ...] = ("all", "semi-hard", "hard")
MARGIN = 0.6


def mined(vectors: Tensor, groups: list[int], mining: Mining) -> list[tuple[int, int, int]]:
    """Anchor, positive and negative of each triplet, by the words of the papers."""
    d = torch.cdist(vectors.detach(), vectors.detach(), compute_mode="donot_use_mm_for_euclid_dist").tolist()
    found, every = [], range(len(groups))
    for a in every:
        positives = [p for p in every if p != a and groups[p] == groups[a]]
        negatives = [n for n in every if groups[n] != groups[a]]
        if mining == "hard" and positives:
            found.append((a, max(positives, key=d[a].__getitem__), min(negatives, key=d[a].__getitem__)))
        for p in positives if mining != "hard" else []:
            if mining == "all":
                found += [(a, p, n) for n in negatives]
                continue
            farther = [n for n in negatives if d[a][n] > d[a][p]]
            found.append(
                (a, p, min(farther, key=d[a].__getitem__) if farther else max(negatives, key=d[a].__getitem__))
            )
    return found


def of_torch(vectors: Tensor, triplets: list[tuple[int, int, int]], *, squared: bool, reduction: str = "sum") -> Tensor:
    a, p, n = (vectors[[t[at] for t in triplets]] for at in range(3))
    if squared:
        loss: Any = nn.TripletMarginWithDistanceLoss(
            distance_function=lambda x, y: (x - y).square().sum(1), margin=MARGIN, reduction=reduction
        )
    else:
        loss = nn.TripletMarginLoss(margin=MARGIN, eps=0.0, reduction=reduction)
    return loss(a, p, n)


@st.composite
def some_groups(draw: Any) -> list[int]:
    groups = draw(st.lists(st.integers(0, 3), min_size=3, max_size=9))
    assume(1 < len(set(groups)) < len(groups))
    return groups


@pytest.mark.row("S2-18")
@pytest.mark.row("S2-24")
@pytest.mark.parametrize("squared", [True, False])
@pytest.mark.parametrize("mining", MININGS)
@given(groups=some_groups(), seed=st.integers(0, 50))
@settings(max_examples=20)
def test_triplets_are_those_of_torch(mining: Mining, squared: bool, groups: list[int], seed: int) -> None:
    vectors, numbers = some(len(groups), seed=seed), torch.tensor(groups)
    triplets = mined(vectors, groups, mining)
    same_with_gradients(
        lambda x: triplet(x, numbers, margin=MARGIN, mining=mining, squared=squared),
        lambda x: of_torch(x, triplets, squared=squared),
        vectors,
    )
    assert int(all_triplets(numbers, mining=mining)) == len(triplets)
    hinges = of_torch(vectors, triplets, squared=squared, reduction="none")
    found = active_triplets(vectors, numbers, margin=MARGIN, mining=mining, squared=squared)
    assert int(found) == int((hinges > 0).sum())


@pytest.mark.row("S2-24")
def test_a_negative_exactly_as_far_as_the_positive_is_not_beyond_it() -> None:
    """Whole numbers on a line: distances are exact, and so are ties."""
    of = partial(triplet, margin=10.0, mining="semi-hard", squared=False, anchors=torch.tensor([0]))
    groups = torch.tensor([0, 0, 1, 1])
    for places, taken in (
        ([0, 2, 2, 5], 5),  # one as far as the positive, one beyond: that one
        ([0, 2, -2, 1], 2),  # as far, and nearer: none is beyond, so the farthest, which is as far
        ([0, 2, -2, -2], 2),  # both as far
        ([0, 2, 3, 5], 3),  # both beyond: the nearer
        ([0, 0, 0, 4], 4),  # all in one place but one
        ([0, 0, 0, 0], 0),  # all in one place
    ):
        points = torch.tensor(places, dtype=torch.float64)[:, None]
        assert of(points, groups).item() == 10 + abs(places[1]) - taken, places


@pytest.mark.row("S2-24")
@given(
    places=st.lists(st.integers(-2, 2), min_size=4, max_size=8),
    groups=st.lists(st.integers(0, 2), min_size=8, max_size=8),
    mining=st.sampled_from(MININGS),
)
@settings(max_examples=60)
def test_values_and_counts_hold_where_distances_tie(places: list[int], groups: list[int], mining: Mining) -> None:
    groups = groups[: len(places)]
    assume(1 < len(set(groups)) < len(groups))
    points, numbers = torch.tensor(places, dtype=torch.float64)[:, None], torch.tensor(groups)
    hinges = [
        max(0.0, abs(places[a] - places[p]) - abs(places[a] - places[n]) + 1.0)
        for a, p, n in mined(points, groups, mining)
    ]
    how: dict[str, Any] = {"margin": 1.0, "mining": mining, "squared": False}
    assert triplet(points, numbers, **how).item() == sum(hinges)
    assert int(active_triplets(points, numbers, **how)) == sum(hinge > 0 for hinge in hinges)


@pytest.mark.row("S2-24")
def test_of_negatives_equally_far_the_first_one_has_the_gradient() -> None:
    points = torch.tensor([0.0, 1.0, 2.0, -2.0, 2.0], dtype=torch.float64)[:, None].requires_grad_()
    groups = torch.tensor([0, 0, 1, 2, 3])
    how: dict[str, Any] = {"margin": 10.0, "squared": False, "anchors": torch.tensor([0])}
    (semi,) = torch.autograd.grad(triplet(points, groups, mining="semi-hard", **how), points)
    assert semi[:, 0].tolist() == [0.0, 1.0, -1.0, 0.0, 0.0]  # the anchor: -1 for its positive, +1 for its negative
    (hard,) = torch.autograd.grad(triplet(points, groups, mining="hard", **how), points)
    third = 1 / 3
    assert hard[1:, 0].tolist() == pytest.approx([1.0, -third, third, -third])


@pytest.mark.row("S2-24")
@pytest.mark.parametrize("mining", MININGS)
def test_gradients_are_the_numerical_ones(mining: Mining) -> None:
    groups = torch.tensor([0, 1, 0, 2, 1, 0])
    assert torch.autograd.gradcheck(lambda x: triplet(x, groups, margin=MARGIN, mining=mining), (some(6, unit=False),))


@pytest.mark.row("S2-24")
@pytest.mark.parametrize("mining", MININGS)
@pytest.mark.parametrize("average", ["all", "active"])
def test_the_term_is_a_mean_over_triplets(mining: Mining, average: Any) -> None:
    model, batch = Tower(), views([0, 0, IGNORE, 1, 1])
    loss = Triplet(margin=MARGIN, mining=mining, average=average)
    vectors = nn.functional.normalize(model(batch)[0], dim=1)
    triplets = mined(vectors, [0, 0, 0, 0, 9, 9, 1, 1, 1, 1], mining)
    hinges = of_torch(vectors, triplets, squared=True, reduction="none")
    right = hinges.mean() if average == "all" else hinges[hinges > 0].mean()
    assert {name: int(count) for name, count in loss.count(batch).items()} == {"triplet": 5}
    assert loss(model, batch)["triplet"].item() / 5 == pytest.approx(right.item(), rel=1e-12)


@pytest.mark.parametrize("average", ["all", "active"])
def test_where_all_is_in_order_there_is_nothing_to_learn(average: Any) -> None:
    class Apart(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.eye = nn.Parameter(torch.eye(3, dtype=torch.float64).repeat_interleave(2, 0))

        def forward(self, batch: Any) -> Any:
            return self.eye, batch.item_row["image"]

    model = Apart()
    loss = Triplet(mining="all", average=average)(model, views([0, 1, 2]))["triplet"]
    loss.backward()
    assert loss.item() == 0
    assert model.eye.grad is not None
    assert not model.eye.grad.any()


def test_the_number_of_triplets_does_not_grow_the_memory() -> None:
    vectors, groups = some(96), torch.arange(96) // 8
    with Largest() as held:
        torch.autograd.grad(triplet(vectors, groups), vectors)
    assert int(all_triplets(groups)) == 96 * 7 * 88
    assert held.size <= 96 * 97


def test_collapsed_vectors_cost_the_margin() -> None:
    """All in one point, every triplet costs the margin; there is no slope to leave it by, so mining must avoid it."""
    x = torch.ones(6, 3, dtype=torch.float64, requires_grad=True)
    for mining in MININGS:
        groups = torch.tensor([0, 0, 1, 1, 2, 2])
        loss = triplet(x, groups, margin=MARGIN, mining=mining)
        assert loss.item() == pytest.approx(MARGIN * int(all_triplets(groups, mining=mining)))
        assert not torch.autograd.grad(loss, x)[0].any()


@pytest.mark.parametrize("mining", MININGS)
def test_what_is_no_number_is_not_hidden(mining: Mining) -> None:
    """Not even in a negative, which is never chosen."""
    x = some(6, unit=False).detach().clone()
    x[5, 0] = math.nan
    assert triplet(x, torch.tensor([0, 0, 0, 1, 1, 2]), mining=mining).isnan()


# --- what is refused -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("mining", MININGS)
@pytest.mark.parametrize(
    ("batch", "match"),
    [
        (views([4]), "nothing to tell them from"),
        (views([4, 4, 4]), "nothing to tell them from"),
        (views([0, 1, IGNORE], each=1), "no two of 3 vectors"),
    ],
)
def test_batches_without_a_triplet_are_refused(mining: Mining, batch: Any, match: str) -> None:
    with pytest.raises(DataError, match=match):
        Triplet(mining=mining)(Tower(), batch)


@pytest.mark.parametrize("margin", [0.0, -1.0, math.inf, math.nan])
def test_margins_that_are_none_are_refused(margin: float) -> None:
    with pytest.raises(ConfigError, match="margin"):
        Triplet(margin=margin)
