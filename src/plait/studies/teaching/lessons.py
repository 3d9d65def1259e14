"""One small training through the training loop, in a folder that goes away, and what is right afterwards."""

from __future__ import annotations

import tempfile
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn import functional

from plait.core.device import Compute
from plait.core.events import Events
from plait.core.protocols import Batches
from plait.studies.teaching.samples import Samples
from plait.studies.teaching.students import Classify
from plait.training.loop import fit
from plait.training.optim import Rates
from plait.training.schedule import Cosine
from plait.training.settings import FitResult, Settings

_ROWS = 500


@dataclass(frozen=True, slots=True, kw_only=True)
class Lesson:
    """How a model is trained: AdamW without decay, 5 % warm-up, cosine to 0, gradients clipped at 1.

    Attributes:
        steps: Updates.
        lr: Peak learning rate.
        seed: Of what is drawn while training.
        layer_decay: Rate of a layer over that of the layer above it.
        dtype: Of autocast.
    """

    steps: int
    lr: float
    seed: int
    layer_decay: float = 1.0
    dtype: str = "float32"

    def settings(self) -> Settings:
        """For the training loop."""
        return Settings(
            steps=self.steps,
            compute=Compute(device="cpu", dtype=self.dtype, threads=1, why=()),
            seed=self.seed,
            rates=Rates(lr=self.lr, layer_decay=self.layer_decay),
            schedule=Cosine(warmup=0.05),
            log_every=self.steps,
        )


def teach(model: nn.Module, batches: Batches, lesson: Lesson) -> FitResult:
    """Train what ``requires_grad``; the model keeps its last weights."""
    model.train()
    with tempfile.TemporaryDirectory(prefix="plait-study-") as folder:
        return fit(model, Classify(), batches, settings=lesson.settings(), folder=Path(folder), events=Events())


@dataclass(frozen=True, slots=True, kw_only=True)
class Marks:
    """How good a model is.

    Attributes:
        right: Share of targets with the highest score.
        loss: Mean cross-entropy, in nats.
    """

    right: float
    loss: float


@torch.inference_mode()
def marks(model: nn.Module, samples: Samples) -> Marks:
    """In float32, whatever it was trained in."""
    model.eval()
    rows = torch.arange(len(samples)).split(_ROWS)
    return marked(torch.cat([model(samples.take(part).batch()) for part in rows]), samples)


def marked(scores: Tensor, samples: Samples) -> Marks:
    """Of scores of all samples."""
    targets = samples.targets.flatten()
    right = (scores.argmax(-1) == targets).double().mean()
    return Marks(right=float(right), loss=float(functional.cross_entropy(scores.double(), targets)))
