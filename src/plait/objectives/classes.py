"""Classes to be told: all labelled, labelled wrongly now and then, answered by several people, or labelled for a few.

A batch has one or two views of each row, items of one kind; the model returns scores of each item, ``n c``, and the row
of each, ``n`` (as in :mod:`plait.objectives.grouped`). What a sample weighs is told by its own row alone, so all of
these add up over micro-batches and processes.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn
from torch.nn import functional

from plait.core.errors import ConfigError, DataError
from plait.core.tensors import IGNORE, Batch
from plait.objectives.grouped import check_views, exactly, wide


def generalized_nce(scores: Float[Tensor, "n c"], classes: Int[Tensor, " n"], *, q: float) -> Float[Tensor, " n"]:
    """``(1 - p_i^q) / q`` of each item, p the probability of its label: cross-entropy as q goes to 0, ``1 - p`` at 1.

    A wrong label, whose p is small, pulls less than under cross-entropy: generalized cross-entropy of Zhang and
    Sabuncu, https://arxiv.org/abs/1805.07836, equation 6; the paper's q is 0.7.

    Args:
        scores: Before the softmax.
        classes: The labels.
        q: Above 0 and at most 1.

    Raises:
        ConfigError: It is not.

    Example:
        >>> round(generalized_nce(torch.zeros(1, 4), torch.tensor([2]), q=1.0).item(), 4)  # 1 - 1/4
        0.75
    """
    if not 0 < q <= 1:
        raise ConfigError(f"robust is {q:g}", place="robust", remedy="set it above 0 and to at most 1, such as 0.7")
    log = wide(scores).log_softmax(1).gather(1, classes[:, None])[:, 0]
    return -torch.expm1(q * log) / q


class Classified:
    """Objective: cross-entropy of the class of each row; one term ``class``, counted in labelled rows.

    ``batch.labels[:, 0]`` is the class; rows without one (:data:`~plait.core.tensors.IGNORE`) are left out. Of a row
    with several views it is their mean.

    Args:
        smoothing: Share of each target spread over all classes (https://arxiv.org/abs/1512.00567).
        robust: q of :func:`generalized_nce`, for labels some of which are wrong; 0 is cross-entropy.

    Raises:
        ConfigError: One of them is out of its range, or both are set.
    """

    needs_global_batch = False

    def __init__(self, *, smoothing: float = 0.0, robust: float = 0.0) -> None:
        if not 0 <= smoothing < 1:
            raise ConfigError(f"smoothing is {smoothing:g}", place="smoothing", remedy="set it to 0 or more, below 1")
        if robust:
            generalized_nce(torch.zeros(1, 2), torch.zeros(1, dtype=torch.long), q=robust)
        if robust and smoothing:
            raise ConfigError(
                "smoothing and robust are both set: each is an answer to wrong labels of its own",
                place="smoothing",
                remedy="set one of them to 0",
            )
        self.smoothing, self.robust = smoothing, robust

    def count(self, batch: Batch) -> Mapping[str, Tensor]:
        """Labelled rows."""
        return {"class": (batch.labels[:, 0] != IGNORE).sum()}

    def __call__(self, model: nn.Module, batch: Batch) -> Mapping[str, Tensor]:
        """Sum in nats.

        Raises:
            DataError: A label is no class of the model, or a row has no item.
        """
        scores, belongs = model(batch)
        check_views(batch.sample_ids, belongs, views=None)
        check_classes(batch, scores.shape[1])
        share = 1 / torch.bincount(belongs, minlength=len(batch.sample_ids))
        classes = batch.labels[belongs, 0]
        known = classes != IGNORE
        with exactly(scores):
            scores, classes, share = wide(scores)[known], classes[known], share[belongs][known]
            if self.robust:
                each = generalized_nce(scores, classes, q=self.robust)
            else:
                each = functional.cross_entropy(scores, classes, reduction="none", label_smoothing=self.smoothing)
            return {"class": (share * each).sum()}


class Answered:
    """Objective of VQA as classification: each answer judged by itself, after how many people gave it; term ``answer``.

    ``-sum_c y_c log sigmoid(s_c) + (1 - y_c) log(1 - sigmoid(s_c))`` with ``y_c = min(1, n_c / enough)``, where n_c
    people gave answer c: the soft score of VQA v2's evaluation as a target (Teney et al.,
    https://arxiv.org/abs/1708.02711, section 3.6). Counted in rows that have an answer.

    ``batch.labels``, ``b person``, holds an answer of each person, :data:`~plait.core.tensors.IGNORE` where it is no
    class or there is no such person. The model returns one item a row.

    Args:
        enough: People who have to agree for a full score; 3 of VQA v2's 10.

    Raises:
        ConfigError: It is below 1.
    """

    needs_global_batch = False

    def __init__(self, *, enough: int = 3) -> None:
        if enough < 1:
            raise ConfigError(f"enough is {enough}", place="enough", remedy="set it to 1 or more")
        self.enough = enough

    def count(self, batch: Batch) -> Mapping[str, Tensor]:
        """Rows with an answer."""
        return {"answer": (batch.labels != IGNORE).any(1).sum()}

    def __call__(self, model: nn.Module, batch: Batch) -> Mapping[str, Tensor]:
        """Sum in nats.

        Raises:
            DataError: A row has not one item, or an answer is no class of the model.
        """
        scores, belongs = model(batch)
        check_views(batch.sample_ids, belongs, views=1)
        check_classes(batch, scores.shape[1])
        labels = batch.labels[belongs]
        said = labels != IGNORE
        given = functional.one_hot(labels.where(said, 0), scores.shape[1]) * said[:, :, None]
        with exactly(scores):
            scores = wide(scores)
            targets = (given.sum(1).to(scores.dtype) / self.enough).clamp(max=1)
            each = functional.binary_cross_entropy_with_logits(scores, targets, reduction="none").sum(1)
        return {"answer": each[said.any(1)].sum()}


class PseudoLabelled:
    """Objective for few labels: what the model is sure of becomes a label; terms ``class`` and ``pseudo``.

    ``class`` is cross-entropy of labelled rows, on their first view, counted in these. ``pseudo``, of rows without a
    label, is cross-entropy of the last view with the likeliest class of the first one, where its probability is at
    least the threshold; counted in all rows without a label, sure or not. With two views, the first one changed a
    little and the second one much, this is FixMatch (https://arxiv.org/abs/2001.07685, equations 3 and 4); with one it
    is pseudo-labelling (Lee, 2013). No gradient goes through the label. The paper weighs both terms alike.

    Args:
        threshold: Least probability; the paper's is 0.95.

    Raises:
        ConfigError: It is not between 0 and 1.
    """

    needs_global_batch = False

    def __init__(self, *, threshold: float = 0.95) -> None:
        if not 0 <= threshold <= 1:
            raise ConfigError(f"threshold is {threshold:g}", place="threshold", remedy="set it to 0 to 1, such as 0.95")
        self.threshold = threshold

    def count(self, batch: Batch) -> Mapping[str, Tensor]:
        """Rows with and without a label."""
        known = batch.labels[:, 0] != IGNORE
        return {"class": known.sum(), "pseudo": (~known).sum()}

    def __call__(self, model: nn.Module, batch: Batch) -> Mapping[str, Tensor]:
        """Sums in nats.

        Raises:
            DataError: Rows have not one view each, or two each; or a label is no class of the model.
        """
        scores, belongs = model(batch)
        views = 2 if len(belongs) == 2 * len(batch.sample_ids) else 1
        check_views(batch.sample_ids, belongs, views=views)
        check_classes(batch, scores.shape[1])
        order = belongs.argsort(stable=True)
        first, last = order[::views], order[views - 1 :: views]
        classes = batch.labels[:, 0]
        known = classes != IGNORE
        with exactly(scores):
            scores = wide(scores)
            sure, likeliest = scores[first].detach().softmax(1).max(1)
            taken = ~known & (sure >= self.threshold)
            return {
                "class": functional.cross_entropy(scores[first][known], classes[known], reduction="sum"),
                "pseudo": functional.cross_entropy(scores[last][taken], likeliest[taken], reduction="sum"),
            }


def check_classes(batch: Batch, number: int) -> None:
    """See that labels are classes of a model.

    Raises:
        DataError: One is not.
    """
    wrong: Bool[Tensor, "b t"] = ((batch.labels < 0) | (batch.labels >= number)) & (batch.labels != IGNORE)
    if bool(wrong.any()):
        row, place = (int(at) for at in wrong.nonzero()[0])
        raise DataError(
            f"class {int(batch.labels[row, place])} of a model with {number}, 0 to {number - 1}",
            place=f"sample {batch.sample_ids[row]}",
            remedy="build the model with as many classes as the labels have",
        )
