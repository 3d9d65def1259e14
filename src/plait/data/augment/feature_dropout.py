"""Feature dropout: pictures made uncertain, as those are that a connector never saw."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch

from plait.core.tensors import Patches
from plait.data.order import generator


@dataclass(frozen=True, slots=True, kw_only=True)
class FeatureDropout:
    """Set part of a picture's features to 0 and scale the others up; from some step on, more and more.

    Each picture of a step has its own share, drawn evenly between ``least`` and ``most``, so that clear and hardly
    recognizable ones are side by side. Dropout as in Srivastava et al., "Dropout", JMLR 2014; the spread of shares is
    ours. What is drawn depends on seed, step and picture alone. (A connector that begins with a norm does not see the
    scaling.)

    Attributes:
        least: Share that is dropped at least once the rise is over.
        most: And at most.
        first: Finished steps up to which nothing is dropped.
        full: Finished steps from which on the shares are as said; between, they rise in a straight line.
        seed: Of what is dropped.
    """

    least: float
    most: float
    first: int
    full: int
    seed: int

    def __call__(self, features: Mapping[str, Patches], step: int) -> dict[str, Patches]:
        """Features by sha256 to changed ones of the same shapes."""
        strength = self.strength(step)
        if strength == 0.0:
            return dict(features)
        draws = {sha256: generator(self.seed, f"drop {sha256}", step) for sha256 in features}
        return {sha256: self._drop(media, strength, draws[sha256]) for sha256, media in features.items()}

    def strength(self, step: int) -> float:
        """From 0 to 1: how far the rise is after ``step`` finished steps.

        Example:
            >>> drop = FeatureDropout(least=0.0, most=0.8, first=10, full=20, seed=0)
            >>> [drop.strength(step) for step in (5, 15, 30)]
            [0.0, 0.5, 1.0]
        """
        if step <= self.first:
            return float(step >= self.full)
        return min(1.0, (step - self.first) / max(1, self.full - self.first))

    def _drop(self, media: Patches, strength: float, draw: torch.Generator) -> Patches:
        share = strength * (self.least + (self.most - self.least) * float(torch.rand((), generator=draw)))
        kept = torch.rand(media.values.shape, generator=draw) >= share
        return Patches(values=media.values * kept.to(media.values.dtype) / (1.0 - share), grid=media.grid)
