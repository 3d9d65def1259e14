"""Two modalities of Gaussian vectors, and labels whose rule is known: what the best answer is follows from it."""

import math
from dataclasses import dataclass
from typing import Literal

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor
from torch.nn import functional

from plait.models.fusion.streams import Stream, vector

TaskName = Literal["additive", "xor", "small", "centered", "shifted"]

A, B = "a", "b"
MODALITIES: tuple[str, ...] = (A, B)


@dataclass(frozen=True, slots=True, kw_only=True)
class Signals:
    """How loud things are; the noise of every number is 1.

    Attributes:
        factor: What the noise beside ``small`` is multiplied by.
        strengths: Half the distance of the two classes in a and in b, where both tell the label.
        offset: How far the mean of b is from 0 in ``shifted``, in the direction that tells the label.
    """

    factor: float = 1.0
    strengths: tuple[float, float] = (1.0, 1.5)
    offset: float = 3.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Batch:
    """Samples.

    Attributes:
        inputs: One vector of each modality.
        labels: 0 or 1.
    """

    inputs: dict[str, Stream]
    labels: Int[Tensor, " b"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Truth:
    """One drawn instance of a task: directions of unit length, ``u`` in modality a and ``v`` in b.

    - ``additive``: 1 where ``u.a + v.b > 0``.
    - ``xor``: 1 where ``u.a`` and ``v.b`` have the same sign; each modality alone says nothing.
    - ``small``: 1 where ``u.a > 0``; b is noise, ``factor`` times as large.
    - ``centered``: the label moves the mean of a along ``u`` and that of b along ``v``: both tell it, neither surely.
    - ``shifted``: the same, and b lies ``offset`` further along ``v``, whatever the label: 0 is then no neutral value.

    Attributes:
        task: Which rule.
        u: Direction in a.
        v: Direction in b.
        signals: How loud things are.
    """

    task: TaskName
    u: Float[Tensor, " d"]
    v: Float[Tensor, " d"]
    signals: Signals

    def draw(self, rows: int, generator: torch.Generator) -> Batch:
        """New samples; both labels are equally likely."""
        a, b = (torch.randn(rows, len(self.u), generator=generator) for _ in MODALITIES)
        signals = self.signals
        match self.task:
            case "additive":
                labels = a @ self.u + b @ self.v > 0
            case "xor":
                labels = (a @ self.u > 0) == (b @ self.v > 0)
            case "small":
                labels, b = a @ self.u > 0, b * signals.factor
            case "centered" | "shifted":
                labels = torch.rand(rows, generator=generator) < 0.5
                sign = 2.0 * labels[:, None] - 1.0
                a, b = a + signals.strengths[0] * sign * self.u, b + signals.strengths[1] * sign * self.v
                if self.task == "shifted":
                    b = b + signals.offset * self.v
        return Batch(inputs={A: vector(a), B: vector(b)}, labels=labels.long())

    def best(self, batch: Batch, *, lost: bool = False) -> Bool[Tensor, " b"]:
        """What the best rule answers, which knows the directions.

        Args:
            batch: Samples.
            lost: Whether b is not there; where a then says nothing, the answer is 1.
        """
        a, b = (batch.inputs[name].tokens[:, 0] @ way for name, way in ((A, self.u), (B, self.v)))
        match self.task:
            case "additive":
                return a + (0.0 if lost else b) > 0
            case "xor":
                return torch.ones_like(a).bool() if lost else (a > 0) == (b > 0)
            case "small":
                return a > 0
            case "centered" | "shifted":
                first, second = self.signals.strengths
                b = b - self.signals.offset if self.task == "shifted" else b
                return first * a + (0.0 if lost else second * b) > 0

    def ceiling(self, *, lost: float = 0.0, noise: float = 0.0) -> float:
        """Accuracy of the best rule.

        Args:
            lost: Share of samples that have lost b.
            noise: Of the other samples, what is added to every number of b, which the best rule knows; only where both
                modalities tell the label.

        Example:
            >>> truth = draw_truth("centered", 8, Signals(strengths=(1.0, 1.5)), seed=0)
            >>> [round(truth.ceiling(lost=share), 3) for share in (0.0, 0.5, 1.0)]
            [0.964, 0.903, 0.841]
        """
        first, second = self.signals.strengths
        match self.task:
            case "additive":  # the sign of one of two equal Gaussians tells that of their sum in 3 of 4 cases
                whole, alone = 1.0, 0.75
            case "xor":
                whole, alone = 1.0, 0.5
            case "small":
                whole, alone = 1.0, 1.0
            case "centered" | "shifted":
                whole, alone = _below(math.hypot(first, second / math.hypot(1, noise))), _below(first)
        return (1 - lost) * whole + lost * alone


def draw_truth(task: TaskName, d: int, signals: Signals, *, seed: int) -> Truth:
    """Directions at random.

    Args:
        task: Which rule.
        d: Width of each modality.
        signals: How loud things are.
        seed: Of the directions.
    """
    generator = torch.Generator().manual_seed(seed)
    u, v = (functional.normalize(torch.randn(d, generator=generator), dim=0) for _ in MODALITIES)
    return Truth(task=task, u=u, v=v, signals=signals)


def _below(z: float) -> float:
    """Share of a standard Gaussian below ``z``."""
    return 0.5 * (1 + math.erf(z / math.sqrt(2)))
