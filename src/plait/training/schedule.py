"""How the learning rate moves: pure functions of the step, so that a resumed run needs no schedule state."""

from __future__ import annotations

import math
from typing import Annotated, Literal

from pydantic import Field, field_validator

from plait.core.spec import Spec


class _Warm(Spec):
    """What every schedule has: a linear rise from zero to the peak."""

    warmup: float = Field(default=0.0, ge=0.0)
    """Length of the rise. Below 1: share of all steps; 1 or more: steps."""

    @field_validator("warmup")
    @classmethod
    def _whole(cls, value: float) -> float:
        if value >= 1 and value != int(value):
            raise ValueError(f"{value} steps: give a whole number of steps, or a share below 1")
        return value

    def warmup_steps(self, total: int) -> int:
        """Steps of the rise in a run of ``total`` steps; a share is rounded up."""
        return math.ceil(self.warmup * total) if self.warmup < 1 else int(self.warmup)

    def factor(self, step: int, total: int) -> float:
        """Share of the peak rate that the update after ``step`` finished steps uses.

        As in transformers, the very first update of a rise has rate 0: it only fills the optimizer's averages.

        Args:
            step: Finished steps, from 0.
            total: Steps of the whole run.

        Example:
            >>> [round(Cosine(warmup=2).factor(step, 6), 3) for step in range(6)]
            [0.0, 0.5, 1.0, 0.854, 0.5, 0.146]
        """
        rise = self.warmup_steps(total)
        if step < rise:
            return step / rise
        return self._after((step - rise) / max(1, total - rise))

    def _after(self, share: float) -> float:
        """Factor when ``share`` of the steps after the rise are finished."""
        raise NotImplementedError


class Constant(_Warm):
    """Stays at the peak after the rise."""

    kind: Literal["constant"] = "constant"
    """Which schedule."""

    def _after(self, share: float) -> float:
        return 1.0


class Linear(_Warm):
    """Falls in a straight line from the peak to the floor."""

    kind: Literal["linear"] = "linear"
    """Which schedule."""

    floor: float = Field(default=0.0, ge=0.0, le=1.0)
    """Where it ends, as a share of the peak."""

    def _after(self, share: float) -> float:
        return self.floor + (1.0 - self.floor) * max(0.0, 1.0 - share)


class Cosine(_Warm):
    """Falls along half a cosine from the peak to the floor: ``floor + (1 - floor)(1 + cos(pi share)) / 2``.

    Loshchilov and Hutter, "SGDR: Stochastic Gradient Descent with Warm Restarts", ICLR 2017; without restarts.
    """

    kind: Literal["cosine"] = "cosine"
    """Which schedule."""

    floor: float = Field(default=0.0, ge=0.0, le=1.0)
    """Where it ends, as a share of the peak."""

    def _after(self, share: float) -> float:
        return self.floor + (1.0 - self.floor) * 0.5 * (1.0 + math.cos(math.pi * min(1.0, share)))


Schedule = Annotated[Cosine | Linear | Constant, Field(discriminator="kind")]
"""Any schedule, chosen by ``kind``."""
