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
from plait.core.tensors import Batch, Patches
from plait.data.conversations import ConversationBatches
from plait.models.dual import DualEncoder
from plait.models.towers.vit import VisionTransformer, ViTSizes
from plait.models.transformer import TransformerSizes
from plait.objectives.contrastive import Contrastive, SigmoidContrastive
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
    model: Any = None,
    objective: Any = None,
    **settings: Any,
) -> Any:
    """A model after its steps; a small vision-language model where no other is given."""
    if model is None:
        model = exactness.model(by_document=True).to(dtype)
        model.decoder.requires_grad_(requires_grad=True) if whole else None
    compute = Compute(device="cpu", dtype="float32", threads=1, why=())
    folder = folder if not mesh.rank() else folder / f"rank-{mesh.rank()}"
    folder.mkdir(parents=True, exist_ok=True)
    fit(
        model,
        objective or NextToken(),
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


def contrasted(root: Path) -> dict[str, Any]:
    """The same of a dual encoder whose tower learns, under losses that compare all pairs of a batch."""
    layouts: dict[str, dict[str, Any]] = {"DDP": {}, **{f"ZeRO-{zero}": spread(zero) for zero in (1, 3)}}
    return {
        f"{loss}, {name}, {world} processes, {pieces} micro-batches": embedded(
            root / f"{loss} {name} {world} {pieces}", loss, world, pieces=pieces, how=how
        )
        for loss in ("nce", "sigmoid")
        for name, how in layouts.items()
        for world, pieces in ((2, 1), (2, 2), (4, 1))
    }


def paired(folder: Path, loss: str, *, pieces: int = 1, **how: Any) -> DualEncoder:
    objective = Contrastive() if loss == "nce" else SigmoidContrastive(bias=-2.0).double()
    return trained(folder, model=tower(), objective=objective, batches=Pictures(pieces=pieces), **how)


def embedded(root: Path, loss: str, world: int, *, pieces: int, how: Mapping[str, Any]) -> list[Any]:
    root.mkdir(parents=True)

    def alone() -> str:
        torch.save(weights(paired(root / "alone", loss)), root / "alone.pt")
        return "kept"

    def work() -> float:
        model = paired(root / "several", loss, pieces=pieces, **how)
        start = dict(tower().named_parameters())
        return apart(weights(model), torch.load(root / "alone.pt"), start=start)

    assert together(1, alone) == ["kept"]
    return together(world, work)


class Pictures:
    """Eight pictures and the features of their texts, the same in every step; the share of this process."""

    def __init__(self, *, pieces: int) -> None:
        self.pieces = pieces

    def step_batches(self, step: int) -> list[Batch]:
        draw = torch.Generator().manual_seed(0)
        pixels, texts = (torch.randn(8, n, generator=draw, dtype=torch.float64) for n in (16 * 16 * 3, 6))
        mine = torch.arange(8).chunk(mesh.world())[mesh.rank()]
        return [self._batch(rows, pixels[rows], texts[rows]) for rows in mine.chunk(self.pieces)]

    def _batch(self, rows: Tensor, pixels: Tensor, texts: Tensor) -> Batch:
        count = len(rows)
        ones = torch.ones(count, 1, dtype=torch.long)
        return Batch(
            token_ids=ones,
            labels=rows[:, None] // 2,
            segment_ids=ones,
            media={
                "image": Patches(values=pixels.reshape(-1, 3), grid=torch.tensor([[1, 16, 16]] * count)),
                "text": Patches(values=texts, grid=torch.ones(count, 3, dtype=torch.long)),
            },
            item_row={"image": torch.arange(count), "text": torch.arange(count)},
            sample_ids=tuple(f"s{row}" for row in rows.tolist()),
        )


def tower() -> DualEncoder:
    """A picture tower from scratch beside frozen texts."""
    torch.manual_seed(0)
    sizes = ViTSizes(transformer=TransformerSizes(d=16, depth=2, heads=2, d_ff=24), patch=8, grid=(2, 2))
    vit = VisionTransformer(sizes)
    return DualEncoder(nn.Linear(16, 8), nn.Linear(6, 8), scale=5.0, tower=vit).double().train()


CASES: dict[str, Callable[[Path], Any]] = {"equal": equal, "resumed": resumed, "contrasted": contrasted}


def main(root: Path, names: list[str]) -> dict[str, Any]:
    return {name: CASES[name](root / name) for name in names}


if __name__ == "__main__":
    print(json.dumps(main(Path(sys.argv[1]), sys.argv[2:])))
