"""Judging a model while it trains: its loss on samples that never change, as exact sums over counts."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from plait.core.device import Compute
from plait.core.errors import ConfigError, DataError
from plait.core.protocols import Objective, Pairwise
from plait.core.tensors import Batch
from plait.training.contrast import join
from plait.training.precision import autocast
from plait.training.settings import EVALUATION, ON_TRAINING


@dataclass(frozen=True, slots=True, kw_only=True)
class Judged:
    """Samples and what is computed of them.

    Attributes:
        objective: Gives sums and counts; one that holds weights has to be the one that trains.
        batches: The samples, anew each time: every sample once. Of a loss that compares them they are one batch, in
            pieces where it is a sum over rows (:class:`plait.core.protocols.Pairwise`).
    """

    objective: Objective
    batches: Callable[[], Iterable[Batch]]


@dataclass(frozen=True, slots=True, kw_only=True)
class Validation:
    """How good a model is now: a hook for :attr:`plait.training.settings.Hooks.evaluate`.

    Gives ``evaluation``, the weighted sum of the terms over samples that are not trained on; each term as
    ``evaluation/<term>``; and ``evaluation_training``, the same sum over samples that are. It leaves the model in
    evaluation mode.

    Attributes:
        model: That trains.
        held: Not trained on.
        trained: Trained on, where these are wanted, too.
        weights: Of the terms, as in training; 1 where none is given.
        compute: Device and number format.
    """

    model: nn.Module
    held: Judged
    trained: Judged | None = None
    weights: Mapping[str, float]
    compute: Compute

    def __call__(self) -> dict[str, float]:
        """Evaluate.

        Raises:
            ConfigError: The samples have to come in one piece, and do not.
            DataError: No term has any unit.
        """
        terms = self._terms(self.held)
        found = {EVALUATION: self._sum(terms)} | {f"{EVALUATION}/{name}": value for name, value in terms.items()}
        if self.trained is not None:
            found[ON_TRAINING] = self._sum(self._terms(self.trained))
        return found

    def _terms(self, judged: Judged) -> dict[str, float]:
        self.model.eval()
        return mean_loss(self.model, judged.objective, judged.batches(), compute=self.compute)

    def _sum(self, terms: Mapping[str, float]) -> float:
        return math.fsum(self.weights.get(name, 1.0) * value for name, value in terms.items() if self._counts(name))

    def _counts(self, name: str) -> bool:
        return self.weights.get(name, 1.0) != 0.0


@torch.no_grad()
def mean_loss(
    model: nn.Module, objective: Objective, batches: Iterable[Batch], *, compute: Compute
) -> dict[str, float]:
    """Each term of a loss over all batches together: the sum of its sums over the sum of its counts, in float64.

    Nothing is averaged before, so the result is that of one big batch, to rounding. A term without units is left out.

    Args:
        model: As it is: in evaluation mode, unless dropout is wanted.
        objective: What is computed.
        batches: On any device.
        compute: Where, and in which number format.

    Raises:
        ConfigError: The loss compares all samples with each other and is no sum over rows, but there are several
            batches.
        DataError: No term has any unit.
    """
    sums, counts = Counter[str](), Counter[str]()
    here = (batch.to(torch.device(compute.device)) for batch in batches)
    if objective.needs_global_batch:
        parts = list(here)
        sums.update(_whole(model, objective, parts, compute=compute))
        for batch in parts:
            counts.update(_plain(objective.count(batch)))
    else:
        for batch in here:
            with autocast(compute.device, compute.dtype):
                sums.update(_plain(objective(model, batch)))
            counts.update(_plain(objective.count(batch)))
    terms = {name: sums[name] / count for name, count in counts.items() if count}
    if not terms:
        raise DataError(
            f"nothing to evaluate: {', '.join(f'{name} counts 0' for name in counts) or 'there is no sample'}",
            place="validation",
            remedy="give it samples with trained turns",
        )
    return terms


def _whole(model: nn.Module, objective: Objective, parts: Sequence[Batch], *, compute: Compute) -> dict[str, float]:
    """Sums over all rows of all parts, each compared with all others."""
    with autocast(compute.device, compute.dtype):
        if isinstance(objective, Pairwise):
            sums = objective.loss(join([objective.embed(model, part) for part in parts]))
        elif len(parts) == 1:
            sums = objective(model, parts[0])
        else:
            raise ConfigError(
                f"{type(objective).__name__} compares all samples with each other, but they come in {len(parts)} parts",
                place="validation",
                remedy="give them as one batch",
            )
    return _plain(sums)


def _plain(values: Mapping[str, Tensor]) -> dict[str, float]:
    return {name: float(value) for name, value in values.items()}
