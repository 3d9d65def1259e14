"""Triplets: an anchor nearer to what it belongs to than to what it does not, by a margin.

FaceNet (Schroff et al., https://arxiv.org/abs/1503.03832, equation 3; semi-hard mining in section 3.2), batch-all and
batch-hard (Hermans et al., https://arxiv.org/abs/1703.07737).

Triplets are formed within the whole batch, whatever micro-batches and processes its rows come from. How many there are
is no sum over micro-batches, so the count of the term is the rows of the batch, and its sum is the mean over triplets
times these rows: what the loop divides is that mean, exactly. Batches and models are those of
:mod:`plait.objectives.grouped`.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Literal

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn
from torch.nn import functional

from plait.core.tensors import Batch, Embedded
from plait.objectives.contrastive import CELLS
from plait.objectives.grouped import check_groups, counted, embed_views, groups_of, items_of, sizes_of, with_partner
from plait.objectives.margins import check_choice, check_margin, over_distances

Mining = Literal["all", "semi-hard", "hard"]
"""Which triplets are taken."""


def triplet(
    vectors: Float[Tensor, "n d"],
    groups: Int[Tensor, " n"],
    *,
    margin: float = 0.2,
    mining: Mining = "all",
    squared: bool = True,
    anchors: Int[Tensor, " a"] | None = None,
    cells: int = CELLS,
) -> Float[Tensor, ""]:
    """``sum max(0, D(a, p) - D(a, n) + margin)`` over triplets of anchor, positive (same group) and negative.

    ``all``: every triplet. ``semi-hard``: for each anchor and positive the nearest negative that is farther than the
    positive; where none is, the farthest. ``hard``: for each anchor its farthest positive and its nearest negative.
    Where several are equally far, they share the gradient (``hard``), or the first one has it (``semi-hard``).

    A table of n x n distances is sorted; triplets are never written out.

    Args:
        vectors: Of unit length in FaceNet.
        groups: Equal numbers match.
        margin: How much nearer a positive has to be.
        mining: Which triplets are taken.
        squared: D is the squared Euclidean distance, as in FaceNet; else the distance.
        anchors: Which vectors are anchors; all by default. One without a positive has no triplet.
        cells: Distances that are held at once.

    Raises:
        DataError: All are of one group, or no two are.
        ConfigError: The margin is not a number above 0, or there is no such mining.

    Example:
        >>> points = torch.tensor([[0.0], [1.0], [1.5]])  # 1 - 2.25 + 2, and 1 - 0.25 + 2
        >>> triplet(points, torch.tensor([0, 0, 1]), margin=2.0).item()
        3.5
    """
    hinges = _hinges(margin, mining)

    def between(d: Tensor, same: Tensor, other: Tensor) -> Tensor:
        return hinges(d.square() if squared else d, same, other)[0]

    check_groups(groups)
    return over_distances(between, vectors, groups, anchors=with_partner(groups, anchors), cells=cells)


@torch.no_grad()
def active_triplets(
    vectors: Float[Tensor, "n d"],
    groups: Int[Tensor, " n"],
    *,
    margin: float = 0.2,
    mining: Mining = "all",
    squared: bool = True,
    cells: int = CELLS,
) -> Int[Tensor, ""]:
    """How many triplets of :func:`triplet` are above 0; arguments and errors as there."""
    hinges = _hinges(margin, mining)

    def between(d: Tensor, same: Tensor, other: Tensor) -> Tensor:
        return hinges(d.square() if squared else d, same, other)[1]

    check_groups(groups)
    return over_distances(between, vectors, groups, anchors=with_partner(groups), cells=cells)


def all_triplets(groups: Int[Tensor, " n"], *, mining: Mining = "all") -> Int[Tensor, ""]:
    """How many triplets :func:`triplet` sums over, those of value 0 among them.

    Example:
        >>> groups = torch.tensor([0, 0, 0, 1])  # 3 anchors, 2 positives each, 1 negative
        >>> [int(all_triplets(groups, mining=kind)) for kind in ("all", "semi-hard", "hard")]
        [6, 6, 3]
    """
    sizes = sizes_of(groups)  # of each anchor's group: so many less one positives
    if mining == "hard":
        return (sizes > 1).sum()
    return ((sizes - 1) * (len(groups) - sizes)).sum() if mining == "all" else (sizes - 1).sum()


class Triplet:
    """Objective: triplets within the whole batch; one term ``triplet``, a mean over triplets times the rows.

    Args:
        margin: See :func:`triplet`.
        mining: Which triplets are taken. FaceNet takes semi-hard ones: hard ones from the start may draw all vectors
            into one point.
        average: ``all``: the mean over the triplets taken, whose number the classes tell. ``active``: over those above
            0, which are counted anew in each step, over the whole batch (as batch-all is used by Hermans et al.: late
            in training most are 0). No gradient goes through that number, which changes by jumps.
        squared: See :func:`triplet`.
        unit: Whether vectors are set to length 1.
        cells: Distances that are held at once.

    Raises:
        ConfigError: The margin is not a number above 0, or there is no such mining or average.
    """

    needs_global_batch = True

    def __init__(
        self,
        *,
        margin: float = 0.2,
        mining: Mining = "semi-hard",
        average: Literal["all", "active"] = "all",
        squared: bool = True,
        unit: bool = True,
        cells: int = CELLS,
    ) -> None:
        _hinges(margin, mining)
        check_choice("average", average, ("all", "active"))
        self.margin, self.average = margin, average
        self.mining: Mining = mining
        self.squared, self.unit, self.cells = squared, unit, cells

    def count(self, batch: Batch) -> Mapping[str, Tensor]:
        """Rows."""
        return counted(batch, "triplet")

    def embed(self, model: nn.Module, batch: Batch) -> Embedded:
        """Vectors of all views."""
        return embed_views(model, batch, unit=self.unit)

    def loss(self, found: Embedded, *, rows: range | None = None) -> Mapping[str, Tensor]:
        """The share of some rows, as anchors, in the mean, times all rows.

        Raises:
            DataError: All are of one group, or no two are.
        """
        groups, vectors = groups_of(found), found.vectors["views"]
        own = items_of(found.row_of["views"], rows)
        total = triplet(
            vectors,
            groups,
            margin=self.margin,
            mining=self.mining,
            squared=self.squared,
            anchors=own,
            cells=self.cells,
        )
        return {"triplet": total * (found.rows / self._number(vectors, groups))}

    def _number(self, vectors: Tensor, groups: Tensor) -> int:
        if self.average == "all":
            return int(all_triplets(groups, mining=self.mining))
        found = active_triplets(
            vectors, groups, margin=self.margin, mining=self.mining, squared=self.squared, cells=self.cells
        )
        return max(1, int(found))  # where none is above 0, so is the sum

    def __call__(self, model: nn.Module, batch: Batch) -> Mapping[str, Tensor]:
        """The mean over triplets, times the rows."""
        return self.loss(self.embed(model, batch))


Hinges = Callable[[Tensor, Tensor, Tensor], tuple[Tensor, Tensor]]
"""Sum of some anchors' triplets, and how many are above 0, from their distances and which are positives, negatives."""


