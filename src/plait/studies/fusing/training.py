"""One small training of a fusion, what it gets right with and without a modality, and whom the gradient moves."""

from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn
from torch.nn import functional

from plait.models.fusion.missing import ModalityDropout
from plait.models.fusion.streams import Stream, only
from plait.studies.fusing.students import Student
from plait.studies.fusing.tasks import MODALITIES, A, B, Batch, Truth
from plait.training.optim import AdamW, Rates
from plait.training.schedule import Cosine


@dataclass(frozen=True, slots=True, kw_only=True)
class Training:
    """How a student is trained.

    Attributes:
        steps: Updates.
        batch: Samples an update.
        lr: Peak learning rate of AdamW without decay; 5 % warm-up, then a cosine to 0.
        dropped: Probability of dropping each modality of a sample; never both.
    """

    steps: int
    batch: int
    lr: float
    dropped: float = 0.0


def train(student: Student, truth: Truth, training: Training, *, generator: torch.Generator) -> float:
    """Train on fresh samples; returns the mean loss of the last tenth of the steps.

    The one loop of :mod:`plait.training` would keep checkpoints and metrics of hundreds of tiny runs; this one keeps
    nothing.
    """
    optimizer = AdamW().build(dict(student.named_parameters()), rates=Rates(lr=training.lr))
    schedule = Cosine(warmup=0.05)
    drop = ModalityDropout(dict.fromkeys(MODALITIES, training.dropped)).train()
    student.train()
    losses: list[Tensor] = []
    for step in range(training.steps):
        batch = truth.draw(training.batch, generator)
        inputs = drop(batch.inputs, generator) if training.dropped else batch.inputs
        loss = functional.cross_entropy(student(inputs), batch.labels)
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(student.parameters(), 1.0)
        for group in optimizer.param_groups:
            group["lr"] = group["peak_lr"] * schedule.factor(step, training.steps)
        optimizer.step()
        losses.append(loss.detach())
    return float(torch.stack(losses[-max(1, training.steps // 10) :]).mean())


@torch.inference_mode()
def right(student: Student, batch: Batch, *, lost: bool = False) -> Bool[Tensor, " b"]:
    """Which samples it gets right.

    Args:
        student: Trained.
        batch: Samples it did not learn from.
        lost: Whether modality b is absent.
    """
    inputs = only(batch.inputs, [A]) if lost else batch.inputs
    return student.eval()(inputs).argmax(-1) == batch.labels


def with_noise(batch: Batch, noise: float, *, generator: torch.Generator) -> Batch:
    """The same samples with Gaussian noise added to modality b."""
    clean = batch.inputs[B].tokens
    added = noise * torch.randn(clean.shape, generator=generator)
    return Batch(inputs={**batch.inputs, B: Stream(tokens=clean + added)}, labels=batch.labels)


def dropped_at(rate: float, draws: Float[Tensor, " b"], *, whole: Tensor, alone: Tensor) -> float:
    """Share of right answers where each sample has lost the modality with a probability; fusions see samples apart.

    Args:
        rate: The probability.
        draws: Uniform, one a sample: samples that are lost at one rate are lost at every higher one.
        whole: Which samples are right with both modalities.
        alone: Which are without.

    Example:
        >>> draws, whole, alone = torch.tensor([0.2, 0.7]), torch.tensor([True, True]), torch.tensor([False, False])
        >>> [dropped_at(rate, draws, whole=whole, alone=alone) for rate in (0.0, 0.5, 1.0)]
        [1.0, 0.5, 0.0]
    """
    return float(torch.where(draws < rate, alone, whole).double().mean())


def gradient_shares(student: Student, batch: Batch) -> dict[str, float]:
    """How much of the gradient goes to each modality: what a linear layer before the fusion would get.

    That layer is the identity; it need not be built, since its gradient is the sum over samples of the gradient to the
    input times the input. The share is that of its Frobenius norm among those of all modalities; 0 for all where there
    is no gradient. A factor on a modality that is normalized changes nothing.

    Args:
        student: The weights are not moved.
        batch: Samples.
    """
    vectors = {name: stream.tokens.clone().requires_grad_() for name, stream in batch.inputs.items()}
    inputs = {name: Stream(tokens=tokens) for name, tokens in vectors.items()}
    loss = functional.cross_entropy(student.eval()(inputs), batch.labels)
    found = torch.autograd.grad(loss, list(vectors.values()))
    norms = [
        float(torch.einsum("bni,bnj->ij", gradient, x.detach()).norm())
        for gradient, x in zip(found, vectors.values(), strict=True)
    ]
    total = sum(norms)
    return {name: norm / total if total else 0.0 for name, norm in zip(vectors, norms, strict=True)}
