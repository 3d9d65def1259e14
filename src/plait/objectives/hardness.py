"""In-batch negatives that weigh the more, the more alike they are: Robinson et al., https://arxiv.org/abs/2010.04592.

The sum over negatives of InfoNCE is one over N equal draws. Here a negative weighs by ``exp(hardness * s)``, and what
false negatives would add, if a share ``prior`` of all samples were of the anchor's class, is taken off (the debiased
loss of Chuang et al., https://arxiv.org/abs/2007.00224). Where classes are known, the guard is exact: rows of one class
are no negatives of each other at all.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from functools import partial

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from plait.core.errors import ConfigError
from plait.core.tensors import Batch, Embedded
from plait.objectives.contrastive import CELLS, Contrastive, Sides, match_groups, sum_in_blocks, terms_of
from plait.objectives.grouped import (
    check_negatives,
    counted,
    embed_views,
    exactly,
    groups_of,
    inverse,
    items_of,
    wide,
)


def hard_nce(
    logits: Float[Tensor, "a b"],
    own: Int[Tensor, " a"],
    negatives: Bool[Tensor, "a b"],
    *,
    hardness: float,
    prior: float = 0.0,
    lowest: float | Tensor = -math.inf,
) -> Float[Tensor, ""]:
    """Hard-negative InfoNCE of each row, summed: Robinson et al., equation 4 with the weights of section 3.

    ``-log(e^p / (e^p + G))`` with ``G = max(N e^lowest, (R - prior N e^p) / (1 - prior))`` and
    ``R = N sum_j e^{(1 + hardness) s_j} / sum_j e^{hardness s_j}`` over the N negatives s; p is the score of the
    positive. Without hardness and prior it is InfoNCE. A row without negatives gives 0.

    Args:
        logits: Scores, divided by the temperature.
        own: Column of each row's positive.
        negatives: Which columns are negatives.
        hardness: beta of the paper, from 0.
        prior: tau+ of the paper, from 0 and below 1.
        lowest: The smallest score there can be: -1 / temperature for cosines. The estimate G cannot go below it.
    """
    some = negatives.any(1)
    logits, own, negatives = logits[some], own[some], negatives[some]
    number = negatives.sum(1).to(logits.dtype).log()
    wrong = logits.masked_fill(~negatives, -math.inf)
    right = logits.gather(1, own[:, None])[:, 0]
    summed = ((1 + hardness) * wrong).logsumexp(1)
    if hardness:  # 0 times minus infinity would be no number
        summed = summed + number - (hardness * wrong).logsumexp(1)
    if not prior:
        return (torch.logaddexp(right, summed) - right).sum()
    top = torch.maximum(right, wrong.amax(1)).detach()  # what is subtracted from all, so that nothing overflows
    debiased = ((summed - top).exp() - prior * (number + right - top).exp()) / (1 - prior)
    debiased = debiased.maximum((number + lowest - top).exp())
    return (((right - top).exp() + debiased).log() - (right - top)).sum()


class HardNTXent:
    """Objective: NT-Xent with hard negatives, over two views of each row; one term ``hard-nt-xent``, counted in views.

    Views of rows of one class are no negatives of each other; the positive of a view is the other one of its row.

    Args:
        hardness: See :func:`hard_nce`; the paper's are 0.5 to 2.
        prior: See :func:`hard_nce`; leave it at 0 where classes are known.
        temperature: See :func:`plait.objectives.views.nt_xent`.
        cells: Scores that are held at once.

    Raises:
        ConfigError: One of them is out of its range.
    """

    needs_global_batch = True

    def __init__(
        self, *, hardness: float = 1.0, prior: float = 0.0, temperature: float = 0.5, cells: int = CELLS
    ) -> None:
        _check(hardness, prior)
        inverse(temperature)
        self.hardness, self.prior, self.temperature, self.cells = hardness, prior, temperature, cells

    def count(self, batch: Batch) -> Mapping[str, Tensor]:
        """Views."""
        return counted(batch, "hard-nt-xent", each=2)

    def embed(self, model: nn.Module, batch: Batch) -> Embedded:
        """Unit vectors of both views of each row.

        Raises:
            DataError: A row has not two.
        """
        return embed_views(model, batch, views=2)

    def loss(self, found: Embedded, *, rows: range | None = None) -> Mapping[str, Tensor]:
        """Sum over the views of some rows.

        Raises:
            DataError: All rows are of one class.
        """
        groups, belongs, vectors = groups_of(found), found.row_of["views"], found.vectors["views"]
        check_negatives(groups)
        scale = inverse(self.temperature)
        order = belongs.argsort(stable=True)
        partner = torch.empty_like(order)
        partner[order[::2]], partner[order[1::2]] = order[1::2], order[::2]

        def some(block: Tensor) -> Tensor:
            return hard_nce(
                scale * vectors[block] @ vectors.T,
                partner[block],
                groups[block][:, None] != groups,
                hardness=self.hardness,
                prior=self.prior,
                lowest=-scale,
            )

        with exactly(vectors):
            total = sum_in_blocks(some, items_of(belongs, rows), width=len(vectors), cells=self.cells)
        return {"hard-nt-xent": total}

    def __call__(self, model: nn.Module, batch: Batch) -> Mapping[str, Tensor]:
        """Sum over views."""
        return self.loss(self.embed(model, batch))


class HardContrastive(Contrastive):
    """Objective: symmetric InfoNCE of pairs with hard negatives; all else is :class:`Contrastive`'s.

    Pairs of one class are no negatives of each other; the positive of a picture is its own text alone.

    Args:
        hardness: See :func:`hard_nce`.
        prior: See :func:`hard_nce`; leave it at 0 where classes are known.
        cells: Scores that are held at once.

    Raises:
        ConfigError: One of them is out of its range.
    """

    def __init__(self, *, hardness: float = 1.0, prior: float = 0.0, cells: int = CELLS) -> None:
        _check(hardness, prior)
        super().__init__(cells=cells)
        self.hardness, self.prior = hardness, prior

    def loss(self, found: Embedded, *, rows: range | None = None) -> Mapping[str, Tensor]:
        """Sum over pairs, and over sounds; a sound without another one to tell it from gives 0.

        Raises:
            DataError: All pairs are of one class.
        """
        check_negatives(match_groups(found.classes))
        with exactly(found.classes):
            return terms_of(found, partial(self._between, scale=wide(found.factors["scale"])), rows=rows)

    def _between(self, sides: Sides, *, scale: Tensor) -> Tensor:
        def one_way(left: Tensor, right: Tensor, block: Tensor) -> Tensor:
            return hard_nce(
                scale * left[block] @ right.T,
                block,
                ~sides.positives(block),
                hardness=self.hardness,
                prior=self.prior,
                lowest=-scale.detach(),
            )

        left, right = wide(sides.left), wide(sides.right)
        in_blocks = partial(sum_in_blocks, rows=sides.rows, width=len(left), cells=self.cells)
        return (in_blocks(partial(one_way, left, right)) + in_blocks(partial(one_way, right, left))) / 2


def _check(hardness: float, prior: float) -> None:
    if not 0 <= hardness < math.inf:
        raise ConfigError(f"hardness is {hardness:g}", place="hardness", remedy="set it to 0 or more, such as 1")
    if not 0 <= prior < 1:
        raise ConfigError(
            f"prior is {prior:g}", place="prior", remedy="set it to the share of samples of one class, such as 0.1"
        )
