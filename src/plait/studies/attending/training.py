"""One small training of an arm, and what it answers."""

from dataclasses import dataclass

import torch
from jaxtyping import Bool
from torch import Tensor, nn
from torch.nn import functional

from plait.models.fusion.streams import Inputs
from plait.studies.attending.scenes import WORDS, Batch, Kind, World, left_graph
from plait.studies.attending.students import Answered, Student
from plait.studies.attention import ArmName
from plait.training.optim import AdamW, Rates
from plait.training.schedule import Cosine


@dataclass(frozen=True, slots=True, kw_only=True)
class Training:
    """How an arm is trained.

    Attributes:
        steps: Updates.
        batch: Samples an update.
        lr: Peak learning rate of AdamW without decay; 5 % warm-up, then a cosine to 0.
        kinds: Of questions, as often each.
    """

    steps: int
    batch: int
    lr: float
    kinds: tuple[Kind, ...] = ("attribute", "relation", "detail")


@dataclass(frozen=True, slots=True, kw_only=True)
class Arm:
    """A student that is asked with the graph of its name.

    Attributes:
        name: Which.
        student: The weights.
        world: Its scenes have the graph.
    """

    name: ArmName
    student: Student
    world: World

    def __call__(self, inputs: Inputs, *, generator: torch.Generator, need_weights: bool = False) -> Answered:
        """Answer.

        Args:
            inputs: Words and regions.
            generator: Of random graphs.
            need_weights: Give maps too.
        """
        graph = None
        if self.name in ("graph-true", "graph-random"):
            graph = left_graph(self.world.scenes).expand(len(inputs[WORDS].tokens), -1, -1)
        if self.name == "graph-random":
            assert graph is not None
            graph = mixed(graph, generator=generator)
        return self.student(inputs, graph=graph, need_weights=need_weights)


def mixed(graph: Bool[Tensor, "b n n"], *, generator: torch.Generator) -> Bool[Tensor, "b n n"]:
    """The same graph among nodes that changed their places, anew in each sample: as many edges, other ends."""
    order = torch.rand(graph.shape[:2], generator=generator).argsort(1)
    sample = torch.arange(len(graph))[:, None, None]
    return graph[sample, order[:, :, None], order[:, None, :]]


def train(arm: Arm, training: Training, *, generator: torch.Generator) -> float:
    """Train on fresh samples; returns the mean loss of the last tenth of the steps."""
    model = arm.student.train()
    optimizer = AdamW().build(dict(model.named_parameters()), rates=Rates(lr=training.lr))
    schedule = Cosine(warmup=0.05)
    losses: list[Tensor] = []
    for step in range(training.steps):
        batch = arm.world.draw(training.batch, generator, kinds=training.kinds)
        loss = functional.cross_entropy(arm(batch.inputs, generator=generator).scores, batch.labels)
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        for group in optimizer.param_groups:
            group["lr"] = group["peak_lr"] * schedule.factor(step, training.steps)
        optimizer.step()
        losses.append(loss.detach())
    model.eval()
    return float(torch.stack(losses[-max(1, training.steps // 10) :]).mean())


@torch.inference_mode()
def right(arm: Arm, batch: Batch, *, generator: torch.Generator) -> float:
    """Share of samples that it gets right."""
    found = arm(batch.inputs, generator=generator).scores.argmax(-1) == batch.labels
    return float(found.double().mean())
