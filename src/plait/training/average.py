"""An exponential moving average of the trained weights: smoother than the weights of any one step.

Polyak and Juditsky 1992; with the usual warm-up of the decay, without which the start weighs for 1 / (1 - decay) steps.
"""

from __future__ import annotations

import contextlib
from collections.abc import Generator, Mapping

import torch
from torch import Tensor, nn

from plait.core import dtensors


class MovingAverage:
    """Holds ``a <- d a + (1 - d) w``, with ``d = min(decay, (1 + t) / (10 + t))`` at update ``t`` (from 0).

    Buffers (running means of batch norm) are not averaged.

    Args:
        weights: What is averaged, by name; begins with their values.
        decay: Share of the old average that stays, once warm.
    """

    def __init__(self, weights: Mapping[str, nn.Parameter], *, decay: float) -> None:
        self._weights = dict(weights)
        self._decay = decay
        self.updates = 0
        self._means: dict[str, Tensor] = {}
        self.begin()

    def begin(self) -> None:
        """Begin anew, with the values that the weights have now."""
        self._means = {name: weight.detach().clone() for name, weight in self._weights.items()}
        self.updates = 0

    @property
    def decay(self) -> float:
        """Share of the old average that stays at the next update."""
        return min(self._decay, (1 + self.updates) / (10 + self.updates))

    @torch.no_grad()
    def update(self) -> None:
        """Take in the weights as they are now."""
        means = [dtensors.local(mean) for mean in self._means.values()]
        weights = [dtensors.local(weight.detach()) for weight in self._weights.values()]
        if means:  # a stage of a pipeline may have nothing that learns
            torch._foreach_lerp_(means, weights, 1 - self.decay)
        self.updates += 1

    @contextlib.contextmanager
    def in_place(self) -> Generator[None]:
        """The model has the average for its weights inside the block; nothing is copied."""
        self._swap()
        try:
            yield
        finally:
            self._swap()

    @torch.no_grad()
    def copy_to_model(self) -> None:
        """Give the model the average for good."""
        for name, weight in self._weights.items():
            weight.copy_(self._means[name])

    def tensors(self) -> dict[str, Tensor]:
        """The average, by the names of the weights."""
        return dict(self._means)

    def restore(self, tensors: Mapping[str, Tensor], *, updates: int) -> None:
        """Go on from what :meth:`tensors` and :attr:`updates` were."""
        for name, mean in self._means.items():
            mean.copy_(dtensors.spread_like(tensors[name], mean))
        self.updates = updates

    def _swap(self) -> None:
        for name, weight in self._weights.items():
            weight.data, self._means[name] = self._means[name], weight.data
