"""Small models and batches of views, every objective over them, and gradients of a step, for tests; ``python
view_ranks.py`` takes them in several processes, prints JSON.

torch is imported once; every rank is forked from there, before any torch operation.
"""

from __future__ import annotations

import json
import sys
import warnings
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from benchmarks.sides.several import together
from tests.tiny_run import CPU
from tests.unit.training.pairwise_model import dual, pairs
from torch import Tensor, nn

from plait.core import mesh
from plait.core.events import Events
from plait.core.tensors import IGNORE, Batch, Patches
from plait.data.collate import take_rows
from plait.objectives.hardness import HardContrastive, HardNTXent
from plait.objectives.margins import MarginContrastive, NaiveContrastive
from plait.objectives.momentum import MomentumContrast
from plait.objectives.triplets import Triplet
from plait.objectives.views import NPair, NTXent, SupervisedContrastive
from plait.training.gradient import Sums, accumulate
from plait.training.loop import fit
from plait.training.optim import SGD, Rates
from plait.training.schedule import Constant
from plait.training.settings import Settings
from plait.training.state import TrainState

D, WIDTH = 5, 4
CLASSES = [0, 1, IGNORE, 0, 2, 1, IGNORE, 2, 0, 1, 3, IGNORE]
"""One of them, 3, is alone."""


def naive(**how: Any) -> NaiveContrastive:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return NaiveContrastive(**how)


KINDS: dict[str, Callable[..., Any]] = {
    "nt-xent": NTXent,
    "supcon": SupervisedContrastive,
    "n-pair": NPair,
    "margin": partial(MarginContrastive, margin=2.0),
    "margin, over all pairs": partial(MarginContrastive, margin=2.0, average="pairs", unit=True),
    "naive": naive,
    "hard nt-xent": HardNTXent,
    "hard nt-xent, debiased": partial(HardNTXent, hardness=0.5, prior=0.1),
    **{
        f"triplet {mining}, {average}": partial(Triplet, mining=mining, average=average)
        for mining in ("all", "semi-hard", "hard")
        for average in ("all", "active")
    },
    "triplet, plain distance": partial(Triplet, mining="all", average="active", squared=False, unit=False),
}
"""Objectives over views that hold nothing."""


class Tower(nn.Module):
    """Items of pictures to vectors, and the row of each."""

    def __init__(self, norm: nn.Module | None = None) -> None:
        super().__init__()
        torch.manual_seed(3)
        self.tower = nn.Sequential(nn.Linear(D, 6), norm or nn.LayerNorm(6), nn.Tanh(), nn.Linear(6, WIDTH))
        self.to(torch.float64)

    def forward(self, batch: Batch) -> tuple[Tensor, Tensor]:
        return self.tower(batch.media["image"].values), batch.item_row["image"]


def views(classes: Sequence[int] = CLASSES, *, each: int = 2, seed: int = 0) -> Batch:
    rows = len(classes)
    values = torch.randn(each * rows, D, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return Batch(
        token_ids=torch.ones(rows, 1, dtype=torch.long),
        labels=torch.tensor(classes)[:, None],
        segment_ids=torch.ones(rows, 1, dtype=torch.long),
        media={"image": Patches(values=values, grid=torch.ones(each * rows, 3, dtype=torch.long))},
        item_row={"image": torch.arange(rows).repeat_interleave(each)},
        sample_ids=tuple(f"s{i}" for i in range(rows)),
    )


def pieces(whole: Batch, cuts: Sequence[int]) -> list[Batch]:
    ends = [*cuts, len(whole.labels)]
    return [take_rows(whole, begin, end) for begin, end in zip([0, *cuts], ends, strict=True)]


def step(model: nn.Module, objective: Any, micro: Sequence[Batch]) -> tuple[dict[str, Tensor], Sums]:
    """Gradients and sums; nothing is left behind."""
    sums = accumulate(model, objective, micro, weights={})
    found = {n: torch.zeros_like(w) if w.grad is None else w.grad.clone() for n, w in model.named_parameters()}
    model.zero_grad(set_to_none=True)
    return found, sums


STEPS, RATE, QUEUE = 3, 0.5, 17


def momentum_run(micro_of: Callable[[Batch], Sequence[Batch]]) -> dict[str, Any]:
    """Some steps of plain descent with MoCo: what the weights, their copy and the queue are after them."""
    model = Tower()
    objective = MomentumContrast(model, width=WIDTH, queue=QUEUE, momentum=0.7, temperature=0.2)
    losses: list[float] = []
    for at in range(STEPS):
        objective.pace(at, STEPS)
        gradient, sums = step(model, objective, micro_of(views(seed=at)))
        losses.append(sums.loss)
        with torch.no_grad():
            for name, weight in model.named_parameters():
                weight.sub_(RATE * gradient[name])
    objective.pace(STEPS, STEPS)
    tensors = {**dict(model.named_parameters()), **{f"objective.{n}": b for n, b in objective.named_buffers()}}
    return {"losses": losses, **{name: tensor.tolist() for name, tensor in tensors.items()}}


class Stream:
    """A batch a step, or this process's pieces of it."""

    def __init__(self, micro_of: Callable[[Batch], Sequence[Batch]]) -> None:
        self.micro_of = micro_of

    def step_batches(self, step: int) -> Sequence[Batch]:
        return self.micro_of(views(seed=step))


def momentum_fit(folder: Path, micro_of: Callable[[Batch], Sequence[Batch]]) -> dict[str, Any]:
    """A whole run of the loop, which goes on where there is one: all that training changes."""
    model = Tower()
    objective = MomentumContrast(model, width=WIDTH, queue=QUEUE, momentum=0.7, temperature=0.2)
    how: dict[str, Any] = {"optimizer": SGD(momentum=0.9), "rates": Rates(lr=0.2), "schedule": Constant()}
    how |= {"compute": replace(CPU, threads=1), "save_every": 2}
    folder.mkdir(parents=True, exist_ok=True)
    fit(
        model,
        objective,
        Stream(micro_of),
        settings=Settings(steps=4, **how),
        folder=folder,
        events=Events(),
    )
    return {name: tensor.tolist() for name, tensor in TrainState(model, objective).tensors().items()}


def share(folder: Path, cuts: Sequence[int]) -> dict[str, Any]:
    """What this process finds by kind, of every piece that is its own."""

    def own(whole: Batch) -> list[Batch]:
        return pieces(whole, cuts)[mesh.rank() :: mesh.world()]

    found: dict[str, Any] = {}
    for kind, build in KINDS.items():
        gradient, sums = step(Tower(), build(), own(views()))
        found[kind] = {"gradient": {n: g.tolist() for n, g in gradient.items()}, "terms": dict(sums.terms)}
    found["moco"] = momentum_run(own)
    found["moco, fitted"] = momentum_fit(folder / str(mesh.rank()), own)
    here = pairs(micro_batch=2, rank=mesh.rank(), world=mesh.world(), batch_size=13).step_batches(0)
    gradient, sums = step(dual(), HardContrastive(), here)
    found["hard pairs"] = {"gradient": {n: g.tolist() for n, g in gradient.items()}, "terms": dict(sums.terms)}
    return found


CUTS = {2: (7,), 3: (4, 5, 8, 9)}
"""Where the batch is cut for so many processes, which take the pieces in turn."""

if __name__ == "__main__":
    root = Path(sys.argv[1])
    print(json.dumps({w: together(w, partial(share, root / str(w), cuts)) for w, cuts in CUTS.items()}))
