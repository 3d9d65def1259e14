"""What ``test_runner.py`` starts: ``python runner_ranks.py CASE ...`` runs pipelines over processes, prints JSON."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from dataclasses import astuple
from functools import partial
from typing import Any

import torch
from benchmarks.bubbles import link, measured
from benchmarks.sides.several import together
from torch import Tensor, nn

from plait.core.errors import DataError
from plait.training.parallel.order import SCHEDULES
from plait.training.parallel.runner import run

WIDTH = 6
ROWS = (3, 1, 4, 2, 5, 2, 1, 3)
"""Of each micro-batch: they differ."""


def inputs(micro: int) -> Tensor:
    return torch.randn(ROWS[micro], WIDTH, generator=torch.Generator().manual_seed(micro), dtype=torch.float64)


def parts(count: int) -> list[nn.Module]:
    torch.manual_seed(0)
    return [nn.Sequential(nn.Linear(WIDTH, WIDTH), nn.Tanh()).double() for _ in range(count)]


def loss_of(output: Tensor, micro: int) -> Tensor:
    """Micro-batch 1 has nothing to learn from."""
    return output.detach().sum() if micro == 1 else (output**2).sum()


def equal(name: str, *, micro: int, frozen: int = 0) -> Any:
    """How far values and gradients of this process's stage are from those of all stages in one process."""
    ends = link()
    stages, whole = parts(ends.stages), parts(ends.stages)
    for part in (*stages[:frozen], *whole[:frozen]):
        part.requires_grad_(requires_grad=False)
    losses: list[float] = []

    def compute(k: int, received: Tensor | None) -> Tensor:
        output = stages[ends.stage](inputs(k) if received is None else received)
        if not ends.last:
            return output
        losses.append(loss_of(output, k).item())
        return loss_of(output, k)

    kept = run(SCHEDULES[name](ends.stage, ends.stages, micro), compute, ends)
    expected: list[float] = []
    for k in range(micro):
        loss = loss_of(nn.Sequential(*whole)(inputs(k)), k)
        expected.append(loss.item())
        if loss.requires_grad:
            loss.backward()
    pairs = list(zip(stages[ends.stage].parameters(), whole[ends.stage].parameters(), strict=True))
    assert losses == (expected if ends.last else [])
    assert all((mine.grad is None) == (theirs.grad is None) for mine, theirs in pairs)
    apart = [float((a.grad - b.grad).abs().max()) for a, b in pairs if a.grad is not None and b.grad is not None]
    return {"kept": kept, "apart": max(apart, default=0.0), "learns": len(apart)}


def asleep(name: str, stages: int, micro: int) -> list[Any]:
    """The timeline of stages that only sleep."""
    return [astuple(span) for span in measured(name, stages, micro)]


def fails(name: str, *, at: int) -> Any:
    """A stage raises in its third forward."""
    ends = link()

    def compute(k: int, received: Tensor | None) -> Tensor:
        if ends.stage == at and k == 2:
            raise DataError("the picture is cut off", place="sample c3", remedy="take it out")
        return (torch.ones(2, requires_grad=True) if received is None else received).sum()[None]

    run(SCHEDULES[name](ends.stage, ends.stages, 6), compute, ends)


def cases() -> dict[str, Callable[[], Any]]:
    found: dict[str, Callable[[], Any]] = {}
    for name in SCHEDULES:
        for stages, micro in ((2, 1), (2, 8), (4, 2)):
            found[f"equal {name} {stages} {micro}"] = partial(together, stages, partial(equal, name, micro=micro))
        found[f"frozen {name} 4 5"] = partial(together, 4, partial(equal, name, micro=5, frozen=2))
        for stages, micro in ((2, 4), (4, 8)):
            found[f"asleep {name} {stages} {micro}"] = partial(asleep, name, stages, micro)
        found[f"fails {name}"] = partial(together, 4, partial(fails, name, at=2))
    return found


if __name__ == "__main__":
    known = cases()
    chosen = [name for name in known if name.startswith(tuple(sys.argv[1:]) or "")]
    print(json.dumps({name: known[name]() for name in chosen}))
