"""How the learning rate moves: pure functions of the step, so that a resumed run needs no schedule state."""

from __future__ import annotations

import math
from typing import Annotated, ClassVar, Literal

from pydantic import AfterValidator, Field

from plait.core.spec import Spec


def _whole(value: float) -> float:
    if value >= 1 and value != int(value):
        raise ValueError(f"{value} steps: give a whole number of steps, or a share below 1")
    return value


Length = Annotated[float, Field(ge=0.0), AfterValidator(_whole)]
"""Below 1: share of all steps; 1 or more: steps."""

Floor = Annotated[float, Field(ge=0.0, le=1.0)]
"""Share of the peak."""


def steps_of(length: float, total: int) -> int:
    """Steps that a :data:`Length` means in a run of ``total`` steps; a share is rounded up."""
    return math.ceil(length * total) if length < 1 else int(length)


class _Warm(Spec):
    """What every schedule has: a linear rise from zero to the peak."""

    source: ClassVar[str]
    """Where it comes from."""

    warmup: Length = 0.0
    """Length of the rise. Below 1: share of all steps; 1 or more: steps."""

    def warmup_steps(self, total: int) -> int:
        """Steps of the rise in a run of ``total`` steps; a share is rounded up."""
        return steps_of(self.warmup, total)

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
        return step / rise if step < rise else self._after(step, rise, total)

    def _after(self, step: int, rise: int, total: int) -> float:
        """Factor once the rise is over."""
        raise NotImplementedError


class Constant(_Warm):
    """Stays at the peak after the rise."""

    source: ClassVar[str] = "https://arxiv.org/abs/1706.02677"
    kind: Literal["constant"] = "constant"
    """Which schedule."""

    def _after(self, step: int, rise: int, total: int) -> float:
        return 1.0


class Linear(_Warm):
    """Falls in a straight line from the peak to the floor."""

    source: ClassVar[str] = "https://arxiv.org/abs/1706.02677"
    kind: Literal["linear"] = "linear"
    """Which schedule."""

    floor: Floor = 0.0
    """Where it ends, as a share of the peak."""

    def _after(self, step: int, rise: int, total: int) -> float:
        return self.floor + (1.0 - self.floor) * (1.0 - _share(step, rise, total))


class Cosine(_Warm):
    """Falls along half a cosine from the peak to the floor.

    ``floor + (1 - floor)(1 + cos(pi share)) / 2``: Loshchilov and Hutter, "SGDR: Stochastic Gradient
    Descent with Warm Restarts", ICLR 2017; without restarts.
    """

    source: ClassVar[str] = "https://arxiv.org/abs/1608.03983"
    kind: Literal["cosine"] = "cosine"
    """Which schedule."""

    floor: Floor = 0.0
    """Where it ends, as a share of the peak."""

    def _after(self, step: int, rise: int, total: int) -> float:
        return self.floor + (1.0 - self.floor) * 0.5 * (1.0 + math.cos(math.pi * _share(step, rise, total)))


class Polynomial(_Warm):
    """Falls as a power of the share of steps that is left.

    ``floor + (1 - floor)(1 - share) ** power``.
    """

    source: ClassVar[str] = "https://arxiv.org/abs/1606.00915"
    kind: Literal["polynomial"] = "polynomial"
    """Which schedule."""

    power: float = Field(default=2.0, gt=0.0)
    """Exponent; 1 is a straight line."""

    floor: Floor = 0.0
    """Where it ends, as a share of the peak."""

    def _after(self, step: int, rise: int, total: int) -> float:
        return self.floor + (1.0 - self.floor) * (1.0 - _share(step, rise, total)) ** self.power


class InverseSqrt(_Warm):
    """Falls as one over the root of the steps, whatever their number in all.

    ``sqrt(t / (t + steps since the rise))``: Vaswani et al., "Attention Is All You Need", NeurIPS 2017,
    section 5.3, with the rise's steps as ``t``.
    """

    source: ClassVar[str] = "https://arxiv.org/abs/1706.03762"
    kind: Literal["inverse-sqrt"] = "inverse-sqrt"
    """Which schedule."""

    timescale: int = Field(default=0, ge=0)
    """After so many steps since the rise, times three, half of the peak is left; 0 takes the rise's steps (10,000
    without a rise)."""

    def _after(self, step: int, rise: int, total: int) -> float:
        scale = self.timescale or rise or 10_000
        return math.sqrt(scale / (scale + step - rise))


class Wsd(_Warm):
    """Rises, stays at the peak, falls in the last steps: warm-up, stable, decay.

    A longer run keeps all but the fall, so that it can go on from a checkpoint before it. Hu et al., "MiniCPM" (arXiv
    2404.06395), section 4; the form ``1-sqrt`` from Hägele et al. (arXiv 2405.18392).
    """

    source: ClassVar[str] = "https://arxiv.org/abs/2404.06395"
    kind: Literal["wsd"] = "wsd"
    """Which schedule."""

    fall: Length = 0.1
    """Length of the fall at the end. Below 1: share of all steps; 1 or more: steps."""

    form: Literal["1-sqrt", "linear", "cosine"] = "1-sqrt"
    """How it falls."""

    floor: Floor = 0.0
    """Where it ends, as a share of the peak."""

    def _after(self, step: int, rise: int, total: int) -> float:
        begin = max(rise, total - steps_of(self.fall, total))
        if step < begin:
            return 1.0
        share = _share(step, begin, total)
        if self.form == "linear":
            left = 1.0 - share
        elif self.form == "cosine":
            left = 0.5 * (1.0 + math.cos(math.pi * share))
        else:
            left = 1.0 - math.sqrt(share)
        return self.floor + (1.0 - self.floor) * left


Schedule = Annotated[Cosine | Linear | Constant | Polynomial | InverseSqrt | Wsd, Field(discriminator="kind")]
"""Any schedule, chosen by ``kind``."""


def _share(step: int, begin: int, total: int) -> float:
    """How much of the way from ``begin`` to the last step is done."""
    return min(1.0, (step - begin) / max(1, total - begin))
