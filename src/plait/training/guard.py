"""What a run does where a step goes wrong: the recipe's ``trainer.guard``, and how a spike is told from noise.

A value is compared with the median of the values before it, in units of their spread: 1.4826 times the median distance
from the median, which is the standard deviation where they are normal. Neither moves for single outliers, and a spike
never joins the values that later ones are compared with.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from statistics import median
from typing import Any, Literal

from pydantic import Field

from plait.core.spec import Spec

LEAST = 20
"""Values before anything is judged: fewer say little about their spread."""

_NORMAL = 1.4826  # median distance from the median → standard deviation, of a normal distribution
_LEAST_LOSS = 0.05  # of the median: a loss that hardly moves has hardly a spread, and no spikes of some percent
_LEAST_NORM = 0.25  # of the logarithm of a norm: with 10 sigma, a spike is at least 12 times the usual


class Guard(Spec):
    """What happens where a step goes wrong. The samples are named, and every step that is left out is counted."""

    spike: Literal["off", "warn", "skip", "rewind", "stop"] = "warn"
    """A loss or gradient norm far above those before it: `warn` says so; `skip` leaves the update out, and ten left out
    in a row end the run (or go back, where `not_finite` is `rewind`); `rewind` puts weights and optimizer back to the
    last checkpoint and goes on with the data after the spike; `stop` ends the run."""
    sigma: float = Field(default=10.0, gt=0.0)
    """How far above, in standard deviations of the values before, computed so that outliers do not move them."""
    window: int = Field(default=128, ge=LEAST)
    """How many values before are looked at; at least 20 must be there."""
    not_finite: Literal["skip", "rewind", "stop"] = "skip"
    """A loss or gradient that is not a number: `skip` leaves the update out, and ten in a row end the run; `rewind`
    goes back to the last checkpoint after these ten instead; `stop` ends the run at the first."""
    rewinds: int = Field(default=3, ge=1)
    """How often a run may go back; once more ends it."""
    out_of_memory: Literal["split", "stop"] = "split"
    """Where a step does not fit the memory: `split` does it again in micro-batches of half the rows, as all later ones,
    with the same gradient; `stop` ends the run."""

    @property
    def actions(self) -> tuple[str, str]:
        """What is done about spikes, and about numbers that are not finite."""
        return self.spike, self.not_finite


@dataclass(frozen=True, slots=True, kw_only=True)
class Spike:
    """A value far above those before it.

    Attributes:
        name: ``loss`` or ``grad_norm``.
        value: What came.
        usual: The median of those before.
        sigma: Standard deviations between the two; of a norm, in its logarithm.
    """

    name: str
    value: float
    usual: float
    sigma: float

    def __str__(self) -> str:
        return (
            f"{self.name.replace('_', ' ')} {self.value:.4g}, {self.sigma:.0f} sigma above the usual {self.usual:.4g}"
        )


class Watch:
    """The last losses and gradient norms of one run.

    Args:
        guard: Settings.
        state: What :meth:`plain` gave, of a run that goes on.
    """

    def __init__(self, guard: Guard, state: Mapping[str, Any] | None = None) -> None:
        self.guard = guard
        before: Mapping[str, Sequence[float]] = state or {}
        self._values: dict[str, list[float]] = {
            name: list(before.get(name, ()))[-guard.window :] for name in ("loss", "grad_norm")
        }

    def plain(self) -> dict[str, list[float]]:
        """As plain data, for the checkpoint."""
        return {name: list(values) for name, values in self._values.items()}

    def judge(self, loss: float, grad_norm: float) -> Spike | None:
        """Whether these finite values are a spike; nothing is remembered."""
        if self.guard.spike == "off":
            return None
        for name, value in (("loss", loss), ("grad_norm", grad_norm)):
            values = self._values[name]
            if len(values) < LEAST:
                continue
            usual = median(values)
            above = _above(value, values) if name == "loss" else _above_norm(value, values)
            if above > self.guard.sigma:
                return Spike(name=name, value=value, usual=usual, sigma=above)
        return None

    def took(self, loss: float, grad_norm: float) -> None:
        """Remember a step whose update was made and is no spike."""
        for name, value in (("loss", loss), ("grad_norm", grad_norm)):
            self._values[name] = [*self._values[name], value][-self.guard.window :]

    def forget(self) -> None:
        """Begin anew: what came for long is the new usual."""
        for values in self._values.values():
            values.clear()


def _above(value: float, values: Sequence[float], *, least: float | None = None) -> float:
    """Standard deviations from the median; ``least`` is the smallest that is believed."""
    usual = median(values)
    spread = _NORMAL * median([abs(one - usual) for one in values])
    least = _LEAST_LOSS * abs(usual) if least is None else least
    gap = value - usual
    if gap <= 0:
        return 0.0
    return gap / max(spread, least) if max(spread, least) > 0 else math.inf


def _above_norm(value: float, values: Sequence[float]) -> float:
    """The same of logarithms: norms are skewed. One of exactly 0 says nothing."""
    logs = [math.log(one) for one in values if one > 0]
    if value <= 0 or len(logs) < LEAST:
        return 0.0
    return _above(math.log(value), logs, least=_LEAST_NORM)
