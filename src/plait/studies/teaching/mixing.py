"""Two modalities, one easier than the other: all at once, each alone first, or frozen, at equal operations."""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch.utils.flop_counter import FlopCounterMode

from plait.studies.teaching.few import TUNING
from plait.studies.teaching.lessons import Lesson, marked, teach
from plait.studies.teaching.samples import NAMES, Rounds, Samples, named
from plait.studies.teaching.students import BOTH, Classify, Modality, Pair
from plait.studies.training import Order, TrainingStudy
from plait.studies.workers import one_thread

Phase = Mapping[str, float]


@dataclass(frozen=True, slots=True, kw_only=True)
class Job:
    """One training, of one phase or three.

    Attributes:
        order: Of the phases.
        balanced: Whether modalities are dropped while training through the fusion.
        seed: Of samples and weights.
        lr: Peak learning rate of every phase.
    """

    order: Order
    balanced: bool
    seed: int
    lr: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Outcome:
    """What came of it.

    Attributes:
        job: Which.
        steps: Of each phase.
        flops: Of all phases, counted.
        right: Share of right answers with ``both``, and with one modality alone: ``image``, ``text``.
        seen: With both, of the samples it learned from.
        still: Whether all weights of the towers are as they were before the last phase.
        cpu_s: Processor seconds it took.
    """

    job: Job
    steps: Mapping[str, int]
    flops: int
    right: Mapping[str, float]
    seen: float
    still: bool
    cpu_s: float


def built(study: TrainingStudy) -> Pair:
    """Untrained, drawn from torch's generator."""
    return Pair(d=study.d, depth=study.depth, heads=study.heads, classes=len(NAMES))


def learns(model: Pair, reads: tuple[Modality, ...], *, still: bool = False) -> None:
    """Set which weights learn, and what is looked at.

    Args:
        model: In place.
        reads: Both modalities through the fusion, or one through its own head.
        still: Towers stay as they are.
    """
    model.requires_grad_(requires_grad=False)
    for part in model.parts(reads):
        part.requires_grad_(requires_grad=True)
    if still:
        for part in (model.image, model.words, model.text):
            part.requires_grad_(requires_grad=False)
    model.reads, model.still = reads, still


def flops(model: Pair, samples: Samples) -> int:
    """Operations of a forward and a backward pass, as the model is set."""
    with FlopCounterMode(display=False) as counter:
        Classify()(model, samples.batch())["class"].backward()
    model.zero_grad(set_to_none=True)
    return counter.get_total_flops()


def planned(study: TrainingStudy, order: Order, costs: Mapping[str, int]) -> dict[str, int]:
    """Steps of each phase, so that all orders take the operations of ``joint`` (rounded down to whole steps).

    Args:
        study: Steps of ``joint``, and the share for each modality alone.
        order: Which.
        costs: Operations of a step: ``joint``, ``image``, ``text``, ``freeze``.
    """
    budget = study.mixing.steps * costs["joint"]
    if order == "joint":
        return {"both": study.mixing.steps}
    alone = int(study.mixing.alone * budget / (costs["image"] + costs["text"]))
    rest = budget - alone * (costs["image"] + costs["text"])
    return {"image": alone, "text": alone, "both": int(rest / costs["freeze" if order == "freeze" else "joint"])}


def costs_of(study: TrainingStudy) -> dict[str, int]:
    """Operations of a step in each phase, of a batch."""
    model, samples = built(study).train(), _samples(study, study.batch, "cost")
    found: dict[str, int] = {}
    phases: dict[str, tuple[Modality, ...]] = {"joint": BOTH, "freeze": BOTH, "image": ("image",), "text": ("text",)}
    for name, reads in phases.items():
        learns(model, reads, still=name == "freeze")
        found[name] = flops(model, samples)
    return found


def mixed(study: TrainingStudy, costs: Mapping[str, int], job: Job) -> Outcome:
    """Train once and ask."""
    begun, settings = time.process_time(), study.mixing
    with one_thread():
        torch.manual_seed(job.seed)
        model = built(study)
        samples = _samples(study, settings.pictures, f"{job.seed} train")
        steps, spent, still = planned(study, job.order, costs), 0, True
        for phase, count in steps.items():
            reads: tuple[Modality, ...] = BOTH if phase == "both" else tuple(m for m in BOTH if m == phase)
            frozen = phase == "both" and job.order == "freeze"
            learns(model, reads, still=frozen)
            model.dropped = settings.dropped if job.balanced else 0.0
            old = _towers(model)
            lesson = Lesson(steps=max(count, 1), lr=job.lr, seed=job.seed)
            teach(model, Rounds(samples=samples, batch=study.batch, seed=job.seed), lesson)
            spent += count * costs["freeze" if frozen else "joint" if phase == "both" else phase]
            still = all(torch.equal(a, b) for a, b in zip(old, _towers(model), strict=True))
        use = "choose" if job.seed >= TUNING else "test"
        right = _right(model, _samples(study, study.rows, f"{job.seed} {use}"))
        seen = _right(model, samples)["both"]
    spent_s = time.process_time() - begun
    return Outcome(job=job, steps=steps, flops=spent, right=right, seen=seen, still=still, cpu_s=spent_s)


def _samples(study: TrainingStudy, count: int, key: str) -> Samples:
    return named(count, key, told=study.mixing.told, noise=study.mixing.noise)


@torch.inference_mode()
def _right(model: Pair, samples: Samples) -> dict[str, float]:
    model.eval()
    model.reads, batch = BOTH, samples.batch()
    scores = {"both": model(batch)} | {
        kept: model.without(batch, lost=lost) for kept, lost in zip(BOTH, reversed(BOTH), strict=True)
    }
    return {str(name): marked(found, samples).right for name, found in scores.items()}


def _towers(model: Pair) -> list[torch.Tensor]:
    return [w.detach().clone() for part in (model.image, model.words, model.text) for w in part.parameters()]
