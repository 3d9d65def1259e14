"""One small training of a reader, and how many steps it takes to a loss."""

from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional

from plait.studies.stacking.students import Reader
from plait.studies.stacking.tasks import SKIP, Batch, Task, right
from plait.training.optim import AdamW, Rates
from plait.training.schedule import Constant, Cosine

WINDOW = 10
"""Losses of so many updates are averaged, each on sequences never seen before."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Training:
    """How a reader is trained.

    Attributes:
        steps: Updates, at most.
        batch: Sequences an update.
        lr: Peak learning rate of AdamW without decay, after 5 % of warm-up.
        until: Stop when the mean loss of ten updates is no more; the rate then stays at its peak, so that
            the steps allowed change only its warm-up, which is 5 % of them. Without it the rate falls to 0 on a cosine.
    """

    steps: int
    batch: int
    lr: float
    until: float | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Trained:
    """What a training came to.

    Attributes:
        loss: Mean of the last ten updates.
        steps: Updates until the wanted loss; None: not within those allowed, or none was wanted.
    """

    loss: float
    steps: int | None


def train(reader: Reader, task: Task, training: Training, *, generator: torch.Generator) -> Trained:
    """Train on fresh sequences.

    The one loop of :mod:`plait.training` would keep checkpoints and metrics of hundreds of tiny runs; this one keeps
    nothing.
    """
    optimizer = AdamW().build(dict(reader.named_parameters()), rates=Rates(lr=training.lr))
    schedule = Cosine(warmup=0.05) if training.until is None else Constant(warmup=0.05)
    reader.train()
    losses: list[float] = []
    for step in range(training.steps):
        loss = loss_of(reader, task.draw(training.batch, generator))
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(reader.parameters(), 1.0)
        for group in optimizer.param_groups:
            group["lr"] = group["peak_lr"] * schedule.factor(step, training.steps)
        optimizer.step()
        losses.append(float(loss.detach()))
        if training.until is not None and len(losses) >= WINDOW and _recent(losses) <= training.until:
            return Trained(loss=_recent(losses), steps=step + 1)
    return Trained(loss=_recent(losses), steps=None)


def loss_of(reader: Reader, batch: Batch) -> Tensor:
    """Mean cross-entropy of all answers that are asked."""
    return functional.cross_entropy(reader(batch.ids).flatten(0, 2), batch.targets.flatten(), ignore_index=SKIP)


@torch.inference_mode()
def accuracy(reader: Reader, batch: Batch) -> list[float]:
    """Share of right answers to each question."""
    return right(reader.eval()(batch.ids), batch.targets)


def _recent(losses: list[float]) -> float:
    recent = losses[-WINDOW:]
    return sum(recent) / len(recent)
