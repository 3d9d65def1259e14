"""Feature alignment of two domains: a labeled one (the source) and one without labels (the target).

A classifier learns from the source, and a second term draws the features of both domains together, so that what was
learned holds for the target, too: CORAL (Sun and Saenko 2016, https://arxiv.org/abs/1607.01719) compares covariances,
MMD (Gretton et al., "A kernel two-sample test", JMLR 2012; several kernels as in DAN, Long et al. 2015,
https://arxiv.org/abs/1502.02791) whole distributions, and DANN (Ganin et al. 2016, https://arxiv.org/abs/1505.07818)
lets a classifier of domains say how they differ. All compare what is seen, not what it means: where the share of
classes differs between domains they have a reason to mix classes up (Zhao et al. 2019, https://arxiv.org/abs/1901.09453).

Rows of a batch with a label (``batch.labels[:, 0]``) are the source, rows with :data:`~plait.core.tensors.IGNORE` the
target. The model returns features, ``b d``, and scores of the classes, ``b c``.
"""

import math
from collections.abc import Mapping, Sequence
from typing import Any, Protocol, runtime_checkable

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.nn import functional

from plait.core.errors import DataError
from plait.core.tensors import IGNORE, Batch, Embedded

SCALES = (0.25, 0.5, 1.0, 2.0, 4.0)
"""Widths of the kernels of :func:`mmd`, in units of the mean squared distance."""

Rows = tuple[Int[Tensor, " a"], Int[Tensor, " c"]]
"""Numbers of some rows of the source and of the target."""


@runtime_checkable
class Distance(Protocol):
    """How far the features of two domains are apart, as a sum over rows of shares that each need all rows."""

    def __call__(
        self, source: Float[Tensor, "n d"], target: Float[Tensor, "m d"], *, of: Rows | None = None
    ) -> Float[Tensor, ""]:
        """Sum of the shares of some rows; of all rows, which is the distance, by default."""
        ...


def coral(source: Float[Tensor, "n d"], target: Float[Tensor, "m d"], *, of: Rows | None = None) -> Float[Tensor, ""]:
    """``|C_S - C_T|_F^2 / (4 d^2)`` with C the covariances (over n - 1): Sun and Saenko, equation 1.

    With D = C_S - C_T this is ``tr(C_S D) - tr(C_T D)``, so the share of a source row, centered, is
    ``s D s / (n - 1) / (4 d^2)``, and that of a target row ``-t D t / (m - 1) / (4 d^2)``.

    Args:
        source: In float32 at least it is computed, whatever comes.
        target: Any number of rows from 2.
        of: Rows whose shares are asked for; all by default.

    Raises:
        DataError: One has fewer than 2 rows.

    Example:
        >>> round(coral(torch.tensor([[-1.0], [1.0]]), torch.tensor([[4.0], [4.0]])).item(), 4)  # (2 - 0)^2 / 4
        1.0
    """
    _check(source, target, least=2)
    with torch.autocast(source.device.type, enabled=False):
        one, other = (x - x.mean(0) for x in (_wide(source), _wide(target)))
        apart = one.T @ one / (len(one) - 1) - other.T @ other / (len(other) - 1)
        if of is None:
            return apart.square().sum() / (4 * apart.shape[0] ** 2)
        own = ((x @ apart * x).sum() / (n - 1) for x, n in ((one[of[0]], len(one)), (other[of[1]], len(other))))
        return (next(own) - next(own)) / (4 * apart.shape[0] ** 2)


