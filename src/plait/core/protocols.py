"""Protocols: what one package may ask of another without importing it.

Letters as in :mod:`plait.core.tensors`.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Protocol, runtime_checkable

from jaxtyping import Int
from torch import Tensor, nn

from plait.core.tensors import Batch, Embedded, Patches
from plait.core.types import Completion, Request, Score


@runtime_checkable
class Encoder(Protocol):
    """Ragged media in, ragged features out. A connector has the same face, so they chain like layers."""

    d_out: int

    def __call__(self, media: Patches) -> Patches:
        """Encode; ``grid`` of the result equals :meth:`grid_out` of the input grid."""
        ...

    def grid_out(self, grid: Int[Tensor, "item 3"]) -> Int[Tensor, "item 3"]:
        """The token account: how many tokens each item becomes, before any forward."""
        ...


@runtime_checkable
class Batches(Protocol):
    """Where batches come from: a pure function of the step, so that the step alone is the data cursor."""

    def step_batches(self, step: int) -> Sequence[Batch]:
        """Micro-batches of the update after ``step`` finished steps; always the same ones."""
        ...


@runtime_checkable
class StatefulBatches(Batches, Protocol):
    """Batches that hold more than the step tells, such as answers sampled some steps ago that several steps learn from.

    Such a source may also draw from the global generators. It puts new state in place in one stroke: a signal may end
    ``step_batches`` anywhere, and the same step is then asked for again, with the generators as they were. It may not
    be asked ahead of the model (:class:`plait.data.loader.Loader`).
    """

    def state(self) -> Mapping[str, Tensor]:
        """What to keep with a checkpoint."""
        ...

    def restore(self, tensors: Mapping[str, Tensor]) -> None:
        """Take back what :meth:`state` gave."""
        ...


def holds_state(batches: Batches) -> bool:
    """Whether a source, or the one that it hands on, is :class:`StatefulBatches`, as empty as its state may be."""
    return bool(getattr(batches, "holds_state", isinstance(batches, StatefulBatches)))


@runtime_checkable
class Objective(Protocol):
    """A loss as sums and counts, so that micro-batches and ranks add up to the big batch exactly.

    ``needs_global_batch`` is True for terms that do not add over rows; these need the whole batch at once, or to be
    :class:`Pairwise`.
    """

    needs_global_batch: bool

    def count(self, batch: Batch) -> Mapping[str, Tensor]:
        """Units each term is normalized by, such as trained tokens.

        They add up over micro-batches. What only the whole batch tells, such as pairs that match or triplets above 0,
        does not: there rows are counted, and the sum is the mean over those units times all rows.
        """
        ...

    def __call__(self, model: nn.Module, batch: Batch) -> Mapping[str, Tensor]:
        """Sums of each term over the batch; the loop divides by the global count."""
        ...


@runtime_checkable
class Paced(Objective, Protocol):
    """A loss that changes in the course of training, as a function of the step: a resumed run goes on alike."""

    def pace(self, step: int, steps: int) -> None:
        """Be what it is for the update after ``step`` finished steps of ``steps``; told before each update."""
        ...


@runtime_checkable
class Pairwise(Objective, Protocol):
    """A loss over vectors of all rows, such as a contrastive one: a sum over rows, each compared with every other row.

    The model embeds each micro-batch by itself; the loss sees the vectors of all micro-batches and ranks together. Each
    rank takes the sum over its own rows (anchors), so these sums add up however the batch is split.
    """

    def embed(self, model: nn.Module, batch: Batch) -> Embedded:
        """Vectors of a batch. The same batch with the same random numbers must give the same vectors again."""
        ...

    def loss(self, found: Embedded, *, rows: range | None = None) -> Mapping[str, Tensor]:
        """Sums of each term over some rows of the whole batch, each compared with all rows.

        Args:
            found: Vectors of the whole batch.
            rows: Which rows are summed over; all by default. A part may hold none of a term's items: its sum is 0.
        """
        ...


@runtime_checkable
class Generate(Protocol):
    """Answers requests: an engine, a remote client or a scripted fake."""

    def __call__(self, requests: Sequence[Request]) -> list[Completion]:
        """One completion a request, in order."""
        ...


@runtime_checkable
class Metric(Protocol):
    """Predictions and references in, a score with its interval out."""

    def __call__(self, predictions: Sequence[str], references: Sequence[Sequence[str]]) -> Score:
        """Score all items together."""
        ...


Listener = Callable[[int, int], None]
"""Told how much of a task is done: ``(done, total)``."""
