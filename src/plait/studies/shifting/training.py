"""One small training through the one loop, with or without alignment, and what it gets right in each domain."""

import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from plait.core.device import Compute
from plait.core.errors import NumericsError
from plait.core.events import Events
from plait.core.protocols import Objective
from plait.core.tensors import IGNORE, Batch, Patches
from plait.models.connectors.domain import FeatureAlignment
from plait.objectives.domain import Adversarial, Aligned, coral, mmd
from plait.studies.domains import Arm
from plait.studies.shifting.digits import CLASSES, SIDE, Digits
from plait.training.loop import fit
from plait.training.optim import SGD, Rates
from plait.training.schedule import Cosine
from plait.training.settings import Settings

_CPU = Compute(device="cpu", dtype="float32", threads=1, why=("small trainings, one in each process",))


class Student(nn.Module):
    """Pictures to features, a layer that may align them, and a linear classifier.

    Args:
        d_hidden: Width of the hidden layer.
        d: Width of the features.
    """

    def __init__(self, d_hidden: int, d: int) -> None:
        super().__init__()
        self.tower = nn.Sequential(nn.Linear(SIDE * SIDE, d_hidden), nn.ReLU(), nn.Linear(d_hidden, d), nn.ReLU())
        self.layer = FeatureAlignment(d).requires_grad_(False)
        self.classify = nn.Linear(d, CLASSES)

    def features(self, pixels: Float[Tensor, "b side side"]) -> Float[Tensor, "b d"]:
        """Before the layer."""
        return self.tower(pixels.flatten(1))

    def forward(self, batch: Batch) -> tuple[Float[Tensor, "b d"], Float[Tensor, "b c"]]:
        """Features that are aligned, and scores."""
        media = batch.media["image"]
        found = self.layer(Patches(values=self.features(media.values.view(-1, SIDE, SIDE)), grid=media.grid)).values
        return found, self.classify(found)


@dataclass(frozen=True, slots=True, kw_only=True)
class Training:
    """How a student is trained.

    Attributes:
        arm: How domains are aligned.
        lr: Peak learning rate of gradient descent with momentum; 5 % warm-up, then a cosine to 0.
        strength: Of the arm (:class:`plait.studies.domains.Strengths`).
        steps: Updates.
        batch: Pictures of each domain an update.
        seed: Of first weights and of the choice of pictures.
    """

    arm: Arm
    lr: float
    strength: float
    steps: int
    batch: int
    seed: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Domains:
    """Batches of both domains, drawn with replacement: a function of the step.

    Attributes:
        source: With labels.
        target: Whose labels are not read.
        batch: Pictures of each.
        seed: Of the choice.
    """

    source: Digits
    target: Digits
    batch: int
    seed: int

    def step_batches(self, step: int) -> Sequence[Batch]:
        """Rows of the source, then of the target."""
        generator = torch.Generator().manual_seed(1_000_003 * (self.seed + 1) + step)
        one, other = (torch.randint(len(of), (self.batch,), generator=generator) for of in (self.source, self.target))
        pixels = torch.cat([self.source.pixels[one], self.target.pixels[other]])
        ids = tuple(f"{name}-{i}" for name, rows in (("source", one), ("target", other)) for i in rows.tolist())
        return [batch_of(pixels, torch.cat([self.source.classes[one], torch.full_like(other, IGNORE)]), ids)]


def batch_of(pixels: Float[Tensor, "b side side"], classes: Int[Tensor, " b"], ids: Sequence[str]) -> Batch:
    """Pictures and their classes; each is one token to whatever comes behind."""
    rows = len(pixels)
    return Batch(
        token_ids=torch.zeros(rows, 1, dtype=torch.long),
        labels=classes[:, None],
        segment_ids=torch.ones(rows, 1, dtype=torch.long),
        media={"image": Patches(values=pixels.flatten(1), grid=torch.ones(rows, 3, dtype=torch.long))},
        item_row={"image": torch.arange(rows)},
        sample_ids=tuple(ids),
    )


def objective_of(arm: Arm, strength: float, *, d: int) -> tuple[Objective, dict[str, float]]:
    """What an arm minimizes, and the weights of its terms. Without alignment the distance is only looked at."""
    match arm:
        case "none" | "layer":
            return Aligned(coral), {"align": 0.0}
        case "coral":
            return Aligned(coral), {"align": strength}
        case "mmd":
            return Aligned(mmd), {"align": strength}
        case "dann":
            judge = nn.Sequential(nn.Linear(d, 2 * d), nn.ReLU(), nn.Linear(2 * d, 1))
            return Adversarial(judge, strength=strength), {}


@dataclass(frozen=True, slots=True, kw_only=True)
class Trained:
    """What came of a training.

    Attributes:
        student: As it was left.
        diverged: Whether numbers stopped being finite, so that it ended early.
    """

    student: Student
    diverged: bool


def train(source: Digits, target: Digits, training: Training, *, d_hidden: int, d: int) -> Trained:
    """A student that learned from the labels of one domain and the pictures of both."""
    torch.manual_seed(training.seed)
    student = Student(d_hidden, d).train()
    objective, weights = objective_of(training.arm, training.strength, d=d)
    settings = Settings(
        steps=training.steps,
        compute=_CPU,
        seed=training.seed,
        rates=Rates(lr=training.lr),
        optimizer=SGD(momentum=0.9, weight_decay=training.strength if training.arm == "none" else 0.0),
        schedule=Cosine(warmup=0.05),
        weights=weights,
        clip_norm=None,
        log_every=training.steps,
    )
    batches = Domains(source=source, target=target, batch=training.batch, seed=training.seed)
    diverged = False
    with tempfile.TemporaryDirectory(prefix="plait-domains-") as folder:
        try:
            fit(student, objective, batches, settings=settings, folder=Path(folder), events=Events())
        except NumericsError:
            diverged = True
    if training.arm == "layer":
        with torch.no_grad():
            given, wanted = (student.features(of.pixels) for of in (target, source))
        if bool(given.var(0).any()):  # where all features are equal there is nothing to map
            student.layer.fit(given=given, wanted=wanted, ridge=training.strength)
    return Trained(student=student.eval(), diverged=diverged)


@torch.inference_mode()
def answers(student: Student, pictures: Digits, *, aligned: bool = True) -> Int[Tensor, " b"]:
    """The class of each picture.

    Args:
        student: Trained.
        pictures: Of either domain.
        aligned: Whether they pass the layer, which was set for the target; as it comes it changes nothing.
    """
    features = student.features(pictures.pixels)
    if aligned:
        grid = torch.ones(len(features), 3, dtype=torch.long)
        features = student.layer(Patches(values=features, grid=grid)).values
    return student.classify(features).argmax(-1)


def right(student: Student, pictures: Digits, *, aligned: bool = True) -> float:
    """Share of right answers."""
    return float((answers(student, pictures, aligned=aligned) == pictures.classes).double().mean())