def _hinges(margin: float, mining: str) -> Hinges:
    check_margin(margin)
    check_choice("mining", mining, ("all", "semi-hard", "hard"))
    of = {"all": _every, "semi-hard": _semi_hard, "hard": _hardest}[mining]
    return lambda d, same, other: of(d, same, other, margin=margin)


def _every(
    d: Float[Tensor, "a n"], same: Bool[Tensor, "a n"], other: Bool[Tensor, "a n"], *, margin: float
) -> tuple[Tensor, Tensor]:
    """With k negatives nearer than reach = D(a, p) + margin, their hinges are ``k reach - sum of their D(a, n)``."""
    ranked, order = _ranked(d, other)
    reach = d + margin
    nearer = torch.searchsorted(ranked, reach.detach().contiguous())
    known = other.gather(1, order)
    sums = d.gather(1, order).masked_fill(~known, 0).cumsum(1)
    sums = functional.pad(sums, (1, 0)).gather(1, nearer)
    total = (nearer * reach - sums).masked_fill(~same, 0).sum()
    return total, nearer.masked_fill(~same, 0).sum()


def _semi_hard(
    d: Float[Tensor, "a n"], same: Bool[Tensor, "a n"], other: Bool[Tensor, "a n"], *, margin: float
) -> tuple[Tensor, Tensor]:
    ranked, order = _ranked(d, other)
    farther = torch.searchsorted(ranked, d.detach().contiguous(), right=True)
    chosen = order.gather(1, farther.minimum(other.sum(1, keepdim=True) - 1))
    hinges = (d + margin - d.gather(1, chosen)).clamp(min=0).masked_fill(~same, 0)
    return hinges.sum(), (hinges > 0).sum()


def _hardest(
    d: Float[Tensor, "a n"], same: Bool[Tensor, "a n"], other: Bool[Tensor, "a n"], *, margin: float
) -> tuple[Tensor, Tensor]:
    far, near = d.masked_fill(~same, -math.inf).amax(1), d.masked_fill(~other, math.inf).amin(1)
    hinges = (far - near + margin).clamp(min=0)
    return hinges.sum(), (hinges > 0).sum()


def _ranked(d: Float[Tensor, "a n"], other: Bool[Tensor, "a n"]) -> tuple[Tensor, Tensor]:
    """Distances of negatives in ascending order, others last as infinite; and whose they are."""
    found = d.detach().masked_fill(~other, math.inf).sort(dim=1, stable=True)
    return found.values, found.indices
