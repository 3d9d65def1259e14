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
from plait.training.optim import SGD, AdamW
from plait.training.settings import Hooks, Settings

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
    moved = {name: float((expected[name] - start[name]).norm()) for name in expected}
    assert min(moved.values()) > 0
    return max(float((found[name] - expected[name]).norm()) / moved[name] for name in expected)


KINDS: dict[str, dict[str, Any]] = {
    "float64 AdamW": {},
    "float32 SGD": {"dtype": torch.float32, "optimizer": SGD(momentum=0.9)},
}


def equal(root: Path) -> dict[str, Any]:
    """How far the weights of 2 and 4 processes are from those of one, by kind and micro-batches."""
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
        start = weights(exactness.model(by_document=True))
        return apart(weights(model), torch.load(root / "alone.pt"), start=start)

    assert together(1, alone) == ["kept"]
    return together(world, work)


CASES: dict[str, Callable[[Path], Any]] = {"equal": equal}


def main(root: Path, names: list[str]) -> dict[str, Any]:
    return {name: CASES[name](root / name) for name in names if (root / name).mkdir() is None}


if __name__ == "__main__":
    print(json.dumps(main(Path(sys.argv[1]), sys.argv[2:])))
