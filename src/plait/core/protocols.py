"""Protocols: what one package may ask of another without importing it.

Letters as in :mod:`plait.core.tensors`.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Protocol, runtime_checkable

from jaxtyping import Int
from torch import Tensor, nn

from plait.core.tensors import Batch, Patches
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
class Objective(Protocol):
    """A loss as sums and counts, so that micro-batches and ranks add up to the big batch exactly.

    ``needs_global_batch`` is True for terms that do not add over rows (pairwise losses); these need the whole batch
    at once, or cached gradients.
    """

    needs_global_batch: bool

    def count(self, batch: Batch) -> Mapping[str, Tensor]:
        """Units each term is normalized by, such as trained tokens."""
        ...

    def __call__(self, model: nn.Module, batch: Batch) -> Mapping[str, Tensor]:
        """Sums of each term over the batch; the loop divides by the global count."""
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
