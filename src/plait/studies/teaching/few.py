"""Fine-tuning a tower on few pictures: all weights, adapters or a head; one rate or rates by layer; number formats."""

from __future__ import annotations

import time
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

from plait.adapters.lora import Lora, attach
from plait.studies.connecting.scenes import CLASSES, COLORS
from plait.studies.teaching.lessons import Lesson, Marks, marks, teach
from plait.studies.teaching.samples import Fresh, Rounds, cells, colors
from plait.studies.teaching.students import Reader, tower
from plait.studies.training import Dtype, Method, TrainingStudy
from plait.studies.workers import one_thread

TUNING = 10_000
"""Seeds from here on choose rates."""
_TARGETS = ("qkv", "out", "up", "down")


@dataclass(frozen=True, slots=True, kw_only=True)
class Before:
    """A tower that learned what is in each cell.

    Attributes:
        seed: Of weights and pictures.
        dtype: Of autocast.
        right: Share of cells that are right, of pictures that no training saw.
        loss: Mean cross-entropy there.
        skipped: Updates that were left out, of float16 because the loss was scaled too high.
        cpu_s: Processor seconds it took.
    """

    seed: int
    dtype: Dtype
    right: float
    loss: float
    skipped: int
    cpu_s: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Job:
    """One fine-tuning.

    Attributes:
        method: Which weights learn.
        pictures: To learn from.
        seed: Of the tower, the pictures and the head.
        lr: Peak learning rate.
        decay: Rate of a layer over that of the layer above it.
    """

    method: Method
    pictures: int
    seed: int
    lr: float
    decay: float = 1.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Outcome:
    """What came of a fine-tuning.

    Attributes:
        job: Which.
        trainable: Weights that learned.
        seen: On the pictures it learned from.
        unseen: On pictures that no training sees; other ones where rates are chosen.
        cpu_s: Processor seconds it took.
    """

    job: Job
    trainable: int
    seen: Marks
    unseen: Marks
    cpu_s: float


def before(study: TrainingStudy, folder: Path | None, work: tuple[int, Dtype]) -> Before:
    """Teach a tower, and write it into the folder; without one, for as many updates as formats are compared at."""
    (seed, dtype), begun = work, time.process_time()
    steps = study.before if folder else study.precision.steps
    with one_thread():
        torch.manual_seed(seed)
        model = Reader(tower(d=study.d, depth=study.depth, heads=study.heads), CLASSES, of="cells")
        lesson = Lesson(steps=steps, lr=study.lr, seed=seed, dtype=dtype)
        result = teach(model, Fresh(batch=study.batch, seed=seed), lesson)
        found = marks(model, cells(study.rows, f"{seed} test"))
    if folder is not None:
        save_file(model.tower.state_dict(), _file(folder, seed))
    spent = time.process_time() - begun
    return Before(seed=seed, dtype=dtype, **asdict(found), skipped=result.overflowed + result.skipped, cpu_s=spent)


def tuned(study: TrainingStudy, folder: Path, job: Job) -> Outcome:
    """Fine-tune a tower of the folder."""
    begun = time.process_time()
    with one_thread():
        torch.manual_seed(job.seed)
        model = Reader(tower(d=study.d, depth=study.depth, heads=study.heads), len(COLORS), of="picture")
        model.tower.load_state_dict(load_file(_file(folder, job.seed)))
        if job.method == "lora":
            attach(model.tower, Lora(rank=study.few.rank, alpha=2.0 * study.few.rank, targets=_TARGETS))
        elif job.method == "head":
            model.tower.requires_grad_(requires_grad=False)
        samples = colors(job.pictures, f"{job.seed} of {job.pictures}")
        lesson = Lesson(steps=study.steps, lr=job.lr, seed=job.seed, layer_decay=job.decay)
        teach(model, Rounds(samples=samples, batch=study.batch, seed=job.seed), lesson)
        use = "choose" if job.seed >= TUNING else "test"
        seen, unseen = marks(model, samples), marks(model, colors(study.rows, f"{job.seed} {use}"))
    trainable = sum(weight.numel() for weight in model.parameters() if weight.requires_grad)
    return Outcome(job=job, trainable=trainable, seen=seen, unseen=unseen, cpu_s=time.process_time() - begun)


def _file(folder: Path, seed: int) -> Path:
    return folder / f"tower-{seed}.safetensors"
