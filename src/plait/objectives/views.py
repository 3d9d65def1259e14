"""Contrast among views: which of the others show the same sample, or the same class.

NT-Xent (SimCLR: Chen et al., https://arxiv.org/abs/2002.05709, equation 1), supervised contrastive (Khosla et al.,
https://arxiv.org/abs/2004.11362, equation 2, L_out) and N-pair (Sohn, "Improved deep metric learning with multi-class
N-pair loss objective", NeurIPS 2016, equation 3).

Batches and models are those of :mod:`plait.objectives.grouped`.
"""

from __future__ import annotations

import math
from collections.abc import Mapping

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from plait.core.errors import ConfigError
from plait.core.tensors import Batch, Embedded
from plait.objectives.contrastive import CELLS, match_groups, row_nce, sum_in_blocks
from plait.objectives.grouped import (
    check_groups,
    check_negatives,
    counted,
    embed_views,
    exactly,
    groups_of,
    inverse,
    items_of,
    wide,
    with_partner,
)


def nt_xent(
    one: Float[Tensor, "b d"], other: Float[Tensor, "b d"], *, temperature: float = 0.5, cells: int = CELLS
) -> Float[Tensor, ""]:
    """SimCLR's loss, summed over the 2 b views: each finds its partner among the 2 b - 1 others.

    ``l_i = -log(exp(s_i,p(i)) / sum_{k != i} exp(s_ik))``, s the cosine over the temperature. Divided by 2 b it is the
    paper's loss. With all vectors alike it is ``2 b log(2 b - 1)``.

    Args:
        one: Unit vectors.
        other: Unit vectors; row i is a view of the same sample as row i of ``one``.
        temperature: The paper's best is 0.1 to 0.5, by batch size and length of training.
        cells: Scores that are held at once, see :func:`supervised_contrastive`.

    Raises:
        DataError: There is one sample, so nothing to tell it from.
        ConfigError: The temperature is not a number above 0, or too small.

    Example:
        >>> one = torch.tensor([[1.0, 0.0]]).repeat(4, 1)
        >>> round(nt_xent(one, one).item() / 8, 4)  # all alike: ln 7
        1.9459
    """
    sample = torch.arange(len(one), device=one.device).repeat(2)
    return supervised_contrastive(torch.cat([one, other]), sample, temperature=temperature, cells=cells)


def supervised_contrastive(
    vectors: Float[Tensor, "n d"],
    groups: Int[Tensor, " n"],
    *,
    temperature: float = 0.1,
    anchors: Int[Tensor, " a"] | None = None,
    cells: int = CELLS,
) -> Float[Tensor, ""]:
    """L_out of supervised contrast, summed over anchors that have a positive.

    ``l_i = -1/|P(i)| sum_{p in P(i)} log(exp(s_ip) / sum_{k != i} exp(s_ik))``, with P(i) the others of the same group
    and s the cosine over the temperature. An anchor that is alone in its group has no term; it is a negative of others.

    Args:
        vectors: Unit vectors.
        groups: Equal numbers match: the sample of each view, or its class.
        temperature: The paper's is 0.1.
        anchors: Which vectors are summed over; all by default.
        cells: Scores that are held at once: a larger table is computed in blocks of rows.

    Raises:
        DataError: All are of one group, or no two are.
        ConfigError: The temperature is not a number above 0, or too small.
    """
    check_groups(groups)
    scale = inverse(temperature)
    with exactly(vectors):
        vectors = wide(vectors)

        def some(rows: Tensor) -> Tensor:
            own = rows[:, None] == torch.arange(len(vectors), device=rows.device)
            logits = (scale * vectors[rows] @ vectors.T).masked_fill(own, float("-inf"))
            return row_nce(logits, (groups[rows][:, None] == groups) & ~own)

        paired = with_partner(groups, anchors)
        return sum_in_blocks(some, paired, width=len(vectors), cells=cells)


def n_pair(
    anchor: Float[Tensor, "b d"],
    positive: Float[Tensor, "b d"],
    *,
    groups: Int[Tensor, " b"] | None = None,
    anchors: Int[Tensor, " a"] | None = None,
    cells: int = CELLS,
) -> Float[Tensor, ""]:
    """Sohn's N-pair loss, summed over anchors.

    ``l_i = log(1 + sum_{j: class differs} exp(a_i . p_j - a_i . p_i))``. The paper draws each pair from another class;
    where a batch has several of one class, they are no negatives of each other.

    Args:
        anchor: Vectors of any length; their growth is held back beside this loss (:class:`NPair`).
        positive: Row i belongs to row i of ``anchor``.
        groups: Equal numbers are one class; by default each row is one of its own.
        anchors: Which rows are summed over; all by default.
        cells: Scores that are held at once.

    Raises:
        DataError: All rows are of one class.

    Example:
        >>> round(n_pair(torch.zeros(4, 2), torch.zeros(4, 2)).item() / 4, 4)  # nothing known: ln 4
        1.3863
    """
    every = torch.arange(len(anchor), device=anchor.device)
    groups = every if groups is None else groups
    check_negatives(groups)
    with exactly(anchor):
        left, right = wide(anchor), wide(positive)

        def some(rows: Tensor) -> Tensor:
            own = rows[:, None] == every
            wrong = (groups[rows][:, None] == groups) & ~own
            return row_nce((left[rows] @ right.T).masked_fill(wrong, float("-inf")), own)

        return sum_in_blocks(some, every if anchors is None else anchors, width=len(left), cells=cells)


