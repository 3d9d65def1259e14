"""One small training of an encoder on scenes, and what it gets right on others."""

from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn
from torch.nn import functional

from plait.studies.seeing.scenes import QUESTIONS, SKIP, Region, Scenes, draw_scenes
from plait.studies.seeing.students import Said, Student
from plait.training.optim import AdamW, Rates
from plait.training.schedule import Cosine

MARKS_WEIGHT = 8.0
"""Of the loss of marks, a mean over 64 cells of which about 2 hold one; each question counts 1."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Training:
    """How a student is trained.

    Attributes:
        steps: Updates.
        batch: Pictures an update.
        lr: Peak learning rate of AdamW; 5 % warm-up, then a cosine to 0.
        pictures: How many different ones there are; 0: every update has new ones.
        region: Where objects stand in them.
    """

    steps: int
    batch: int
    lr: float
    pictures: int = 0
    region: Region = "anywhere"


def train(student: Student, training: Training, *, generator: torch.Generator) -> float:
    """Train; returns the mean loss of the last tenth of the steps."""
    optimizer = AdamW(weight_decay=0.05).build(dict(student.named_parameters()), rates=Rates(lr=training.lr))
    schedule = Cosine(warmup=0.05)
    pool = draw_scenes(training.pictures, generator, region=training.region) if training.pictures else None
    student.train()
    losses: list[Tensor] = []
    for step in range(training.steps):
        if pool is None:
            batch = draw_scenes(training.batch, generator, region=training.region)
        else:
            batch = pool.take(torch.randint(len(pool), (training.batch,), generator=generator))
        loss = loss_of(student(batch.pixels), batch)
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(student.parameters(), 1.0)
        for group in optimizer.param_groups:
            group["lr"] = group["peak_lr"] * schedule.factor(step, training.steps)
        optimizer.step()
        losses.append(loss.detach())
    return float(torch.stack(losses[-max(1, training.steps // 10) :]).mean())


def loss_of(said: Said, batch: Scenes) -> Float[Tensor, ""]:
    """Sum over questions, and marks."""
    loss = MARKS_WEIGHT * functional.binary_cross_entropy_with_logits(said.marks, batch.marks)
    for question in QUESTIONS:
        loss = loss + functional.cross_entropy(
            said.answers[question].flatten(0, -2), batch.targets[question].flatten(), ignore_index=SKIP
        )
    return loss


@torch.inference_mode()
def ask(student: Student, scenes: Scenes, *, batch: int = 256) -> dict[str, float]:
    """Share of right answers of each question, and average precision of marks (``marks``)."""
    student.eval()
    right: dict[str, list[Tensor]] = {question: [] for question in QUESTIONS}
    marks: list[Tensor] = []
    for rows in torch.arange(len(scenes)).split(batch):
        part = scenes.take(rows)
        said = student(part.pixels)
        marks.append(said.marks)
        for question in QUESTIONS:
            target = part.targets[question]
            right[question].append((said.answers[question].argmax(-1) == target)[target != SKIP])
    found = {question: float(torch.cat(parts).double().mean()) for question, parts in right.items()}
    found["marks"] = average_precision(torch.cat(marks).flatten(), scenes.marks.flatten() > 0)
    return found


def average_precision(scores: Float[Tensor, " n"], positive: Bool[Tensor, " n"]) -> float:
    """Mean over positives of the precision at their rank; ties in the order in which they come.

    Example:
        >>> average_precision(torch.tensor([0.9, 0.8, 0.7]), torch.tensor([True, False, True])).__round__(4)
        0.8333
    """
    order = np.argsort(-scores.numpy(), kind="stable")
    hits = positive.numpy()[order]
    if not hits.any():
        return float("nan")
    precision = hits.cumsum() / np.arange(1, len(hits) + 1)
    return float(precision[hits].mean())
