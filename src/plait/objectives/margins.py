"""Contrast by distance: a margin between what belongs together and what does not.

Margin contrast (Hadsell, Chopra and LeCun, "Dimensionality reduction by learning an invariant mapping", CVPR 2006,
equation 4) and, for teaching, the same without a margin, which has no minimum.

Every vector of the batch is compared with every other, whatever micro-batches and processes they come from. How many
pairs there are is no sum over micro-batches, so the count of each term is the rows of the batch, and its sum is the
mean named below times these rows: what the loop divides is that mean, exactly. Batches and models are those of
:mod:`plait.objectives.grouped`.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Mapping
from typing import Literal

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from plait.core.errors import ConfigError
from plait.core.tensors import Batch, Embedded
from plait.objectives.contrastive import CELLS, sum_in_blocks
from plait.objectives.grouped import (
    check_groups,
    counted,
    embed_views,
    exactly,
    groups_of,
    items_of,
    sizes_of,
    wide,
)


def margin_contrastive(
    vectors: Float[Tensor, "n d"],
    groups: Int[Tensor, " n"],
    *,
    margin: float = 1.0,
    anchors: Int[Tensor, " a"] | None = None,
    cells: int = CELLS,
) -> Float[Tensor, "2"]:
    """Hadsell's loss of all pairs i < j: ``sum 1/2 D^2`` where they match, ``sum 1/2 max(0, margin - D)^2`` elsewhere.

    D is the Euclidean distance. The second sum has no gradient where two vectors are equal (D = 0).

    Args:
        vectors: Of any length.
        groups: Equal numbers match.
        margin: Beyond this distance, what does not match is left alone.
        anchors: Only the shares of these vectors, half of each of their pairs; all by default.
        cells: Distances that are held at once.

    Raises:
        ConfigError: The margin is not a number above 0.

    Example:
        >>> margin_contrastive(torch.tensor([[0.0], [2.0], [0.5]]), torch.tensor([0, 0, 1])).tolist()  # 4/2, .5^2/2
        [2.0, 0.125]
    """
    check_margin(margin)

    def between(d: Tensor, same: Tensor, other: Tensor) -> Tensor:
        near = (margin - d).clamp(min=0).square().masked_fill(~other, 0).sum()
        return torch.stack([d.square().masked_fill(~same, 0).sum(), near]) / 4

    return over_distances(between, vectors, groups, anchors=anchors, cells=cells)


def naive_contrastive(
    vectors: Float[Tensor, "n d"],
    groups: Int[Tensor, " n"],
    *,
    anchors: Int[Tensor, " a"] | None = None,
    cells: int = CELLS,
) -> Float[Tensor, ""]:
    """Over pairs i < j: ``sum D^2`` where they match, minus ``sum D^2`` elsewhere. For teaching only.

    It has no minimum: twice as long vectors give four times the value, so where it is negative it falls without end.

    Args:
        vectors: Of any length.
        groups: Equal numbers match.
        anchors: Only the shares of these vectors, half of each of their pairs; all by default.
        cells: Distances that are held at once.
    """

    def between(d: Tensor, same: Tensor, other: Tensor) -> Tensor:
        return d.square().masked_fill(~same, 0).sum() / 2 - d.square().masked_fill(~other, 0).sum() / 2

    return over_distances(between, vectors, groups, anchors=anchors, cells=cells)


class MarginContrastive:
    """Objective: margin contrast, terms ``together`` and ``apart``: what matches, and what does not.

    Each is a mean over its own pairs (or over all pairs, as in the paper, where a few that match weigh little among
    many that do not), times the rows; how many pairs there are is told by the classes of the whole batch. The loop's
    weights of terms weigh one against the other.

    Args:
        margin: See :func:`margin_contrastive`.
        average: ``kind``: each term over its own pairs; ``pairs``: both over all pairs.
        unit: Whether vectors are set to length 1, so that no distance is above 2.
        cells: Distances that are held at once.

    Raises:
        ConfigError: The margin is not a number above 0, or there is no such average.
    """

    needs_global_batch = True

    def __init__(
        self,
        *,
        margin: float = 1.0,
        average: Literal["kind", "pairs"] = "kind",
        unit: bool = False,
        cells: int = CELLS,
    ) -> None:
        check_margin(margin)
        check_choice("average", average, ("kind", "pairs"))
        self.margin, self.average, self.unit, self.cells = margin, average, unit, cells

    def count(self, batch: Batch) -> Mapping[str, Tensor]:
        """Rows."""
        return counted(batch, "together", "apart")

    def embed(self, model: nn.Module, batch: Batch) -> Embedded:
        """Vectors of all views."""
        return embed_views(model, batch, unit=self.unit)

    def loss(self, found: Embedded, *, rows: range | None = None) -> Mapping[str, Tensor]:
        """The share of some rows in each mean, times all rows.

        Raises:
            DataError: All are of one group, or no two are.
        """
        groups = groups_of(found)
        check_groups(groups)
        own = items_of(found.row_of["views"], rows)
        sums = margin_contrastive(found.vectors["views"], groups, margin=self.margin, anchors=own, cells=self.cells)
        same, other = _pairs(groups)
        pairs = (same, other) if self.average == "kind" else (same + other, same + other)
        return {name: sums[at] * (found.rows / pairs[at]) for at, name in enumerate(("together", "apart"))}

    def __call__(self, model: nn.Module, batch: Batch) -> Mapping[str, Tensor]:
        """Both means, times the rows."""
        return self.loss(self.embed(model, batch))


class NaiveContrastive:
    """Objective without a minimum, for teaching: :func:`naive_contrastive` over all pairs; one term ``naive``.

    It is the mean over all pairs, times the rows. Vectors are taken as long as they are: that is what diverges.

    Warns:
        UserWarning: When built.
    """

    needs_global_batch = True

    def __init__(self, *, cells: int = CELLS) -> None:
        warnings.warn(
            "the naive contrastive objective has no minimum: it falls without end as vectors grow. It is there to show "
            "that; train with MarginContrastive or NTXent",
            stacklevel=2,
        )
        self.cells = cells

    def count(self, batch: Batch) -> Mapping[str, Tensor]:
        """Rows."""
        return counted(batch, "naive")

    def embed(self, model: nn.Module, batch: Batch) -> Embedded:
        """Vectors of all views, as long as they are."""
        return embed_views(model, batch, unit=False)

    def loss(self, found: Embedded, *, rows: range | None = None) -> Mapping[str, Tensor]:
        """The share of some rows in the mean, times all rows.

        Raises:
            DataError: All are of one group, or no two are.
        """
        groups = groups_of(found)
        check_groups(groups)
        own = items_of(found.row_of["views"], rows)
        total = naive_contrastive(found.vectors["views"], groups, anchors=own, cells=self.cells)
        return {"naive": total * (found.rows / sum(_pairs(groups)))}

    def __call__(self, model: nn.Module, batch: Batch) -> Mapping[str, Tensor]:
        """The mean over pairs, times the rows."""
        return self.loss(self.embed(model, batch))


def over_distances(
    between: Callable[[Tensor, Tensor, Tensor], Tensor],
    vectors: Float[Tensor, "n d"],
    groups: Int[Tensor, " n"],
    *,
    anchors: Int[Tensor, " a"] | None,
    cells: int,
) -> Tensor:
    """Sum of a function of distances of anchors to all, and of who matches and who does not.

    Each distance is computed from the difference of two vectors (never from products, whose rounding depends on the
    block and would decide between near neighbors), and is not a number where any vector is not finite.
    """
    every = torch.arange(len(vectors), device=vectors.device)
    with exactly(vectors):
        values = wide(vectors)

        def some(rows: Tensor) -> Tensor:
            d = torch.cdist(values[rows], values, compute_mode="donot_use_mm_for_euclid_dist")
            match = groups[rows][:, None] == groups
            found = between(d, match & (rows[:, None] != every), ~match)
            return found + (d.detach() * 0).sum() if found.is_floating_point() else found

        return sum_in_blocks(some, every if anchors is None else anchors, width=len(vectors), cells=cells)


def _pairs(groups: Int[Tensor, " n"]) -> tuple[int, int]:
    """Pairs that match, and others."""
    same = int((sizes_of(groups) - 1).sum()) // 2
    return same, len(groups) * (len(groups) - 1) // 2 - same


def check_margin(margin: float) -> None:
    """Refuse a margin that is not a number above 0.

    Raises:
        ConfigError: As said.
    """
    if not 0 < margin < math.inf:
        raise ConfigError(f"the margin is {margin:g}", place="margin", remedy="set it to a number above 0")


def check_choice(name: str, given: str, choices: tuple[str, ...]) -> None:
    """Refuse what is not one of some words.

    Raises:
        ConfigError: As said.
    """
    if given not in choices:
        raise ConfigError(f"{name} is {given!r}", place=name, remedy=f"set it to one of {', '.join(choices)}")