def mmd(
    source: Float[Tensor, "n d"],
    target: Float[Tensor, "m d"],
    *,
    of: Rows | None = None,
    scales: Sequence[float] = SCALES,
    bandwidth: float | None = None,
) -> Float[Tensor, ""]:
    """Squared maximum mean discrepancy, with a mean of Gaussian kernels: Gretton et al., equation 5 (biased, from 0).

    ``mean_ij k(s_i, s_j) + mean_ij k(t_i, t_j) - 2 mean_ij k(s_i, t_j)`` with
    ``k(x, y) = mean_u exp(-|x - y|^2 / (u h))``. The unbiased estimate differs in a constant and in factors
    ``n / (n - 1)``, and can be below 0.

    Args:
        source: In float32 at least it is computed, whatever comes.
        target: Any number of rows from 1.
        of: Rows whose shares are asked for; all by default.
        scales: The u.
        bandwidth: The h; by default the mean squared distance of two different rows of both together, which is seen
            as a constant, as in DAN.

    Raises:
        DataError: One has no rows.

    Example:
        >>> one, other = torch.tensor([[0.0]]), torch.tensor([[1.0]])
        >>> round(mmd(one, other, scales=(1.0,), bandwidth=1.0).item(), 4)  # 2 - 2 / e
        1.2642
    """
    _check(source, target, least=1)
    with torch.autocast(source.device.type, enabled=False):
        one, other = _wide(source), _wide(target)
        both = torch.cat([one, other]).detach()
        center = both.mean(0)  # distances stay; products of large numbers do not cancel
        one, other = one - center, other - center
        width = _mean_squared_distance(both) if bandwidth is None else both.new_tensor(bandwidth)
        widths = [scale * width for scale in scales]
        if of is None:
            own = _kernel(one, one, widths).mean() + _kernel(other, other, widths).mean()
            return own - 2 * _kernel(one, other, widths).mean()
        first, second = one[of[0]], other[of[1]]
        shares = (_kernel(first, one, widths) - _kernel(first, other, widths)).sum() / len(one)
        return shares + (_kernel(second, other, widths) - _kernel(second, one, widths)).sum() / len(other)


class Aligned:
    """Objective: cross-entropy of labeled rows, and a distance of both domains: terms ``class`` and ``align``.

    ``class`` is counted in labeled rows, ``align`` in all; its sum is the distance times the rows, so that the loss has
    the distance itself. It is the distance of the whole batch, whatever pieces that comes in
    (:class:`plait.core.protocols.Pairwise`): a mean over distances of small pieces is another, larger one.

    Args:
        distance: :func:`coral`, :func:`mmd`, or another sum over rows.

    Example:
        >>> Aligned(coral).needs_global_batch
        True
    """

    needs_global_batch = True

    def __init__(self, distance: Distance) -> None:
        self.distance = distance

    def count(self, batch: Batch) -> Mapping[str, Tensor]:
        """Labeled rows, and rows."""
        return _count(batch, "align")

    def embed(self, model: nn.Module, batch: Batch) -> Embedded:
        """Features of both domains, and scores of the source."""
        features, scores = model(batch)
        classes = batch.labels[:, 0]
        source, target = (classes != IGNORE).nonzero()[:, 0], (classes == IGNORE).nonzero()[:, 0]
        return Embedded(
            vectors={"source": features[source], "scores": scores[source], "target": features[target]},
            row_of={"source": source, "scores": source, "target": target},
            classes=classes,
        )

    def loss(self, found: Embedded, *, rows: range | None = None) -> Mapping[str, Tensor]:
        """Sums over labeled rows, and over all.

        Raises:
            DataError: The whole batch has too few rows of a domain.
        """
        scores, classes, of = found.vectors["scores"], found.classes[found.row_of["source"]], None
        if rows is not None:
            of = (_inside(found.row_of["source"], rows), _inside(found.row_of["target"], rows))
            scores, classes = scores[of[0]], classes[of[0]]
        apart = self.distance(found.vectors["source"], found.vectors["target"], of=of)
        return {"class": _cross_entropy(scores, classes), "align": found.rows * apart}

    def __call__(self, model: nn.Module, batch: Batch) -> Mapping[str, Tensor]:
        """Sums over labeled rows, and over all."""
        return self.loss(self.embed(model, batch))


