"""What every training stage lets a recipe set: ``stages.<stage>.trainer``.

Numbers of steps, batch sizes and peak rates are the stage's own, since they differ from phase to phase.
"""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from plait.core.spec import Spec
from plait.training.optim import AdamW, Optimizer
from plait.training.schedule import Cosine, Schedule


class Trainer(Spec):
    """How a stage trains, in all of its phases.

    Example:
        >>> Trainer(schedule={"kind": "linear", "warmup": 0.1}).schedule.factor(10, 20)
        0.5555555555555556
    """

    optimizer: Optimizer = AdamW()
    """Which optimizer; one of another `kind` begins with its own defaults."""
    schedule: Schedule = Cosine()
    """How the learning rates move; one of another `kind` begins with its own defaults."""
    clip_norm: float | None = Field(default=1.0, gt=0.0)
    """Largest norm of the whole gradient: a longer one is scaled to it. null never clips."""
    head: Literal["fused", "full"] = "fused"
    """Loss over a vocabulary: `fused` goes through the scores of some positions after the others and keeps none;
    `full` computes all at once. Values and gradients are equal."""
    recompute: Literal["none", "full", "selective"] = "none"
    """What Transformer blocks keep for the backward pass: `none` recomputes nothing; `full` keeps a block's input alone
    and runs the block again; `selective` keeps the results of matrix products and attention, too. Gradients are the
    same bits."""
    compile: bool = False
    """Compile Transformer blocks while training (torch.compile): takes up to a minute at the start of a phase, and a
    C++ compiler. Results differ by rounding."""
