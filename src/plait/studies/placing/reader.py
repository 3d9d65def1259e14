"""A small Transformer that reads with a given position code: training, and answers at other sizes."""

import copy
from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.nn import functional

from plait.models.attention import Places, causal
from plait.models.position.relative import BucketBias, GridBias
from plait.models.transformer import Block, Transformer, TransformerSizes
from plait.studies.placing.codes import Code, Sides, fit
from plait.studies.placing.tasks import SKIP, Task
from plait.training.optim import AdamW, Rates
from plait.training.schedule import Cosine

BIAS_RATE = 10
"""How much faster tables of biases learn: a bias has to reach several units of score, from about 0, one step a time."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Training:
    """How a reader is trained.

    Attributes:
        steps: Updates.
        batch: Sequences or grids an update.
        lr: Peak learning rate; 5 % warm-up, then a cosine to 0.
    """

    steps: int
    batch: int
    lr: float


class Reader(nn.Module):
    """Words, the code, the Transformer, and one linear head for each question.

    Args:
        sizes: Of the Transformer.
        code: How it learns where tokens stand.
        task: What is read and asked.
    """

    def __init__(self, sizes: TransformerSizes, code: Code, task: Task) -> None:
        super().__init__()
        self.code, self.task = code, task
        self.words = nn.Embedding(task.words, sizes.d)
        # Words and learned places begin as large as sines and cosines are: none has to be heard over another.
        tables = [self.words.weight, *(code.absolute.parameters() if code.absolute is not None else ())]
        for table in tables:
            nn.init.normal_(table, std=0.5)
        self.transformer = Transformer(sizes, relative=code.relative)
        self.heads = nn.ModuleDict({question: nn.Linear(sizes.d, task.answers) for question in task.chance})

    def forward(self, ids: Int[Tensor, "b t"], places: Places, sides: Sides) -> dict[str, Float[Tensor, "b t v"]]:
        """Scores of the answers to every question, at every token."""
        x, added = self.words(ids), self.code.added(sides)
        if isinstance(added, Tensor) and self.task.front:
            added = functional.pad(added, (0, 0, 1, 0))  # the question stands nowhere
        hidden = self.transformer(x + added, places)
        return {question: head(hidden) for question, head in self.heads.items()}

    def places(self, sides: Sides) -> Places:
        """Places of a sequence or grid, with the mask of the task."""
        found = self.code.places(sides, front=self.task.front)
        length = torch.Size(sides).numel() + self.task.front
        return Places(mask=causal(length) if self.task.causal else None, gap=found.gap, turn=found.turn)

    def fitted(self, sides: Sides) -> "Reader":
        """The same reader for other sides: learned tables are interpolated, nothing else changes."""
        new = copy.deepcopy(self)
        if new.code.absolute is not None:
            new.code.absolute = fit(new.code.absolute, sides)
        for block in new.transformer.blocks:
            assert isinstance(block, Block)
            if block.attention.relative is not None:
                block.attention.relative = fit(block.attention.relative, sides)
        return new


def train(reader: Reader, sides: Sides, training: Training, *, seed: int) -> float:
    """Train on fresh questions; returns the mean loss of the last tenth of the steps.

    The one loop of :mod:`plait.training` would keep checkpoints and metrics of hundreds of tiny runs; this one keeps
    nothing.
    """
    generator = torch.Generator().manual_seed(seed)
    weights = dict(reader.named_parameters())
    faster = {name: BIAS_RATE * training.lr for name in weights if name.endswith("relative.table")}
    optimizer = AdamW().build(weights, rates=Rates(lr=training.lr, parts=faster if _has_bias(reader) else {}))
    schedule = Cosine(warmup=0.05)
    places = reader.places(sides)
    reader.train()
    losses: list[Tensor] = []
    for step in range(training.steps):
        ids, targets = reader.task.draw(training.batch, sides, generator)
        scores = reader(ids, places, sides)
        loss = sum(
            (
                functional.cross_entropy(scores[q].flatten(0, 1), t.flatten(), ignore_index=SKIP)
                for q, t in targets.items()
            ),
            start=torch.zeros(()),
        )
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(reader.parameters(), 1.0)
        for group in optimizer.param_groups:
            group["lr"] = group["peak_lr"] * schedule.factor(step, training.steps)
        optimizer.step()
        losses.append(loss.detach())
    return float(torch.stack(losses[-max(1, training.steps // 10) :]).mean())


def _has_bias(reader: Reader) -> bool:
    return any(isinstance(module, BucketBias | GridBias) for module in reader.modules())


@torch.inference_mode()
def answers(reader: Reader, sides: Sides, *, rows: int, seed: int) -> dict[str, list[float]]:
    """Right (1) or wrong (0) of every question at these sides.

    Of a sequence the last quarter of the tokens is asked ``near`` and the last token ``far``: where it is longer than
    in training, these stand where no token stood before.

    Args:
        reader: Trained at other or the same sides.
        sides: Of the test.
        rows: Sequences, or grids for each question.
        seed: Of the questions; every code is asked the same ones.
    """
    fitted = reader.fitted(sides).eval()
    generator = torch.Generator().manual_seed(seed)
    places = fitted.places(sides)
    found: dict[str, list[float]] = {question: [] for question in reader.task.chance}
    left = rows if reader.task.causal else rows * len(found)
    while left > 0:
        ids, targets = reader.task.draw(min(left, 96), sides, generator)
        scores = fitted(ids, places, sides)
        for question, target in targets.items():
            asked = target != SKIP
            if reader.task.causal:
                begin = sides[0] - 1 if question == "far" else sides[0] - sides[0] // 4
                asked[:, :begin] = False
            found[question] += (scores[question].argmax(-1) == target)[asked].float().tolist()
        left -= len(ids)
    return found
