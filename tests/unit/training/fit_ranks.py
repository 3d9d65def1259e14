"""What ``test_fit_ranks.py`` starts: ``python fit_ranks.py FOLDER CASE ...`` trains in several processes, prints JSON.

torch is imported once; every rank is forked from there, before any torch operation.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from benchmarks import exactness
from tests.several import together
from torch import Tensor, nn

from plait.core import mesh
from plait.core.device import Compute
from plait.core.events import Event, Events
from plait.data.conversations import ConversationBatches
from plait.models.multimodal import MultimodalLM
from plait.objectives.language import NextToken
from plait.training.loop import fit
from plait.training.optim import SGD, AdamW, Lars, Lion
from plait.training.schedule import Constant
from plait.training.settings import Hooks, Settings
from plait.training.trainer import Average, Parallel

STEPS = 5


def source(*, pieces: int = 1, packed: bool = True) -> ConversationBatches:
    """Six conversations a step, some with pictures; the share of this process."""
    return ConversationBatches(
        conversations=exactness.conversations(),
        weights={"any": 1.0},
        stores=[exactness.features()],
        grid_out=lambda grid: grid,
        batch_size=6,
        row=64,
        pad=0,
        steps=STEPS,
        seed=0,
        pieces=pieces,
        packed=packed,
        rank=mesh.rank(),
        world=mesh.world(),
    )


def trained(
    folder: Path,
    *,
    dtype: torch.dtype = torch.float64,
    optimizer: Any = None,
    whole: bool = False,
    hooks: Hooks | None = None,
    said: list[Event] | None = None,
    batches: Any = None,
    change: Callable[[nn.Module], None] | None = None,
    **settings: Any,
) -> MultimodalLM:
    """A small vision-language model after its steps."""
    model = exactness.model(by_document=True).to(dtype)
    if whole:
        model.decoder.requires_grad_(requires_grad=True)
    if change is not None:
        change(model)
    compute = Compute(device="cpu", dtype="float32", threads=1, why=())
    folder = folder if not mesh.rank() else folder / f"rank-{mesh.rank()}"
    folder.mkdir(parents=True, exist_ok=True)
    fit(
        model,
        NextToken(),
        batches or source(),
        settings=Settings(
            **{"steps": STEPS, "compute": compute, "optimizer": optimizer or AdamW(weight_decay=0.1)} | settings
        ),
        folder=folder,
        events=Events(listeners=() if said is None else (said.append,)),
        hooks=hooks,
    )
    return model


def weights(model: nn.Module) -> dict[str, Tensor]:
    return {name: weight.detach().double() for name, weight in model.named_parameters() if weight.requires_grad}


def apart(found: Mapping[str, Tensor], expected: Mapping[str, Tensor], *, start: Mapping[str, Tensor]) -> float:
    """Largest distance of a tensor, as a share of how far it moved."""
    assert found.keys() == expected.keys()
    moved = {name: float((expected[name] - start[name].detach()).norm()) for name in expected}
    assert min(moved.values()) > 0
    return max(float((found[name] - expected[name]).norm()) / moved[name] for name in expected)


def spread(zero: int, **how: Any) -> dict[str, Any]:
    return {"parallel": Parallel.model_validate({"zero": zero}), **how}


KINDS: dict[str, dict[str, Any]] = {
    "DDP": {},
    "DDP, float32 SGD": {"dtype": torch.float32, "optimizer": SGD(momentum=0.9)},
    **{f"ZeRO-{zero}": spread(zero) for zero in (1, 2, 3)},
    **{f"ZeRO-{zero}, all learns": spread(zero, whole=True) for zero in (1, 2, 3)},
    "ZeRO-3, float32 SGD": spread(3, dtype=torch.float32, optimizer=SGD(momentum=0.9)),
    "ZeRO-3, Lion": spread(3, optimizer=Lion(), whole=True),
    "ZeRO-3, LARS": spread(3, optimizer=Lars(trust=0.1), whole=True),
    "ZeRO-3, average, recomputed": spread(3, average=Average(decay=0.5), recompute="full", whole=True),
    "ZeRO-2, recomputed": spread(2, recompute="selective", whole=True),
}


def equal(root: Path) -> dict[str, Any]:
    """How far the weights of 2 and 4 processes are from those of one, by kind and micro-batches."""
    root.mkdir()
    return {
        f"{kind}, {world} processes, {pieces} micro-batches": compared(
            root / f"{kind} {world} {pieces}", world, pieces, how
        )
        for kind, how in KINDS.items()
        for world in (2, 4)
        for pieces in (1, 2)
    }


def compared(root: Path, world: int, pieces: int, how: Mapping[str, Any]) -> list[float]:
    def alone() -> str:
        model = trained(root / "alone", **{n: v for n, v in how.items() if n != "parallel"})
        torch.save(weights(model), root / "alone.pt")
        return "kept"

    def work() -> float:
        model = trained(root / "several", batches=source(pieces=pieces), **how)
        start = dict(exactness.model(by_document=True).named_parameters())
        return apart(weights(model), torch.load(root / "alone.pt"), start=start)

    root.mkdir()
    assert together(1, alone) == ["kept"]
    return together(world, work)


def resumed(root: Path) -> dict[str, Any]:
    """A run goes on with another number of processes, in another layout: how far it ends from one that ran through."""
    ways = {
        "ZeRO-3 on 2, then one": ((2, spread(3)), (1, {})),
        "one, then ZeRO-3 on 4": ((1, {}), (4, spread(3))),
        "ZeRO-3 on 4, then ZeRO-1 on 2": ((4, spread(3)), (2, spread(1))),
        "DDP on 2, then ZeRO-2 on 4": ((2, {}), (4, spread(2))),
        "ZeRO-2 on 2, then DDP on 4": ((2, spread(2)), (4, {})),
    }
    common: dict[str, Any] = {"whole": True, "average": Average(decay=0.5), "save_every": 1}
    return {name: gone_on(root / name, before, after, common) for name, (before, after) in ways.items()}


def gone_on(root: Path, before: Any, after: Any, common: Mapping[str, Any]) -> list[Any]:
    root.mkdir(parents=True)
    common = {**common, "schedule": Constant()}

    def through() -> str:
        torch.save(weights(trained(root / "through", **common)), root / "through.pt")
        return "kept"

    def part() -> str:
        trained(root / "run", steps=3, **common, **before[1])
        return "kept"

    def rest() -> float:
        model = trained(root / "run", **common, **after[1])
        start = dict(exactness.model(by_document=True).named_parameters())
        return apart(weights(model), torch.load(root / "through.pt"), start=start)

    return [*together(1, through), *together(before[0], part), *together(after[0], rest)]


CASES: dict[str, Callable[[Path], Any]] = {"equal": equal, "resumed": resumed}


def main(root: Path, names: list[str]) -> dict[str, Any]:
    return {name: CASES[name](root / name) for name in names}


if __name__ == "__main__":
    print(json.dumps(main(Path(sys.argv[1]), sys.argv[2:])))
