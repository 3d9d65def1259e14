"""What ``test_expert_ranks.py`` starts: processes that divide the experts of a decoder train together. Prints JSON."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from benchmarks.layouts import Way, apart, compared, source, trained, ways, weights
from benchmarks.sides.several import together
from torch import Tensor

from plait.core import mesh
from plait.core.errors import DataError
from plait.core.events import Event
from plait.core.tensors import IGNORE, Batch
from plait.models.composition import Mixture
from plait.objectives.language import NextToken
from plait.training.parallel.twin import lay_out
from plait.training.schedule import Constant
from plait.training.settings import Hooks, Stopping
from plait.training.trainer import Average, Parallel

TRIED = {
    "ZeRO-3, experts, all learns": ((2, 1),),
    "expert 2, all learns": ((4, 2),),
    "expert 4, capacity, all learns": ((4, 1),),
    "expert 2, all recomputed, average": ((2, 2),),
}
"""Of the ways of the benchmark, and the numbers of processes and micro-batches."""
TIGHT = Mixture(experts=4, capacity=0.75, balance=0.1)
WAY = Way(name="experts", mixture=TIGHT, whole=True, packed=False)
TERMS: dict[str, Any] = {"weights": {"balance": TIGHT.balance, "dropped": 0.0}}


def objective() -> NextToken:
    return NextToken(choices=3 * TIGHT.top_k)


def equal(root: Path) -> dict[str, Any]:
    """How far 2 and 4 processes end from one."""
    known = {way.name: way for way in ways()}
    return {
        f"{name}, {world} processes, {pieces} micro-batches": compared(
            known[name], root / f"{name} {world} {pieces}", world=world, pieces=pieces
        )
        for name, cases in TRIED.items()
        for world, pieces in cases
    }


class Uneven:
    """The first process has three micro-batches, the others one; in step 1 the second of two has no trained token."""

    def __init__(self) -> None:
        self.source = source(pieces=1 if mesh.rank() else 3, packed=False)
        self.second = replace(source(packed=False), rank=1, world=2)

    def step_batches(self, step: int) -> Sequence[Batch]:
        batches = self.source.step_batches(step)
        if step != 1:
            return batches
        quiet = {name for batch in self.second.step_batches(step) for name in batch.sample_ids}
        return [self._without(batch, quiet) for batch in batches]

    def _without(self, batch: Batch, quiet: set[str]) -> Batch:
        rows = torch.tensor([name in quiet for name in batch.sample_ids])
        return replace(batch, labels=batch.labels.masked_fill(rows[:, None], IGNORE))


def uneven(root: Path) -> dict[str, Any]:
    """Unequal numbers of micro-batches, and a process that trains nothing."""

    def train(**settings: Any) -> Any:
        folder = root / str(mesh.world())
        return trained(WAY.model(), folder, objective=objective(), batches=Uneven(), **TERMS, **settings)

    def alone() -> str:
        torch.save(weights(train()), root / "alone.pt")
        return "kept"

    def several() -> float:
        found = weights(train(parallel=Parallel(expert=2)))
        return apart(found, torch.load(root / "alone.pt", weights_only=True), weights(WAY.model()))

    root.mkdir()
    return {"kept": together(1, alone), "apart": together(2, several)}


def resumed(root: Path) -> dict[str, Any]:
    """A run goes on with another number of processes, in another layout: how far it ends from one that ran through."""
    layouts: dict[str, tuple[tuple[int, dict[str, int]], tuple[int, dict[str, int]]]] = {
        "expert 2 on 4, then one": ((4, {"expert": 2}), (1, {})),
        "one, then expert 4 on 4": ((1, {}), (4, {"expert": 4})),
    }
    common: dict[str, Any] = {"average": Average(decay=0.5), "save_every": 1, "schedule": Constant(), **TERMS}

    def through() -> str:
        torch.save(
            weights(trained(WAY.model(), root / "through", objective=objective(), **common)), root / "through.pt"
        )
        return "kept"

    found: dict[str, Any] = {"through": together(1, through)}
    for name, ((world, how), (later, then)) in layouts.items():
        part = partial(gone_on, root / name, steps=3, parallel=Parallel.model_validate(how), **common)
        expected = root / "through.pt"
        rest = partial(gone_on, root / name, expected=expected, parallel=Parallel.model_validate(then), **common)
        found[name] = [together(world, part), together(later, rest)]
    return found


def gone_on(folder: Path, *, expected: Path | None = None, **settings: Any) -> Any:
    """Where a run went on from, and how far it is from another."""
    said: list[Event] = []
    model = trained(WAY.model(), folder, objective=objective(), said=said, **settings)
    if expected is None:
        return "part"
    begun = [event.text.split(":")[0] for event in said if event.text.startswith("resumed")]
    return [begun, apart(weights(model), torch.load(expected, weights_only=True), weights(WAY.model()))]


def held(root: Path) -> dict[str, Any]:
    """What each process has while it trains, and what hooks see."""
    del root

    def part() -> Any:
        model = WAY.model()
        layout = lay_out(model, NextToken(), Parallel(expert=2), device="cpu")
        theirs = {name: w for name, w in layout.model.named_parameters() if ".experts." in name}
        own = {name: list(w.to_local().shape) for name, w in theirs.items()}
        empty = [weight.numel() for name, weight in model.named_parameters() if ".experts." in name]
        return [sorted({tuple(shape) for shape in own.values()}), max(empty)]

    return {"held": together(4, part)}


def shown(root: Path) -> dict[str, Any]:
    """What hooks see: the whole model, in process 0 alone."""

    def look() -> Any:
        model = WAY.model()
        seen: list[dict[str, Tensor]] = []

        def note(*_: Any) -> float:
            seen.append({name: weight.detach().clone() for name, weight in model.named_parameters()})
            return -float(len(seen))

        hooks = Hooks(evaluate=note, on_step=note, save_model=note)
        settings: dict[str, Any] = {"parallel": Parallel(expert=2), "save_every": 2, "stopping": Stopping(every=2)}
        trained(model, root, objective=objective(), hooks=hooks, **settings, **TERMS)
        last = {name: weight.detach() for name, weight in model.named_parameters()}
        whole = all(one[name].shape == weight.shape for one in seen for name, weight in last.items())
        return [len(seen), whole, all(torch.equal(seen[-1][name], last[name]) for name in last) if seen else None]

    return {"shown": together(2, look)}


class Failing:
    """Goes wrong in the second process before step 2."""

    def step_batches(self, step: int) -> Sequence[Batch]:
        if step == 2 and mesh.rank() == 1:
            raise DataError("the picture is cut off", place="sample c3", remedy="take it out")
        return source().step_batches(step)


class Broken(NextToken):
    """Fails in the second process in the middle of step 2, while the first one waits for its tokens."""

    def __init__(self) -> None:
        super().__init__(choices=3 * TIGHT.top_k)
        self.calls = 0

    def __call__(self, model: Any, batch: Batch) -> Any:
        self.calls += 1
        if self.calls == 3 and mesh.rank() == 1:
            raise DataError("the picture is cut off", place="sample c3", remedy="take it out")
        return super().__call__(model, batch)


def faults(root: Path) -> dict[str, Any]:
    """A fault of one process, before a step and within it."""

    def fail(*, within: bool) -> Any:
        batches, what = (source(), Broken()) if within else (Failing(), objective())
        folder = root / str(within)
        trained(WAY.model(), folder, objective=what, batches=batches, parallel=Parallel(expert=2), **TERMS)
        return "done"

    return {str(within): together(2, partial(fail, within=within)) for within in (False, True)}


def refused(root: Path) -> dict[str, Any]:
    """What cannot be divided so."""

    def plain() -> Any:
        return trained(Way(name="plain", whole=True).model(), root / "plain", parallel=Parallel(expert=2))

    def uneven_experts() -> Any:
        way = replace(WAY, mixture=Mixture(experts=3))
        return trained(way.model(), root / "three", objective=objective(), parallel=Parallel(expert=2), **TERMS)

    def shares() -> Any:
        return trained(WAY.model(), root / "shares", objective=objective(), parallel=Parallel(expert=4), **TERMS)

    work = {"plain": plain, "three": uneven_experts, "shares": shares}
    return {name: together(2, one) for name, one in work.items()}


CASES: dict[str, Callable[[Path], Any]] = {
    "equal": equal,
    "uneven": uneven,
    "resumed": resumed,
    "held": held,
    "shown": shown,
    "faults": faults,
    "refused": refused,
}


def main(root: Path, names: list[str]) -> dict[str, Any]:
    return {name: CASES[name](root / name) for name in names or CASES}


if __name__ == "__main__":
    print(json.dumps(main(Path(sys.argv[1]), sys.argv[2:])))