class Adversarial(nn.Module):
    """Objective of DANN (Ganin et al. 2016): terms ``class``, counted in labeled rows, and ``domain``, in all.

    A judge learns to tell from features which domain a row is of (logistic loss); its gradient comes to the features
    reversed, times a strength that grows from 0 with the share p of training that is done:
    ``strength * (2 / (1 + exp(-steepness p)) - 1)``, as in the paper. Both terms are sums over rows: they add up over
    micro-batches and processes. The judge's weights are the objective's, saved with the run and not with the model.

    Args:
        judge: Features to one score, that of the source.
        strength: At the end; the paper's is 1. The weight of ``domain`` in the loop is the judge's, too: leave it at 1.
        steepness: The paper's is 10.

    Example:
        >>> one = Adversarial(nn.Linear(8, 1))
        >>> one.pace(50, 100)
        >>> round(one.factor, 4)
        0.9866
    """

    needs_global_batch = False

    def __init__(self, judge: nn.Module, *, strength: float = 1.0, steepness: float = 10.0) -> None:
        super().__init__()
        self.judge, self.strength, self.steepness = judge, strength, steepness
        self.factor = strength
        """Of the reversed gradient, now; the full one where nobody tells the pace."""

    def pace(self, step: int, steps: int) -> None:
        """Set the factor for the update after ``step`` of ``steps``."""
        self.factor = self.strength * math.tanh(self.steepness * step / steps / 2)  # = 2 / (1 + exp(-x)) - 1

    def count(self, batch: Batch) -> Mapping[str, Tensor]:
        """Labeled rows, and rows."""
        return _count(batch, "domain")

    def forward(self, model: nn.Module, batch: Batch) -> Mapping[str, Tensor]:
        """Sums over labeled rows, and over all."""
        features, scores = model(batch)
        classes = batch.labels[:, 0]
        labeled = classes != IGNORE
        judged = _wide(self.judge(reverse_gradient(features, self.factor))[:, 0])
        return {
            "class": _cross_entropy(scores[labeled], classes[labeled]),
            "domain": functional.binary_cross_entropy_with_logits(judged, labeled.to(judged), reduction="sum"),
        }


def reverse_gradient(values: Float[Tensor, "*n"], factor: float) -> Float[Tensor, "*n"]:
    """The same values; the gradient comes back times ``-factor``.

    Example:
        >>> x = torch.ones(2, requires_grad=True)
        >>> reverse_gradient(x, 0.5).sum().backward()
        >>> x.grad.tolist()
        [-0.5, -0.5]
    """
    return _Reversed.apply(values, factor)  # pyright: ignore[reportUnknownMemberType, reportUnknownVariableType]


class _Reversed(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, values: Tensor, factor: float) -> Tensor:  # pyright: ignore[reportIncompatibleMethodOverride]
        ctx.factor = factor
        return values.view_as(values)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:  # pyright: ignore[reportIncompatibleMethodOverride]
        return -ctx.factor * gradient, None


def _kernel(rows: Tensor, others: Tensor, widths: Sequence[Tensor]) -> Float[Tensor, " a"]:
    """Of each row the mean kernel with all others, and over widths."""
    products = rows.square().sum(1)[:, None] + others.square().sum(1)[None] - 2 * rows @ others.T
    squared = products.clamp(min=0)
    return torch.stack([(-squared / width).exp().mean(1) for width in widths]).mean(0)


def _mean_squared_distance(rows: Float[Tensor, "n d"]) -> Float[Tensor, ""]:
    """Of two different rows; where all are equal not 0 but about what rounding makes of them."""
    found = 2 * (rows - rows.mean(0)).square().sum() / (len(rows) - 1)
    kind = torch.finfo(rows.dtype)
    return found.clamp(min=kind.tiny).maximum(kind.eps * rows.square().sum(1).mean())


def _cross_entropy(scores: Float[Tensor, "n c"], classes: Int[Tensor, " n"]) -> Float[Tensor, ""]:
    return functional.cross_entropy(_wide(scores), classes, reduction="sum")


def _inside(numbers: Int[Tensor, " n"], rows: range) -> Int[Tensor, " a"]:
    return ((numbers >= rows.start) & (numbers < rows.stop)).nonzero()[:, 0]


def _count(batch: Batch, term: str) -> dict[str, Tensor]:
    rows = torch.tensor(len(batch.labels), device=batch.labels.device)
    return {"class": (batch.labels[:, 0] != IGNORE).sum(), term: rows}


def _wide(values: Tensor) -> Tensor:
    return values.float() if values.dtype in (torch.float16, torch.bfloat16) else values


def _check(source: Tensor, target: Tensor, *, least: int) -> None:
    if min(len(source), len(target)) < least:
        raise DataError(
            f"a batch has {len(source)} labeled rows (the source) and {len(target)} without a label (the target); "
            f"a distance needs {least} of each",
            place="batch",
            remedy="draw each batch from both domains",
        )