class NTXent:
    """Objective: NT-Xent over a batch with two views of each row; one term ``nt-xent``, counted in views.

    The vectors of the model are set to unit length here. Classes are not looked at.

    Args:
        temperature: See :func:`nt_xent`.
        cells: Scores that are held at once.

    Raises:
        ConfigError: The temperature is not a number above 0, or too small.
    """

    needs_global_batch = True

    def __init__(self, *, temperature: float = 0.5, cells: int = CELLS) -> None:
        inverse(temperature)
        self.temperature, self.cells = temperature, cells

    def count(self, batch: Batch) -> Mapping[str, Tensor]:
        """Views."""
        return counted(batch, "nt-xent", each=2)

    def embed(self, model: nn.Module, batch: Batch) -> Embedded:
        """Unit vectors of both views of each row.

        Raises:
            DataError: A row has not two.
        """
        return embed_views(model, batch, views=2)

    def loss(self, found: Embedded, *, rows: range | None = None) -> Mapping[str, Tensor]:
        """Sum over the views of some rows."""
        belongs = found.row_of["views"]
        total = supervised_contrastive(
            found.vectors["views"],
            belongs,
            temperature=self.temperature,
            anchors=items_of(belongs, rows),
            cells=self.cells,
        )
        return {"nt-xent": total}

    def __call__(self, model: nn.Module, batch: Batch) -> Mapping[str, Tensor]:
        """Sum over views."""
        return self.loss(self.embed(model, batch))


class SupervisedContrastive:
    """Objective: supervised contrast over a batch of views, any number a row; one term ``supcon``, counted in rows.

    Views of a row match, and so do views of rows of one class. The term is the mean over anchors that have a positive:
    how many these are is told by the classes of the whole batch, so the sum is that mean times the rows.

    Args:
        temperature: See :func:`supervised_contrastive`.
        cells: Scores that are held at once.

    Raises:
        ConfigError: The temperature is not a number above 0, or too small.
    """

    needs_global_batch = True

    def __init__(self, *, temperature: float = 0.1, cells: int = CELLS) -> None:
        inverse(temperature)
        self.temperature, self.cells = temperature, cells

    def count(self, batch: Batch) -> Mapping[str, Tensor]:
        """Rows."""
        return counted(batch, "supcon")

    def embed(self, model: nn.Module, batch: Batch) -> Embedded:
        """Unit vectors of all views."""
        return embed_views(model, batch)

    def loss(self, found: Embedded, *, rows: range | None = None) -> Mapping[str, Tensor]:
        """The share of some rows in the mean, times the rows.

        Raises:
            DataError: All are of one class, or no two are.
        """
        groups, belongs = groups_of(found), found.row_of["views"]
        total = supervised_contrastive(
            found.vectors["views"],
            groups,
            temperature=self.temperature,
            anchors=items_of(belongs, rows),
            cells=self.cells,
        )
        return {"supcon": total * (found.rows / len(with_partner(groups)))}

    def __call__(self, model: nn.Module, batch: Batch) -> Mapping[str, Tensor]:
        """The mean over anchors, times the rows."""
        return self.loss(self.embed(model, batch))


class NPair:
    """Objective: N-pair over two views of each row, the first an anchor and the second its positive; counted in rows.

    Terms: ``n-pair``, and ``length``: ``shrink * (|a_i|^2 + |p_i|^2)``, summed. The paper holds the length of the
    vectors back so, as it sets them to no length: without it the loss falls by growing them.

    Args:
        shrink: Factor of the squared lengths; 0 takes the term away.
        cells: Scores that are held at once.

    Raises:
        ConfigError: ``shrink`` is below 0 or not finite.
    """

    needs_global_batch = True

    def __init__(self, *, shrink: float = 0.002, cells: int = CELLS) -> None:
        if not 0 <= shrink < math.inf:
            raise ConfigError(f"shrink is {shrink:g}", place="shrink", remedy="set it to 0 or more")
        self.shrink, self.cells = shrink, cells

    def count(self, batch: Batch) -> Mapping[str, Tensor]:
        """Rows."""
        return counted(batch, "n-pair", *(["length"] if self.shrink else []))

    def embed(self, model: nn.Module, batch: Batch) -> Embedded:
        """Vectors of the first and of the second view of each row, as long as they are.

        Raises:
            DataError: A row has not two.
        """
        found = embed_views(model, batch, views=2, unit=False)
        order = found.row_of["views"].argsort(stable=True)
        first, second = (found.vectors["views"][order[at::2]] for at in range(2))
        every = torch.arange(found.rows, device=order.device)
        return Embedded(
            vectors={"anchor": first, "positive": second},
            row_of={"anchor": every, "positive": every},
            classes=found.classes,
        )

    def loss(self, found: Embedded, *, rows: range | None = None) -> Mapping[str, Tensor]:
        """Sums over some rows.

        Raises:
            DataError: All rows are of one class.
        """
        anchor, positive = found.vectors["anchor"], found.vectors["positive"]
        own = items_of(found.row_of["anchor"], rows)
        groups = match_groups(found.classes)
        terms = {"n-pair": n_pair(anchor, positive, groups=groups, anchors=own, cells=self.cells)}
        if self.shrink:
            terms["length"] = self.shrink * (anchor[own].square().sum() + positive[own].square().sum())
        return terms

    def __call__(self, model: nn.Module, batch: Batch) -> Mapping[str, Tensor]:
        """Sums over rows."""
        return self.loss(self.embed(model, batch))
