"""How far several processes end from one that trains alone: layouts x processes x micro-batches x number formats.

Five steps of a small vision-language model (LoRA and a connector, or all of it), and of a dual encoder whose picture
tower learns, over gloo. The distance is that of a weight from the one process's, as a share of how far it moved, of
the weight where it is largest. Gradients are the same sums in another order: float64 ends 1e-14 apart, float32 1e-6.

Run: ``python benchmarks/layouts.py [--keep] [--only NAME]``, five minutes on two cores; writes
``benchmarks/results/layouts.json``.
Tests hold the bounds for some of them.
"""

from __future__ import annotations

import argparse
import datetime
import importlib
import math
import sys
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

sys.path.insert(0, str(Path(__file__).parents[1]))

from benchmarks import exactness
from benchmarks.sides.several import together

from plait import __version__
from plait.core import mesh
from plait.core.device import Compute, cpu_name
from plait.core.events import Event, Events
from plait.core.files import read_json, write_json
from plait.core.protocols import Batches, Objective
from plait.core.tensors import Batch, Patches
from plait.data.conversations import ConversationBatches
from plait.models.composition import Mixture
from plait.models.dual import DualEncoder
from plait.models.towers.vit import VisionTransformer, ViTSizes
from plait.models.transformer import TransformerSizes
from plait.objectives.contrastive import Contrastive, SigmoidContrastive
from plait.objectives.language import NextToken
from plait.training.loop import fit
from plait.training.optim import SGD, AdamW, Lars, Lion
from plait.training.settings import Hooks, Settings
from plait.training.trainer import Average, Parallel

for name in ("peft", "transformers.models.llama.modeling_llama"):
    importlib.import_module(name)  # once, and not 0.2 s in each forked process

RESULTS = Path(__file__).parent / "results" / "layouts.json"
STEPS = 5
BOUNDS: Mapping[str, float] = {"float64": 1e-9, "float32": 1e-5, "bfloat16": 2e-2}
"""What a test allows."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Way:
    """How several processes train.

    Attributes:
        name: For people.
        zero: What they keep a part of.
        grid: Degrees of what else divides the work, such as ``{"tensor": 2}``.
        dtype: ``float64``, ``float32``, or ``bfloat16``: products in it, weights in float32.
        optimizer: Which.
        whole: Whether the decoder learns, too, instead of its adapter.
        loss: ``text``, ``nce`` or ``sigmoid``.
        kv_heads: Heads of keys, which processes that divide heads must be able to deal out.
        packed: Whether conversations share rows.
        more: Further settings of the loop.
        mixture: Experts of the decoder.
        worlds: Numbers of processes that are tried, where they can divide the work so.
    """

    name: str
    zero: int = 0
    grid: Mapping[str, Any] = field(default_factory=dict[str, Any])
    dtype: str = "float64"
    optimizer: Any = field(default_factory=lambda: AdamW(weight_decay=0.1))
    whole: bool = False
    loss: str = "text"
    kv_heads: int = 2
    packed: bool = True
    more: Mapping[str, Any] = field(default_factory=dict[str, Any])
    mixture: Mixture | None = None
    worlds: Sequence[int] = (2, 4)

    @property
    def settings(self) -> dict[str, Any]:
        """Of the loop, in several processes."""
        return {"parallel": self.parallel, **self.alone}

    @property
    def parallel(self) -> Parallel:
        """What processes divide."""
        return Parallel.model_validate({"zero": self.zero, **self.grid})

    def fits(self, world: int) -> bool:
        """Whether so many processes can divide the work so."""
        return world % math.prod(degree for degree in self.grid.values() if isinstance(degree, int)) == 0

    @property
    def alone(self) -> dict[str, Any]:
        """Of the loop, in one process."""
        found = {"optimizer": self.optimizer, "compute": compute_in(self.dtype), **self.more}
        return found | ({"weights": {"balance": self.mixture.balance, "dropped": 0.0}} if self.mixture else {})

    @property
    def weights(self) -> torch.dtype:
        """Their number format."""
        return torch.float64 if self.dtype == "float64" else torch.float32

    def model(self) -> nn.Module:
        """The same weights each time."""
        if self.loss != "text":
            return tower().to(self.weights)
        layers = max(3, self.grid.get("pipeline", 1))
        more: dict[str, Any] = {"kv_heads": self.kv_heads, "layers": layers, "mixture": self.mixture}
        model = exactness.model(by_document=True, **more).to(self.weights)
        if self.whole:
            model.decoder.requires_grad_(requires_grad=True)
        return model

    def objective(self) -> Objective:
        """What is minimized."""
        if self.loss == "text":
            return NextToken(choices=3 * self.mixture.top_k if self.mixture else 0)
        return Contrastive() if self.loss == "nce" else SigmoidContrastive(bias=-2.0).to(self.weights)

    def batches(self, pieces: int) -> Batches:
        """This process's share."""
        return (
            source(pieces=pieces, packed=self.packed, parallel=self.parallel)
            if self.loss == "text"
            else Pictures(pieces=pieces)
        )


def ways() -> list[Way]:
    """Every layout with an adapter and with all weights; optimizers and other settings once each."""
    found = [
        Way(name="DDP"),
        Way(name="DDP, one conversation a row", packed=False),
        Way(name="ZeRO-3, one conversation a row", zero=3, packed=False),
        *(
            Way(name=f"{layout}, {dtype} SGD", zero=zero, dtype=dtype, optimizer=SGD(momentum=0.9))
            for dtype in ("float32", "bfloat16")
            for layout, zero in (("DDP", 0), ("ZeRO-3", 3))
        ),
        Way(name="ZeRO-3, Lion", zero=3, whole=True, optimizer=Lion()),
        Way(name="ZeRO-3, LARS", zero=3, whole=True, optimizer=Lars(trust=0.1)),
        Way(
            name="ZeRO-3, average, all recomputed",
            zero=3,
            whole=True,
            more={"average": Average(decay=0.5), "recompute": "full"},
        ),
        Way(name="ZeRO-2, some recomputed", zero=2, whole=True, more={"recompute": "selective"}),
    ]
    for zero in (1, 2, 3):
        found += [Way(name=f"ZeRO-{zero}", zero=zero), Way(name=f"ZeRO-{zero}, all learns", zero=zero, whole=True)]
    for grid in ({"tensor": 2}, {"tensor": 4}):
        name = f"tensor {grid['tensor']}"
        found += [Way(name=name, grid=grid, kv_heads=4)]
        found += [Way(name=f"{name}, all learns", grid=grid, kv_heads=4, whole=True)]
    found += [
        Way(
            name="tensor 2, float32 SGD",
            grid={"tensor": 2},
            kv_heads=4,
            dtype="float32",
            optimizer=SGD(momentum=0.9),
        ),
        Way(name="tensor 2, ZeRO-3, all learns", zero=3, grid={"tensor": 2}, kv_heads=4, whole=True),
        Way(name="tensor 2, ZeRO-1", zero=1, grid={"tensor": 2}, kv_heads=4),
    ]
    found += sequences()
    found += pipelines()
    some, tight = Mixture(experts=8, balance=0.1), Mixture(experts=8, balance=0.1, capacity=0.75)
    found += [
        Way(name="DDP, experts, all learns", mixture=tight, whole=True),
        Way(name="ZeRO-3, experts, all learns", zero=3, mixture=some, whole=True),
    ]
    for expert in (2, 4):
        name, grid = f"expert {expert}", {"expert": expert}
        found += [
            Way(name=name, grid=grid, mixture=some),
            Way(name=f"{name}, all learns", grid=grid, mixture=some, whole=True),
            Way(name=f"{name}, capacity, all learns", grid=grid, mixture=tight, whole=True, packed=False),
        ]
    found += [
        Way(
            name="expert 2, all recomputed, average",
            grid={"expert": 2},
            mixture=tight,
            whole=True,
            more={"average": Average(decay=0.5), "recompute": "full"},
        ),
    ]
    for loss, title in (("nce", "InfoNCE"), ("sigmoid", "sigmoid loss")):
        found += [Way(name=f"{layout}, {title}", zero=z, loss=loss) for layout, z in (("DDP", 0), ("ZeRO-3", 3))]
    return found


def sequences() -> list[Way]:
    """Pieces of rows between the matrices that processes divide."""
    two: dict[str, Any] = {"tensor": 2, "sequence": True}
    staged, name = two | {"pipeline": 2}, "tensor 2, sequence"
    keys: dict[str, Any] = {"kv_heads": 4}
    momentum = SGD(momentum=0.9)
    again = {"recompute": "full"}
    return [
        Way(name=name, grid=two, **keys),
        Way(name=f"{name}, all learns", grid=two, whole=True, **keys),
        Way(name="tensor 4, sequence", grid=two | {"tensor": 4}, **keys),
        Way(name="tensor 4, sequence, all learns", grid=two | {"tensor": 4}, whole=True, **keys),
        Way(name=f"{name}, one conversation a row", grid=two, packed=False, **keys),
        Way(name=f"{name}, float32 SGD", grid=two, dtype="float32", optimizer=momentum, **keys),
        Way(name=f"{name}, bfloat16 SGD", grid=two, dtype="bfloat16", optimizer=momentum, **keys),
        Way(name=f"{name}, SGD, clipped", grid=two, whole=True, optimizer=momentum, more={"clip_norm": 1e-2}, **keys),
        Way(name=f"{name}, average, all recomputed", grid=two, more={"average": Average(decay=0.5)} | again, **keys),
        Way(name=f"{name}, some recomputed", grid=two, whole=True, more={"recompute": "selective"}, **keys),
        Way(name=f"{name}, ZeRO-1", zero=1, grid=two, worlds=(4,), **keys),
        Way(name=f"{name}, ZeRO-2, all learns", zero=2, grid=two, whole=True, worlds=(4,), **keys),
        Way(name=f"{name}, ZeRO-3, all recomputed", zero=3, grid=two, whole=True, more=again, worlds=(4,), **keys),
        Way(name=f"{name}, pipeline 2", grid=staged, worlds=(4, 8), **keys),
        Way(
            name=f"{name}, pipeline 2, one conversation a row, all recomputed",
            grid=staged,
            whole=True,
            packed=False,
            more=again,
            worlds=(4,),
            **keys,
        ),
        Way(name=f"{name}, pipeline 2, ZeRO-1, all learns", zero=1, grid=staged, whole=True, worlds=(8,), **keys),
    ]


def pipelines() -> list[Way]:
    """Stages alone, with ZeRO-1 and with tensor."""
    found: list[Way] = []
    for stages in (2, 4):
        name, grid = f"pipeline {stages}", {"pipeline": stages}
        found += [Way(name=name, grid=grid), Way(name=f"{name}, all learns", grid=grid, whole=True)]
        found += [Way(name=f"{name}, GPipe", grid=grid | {"schedule": "gpipe"}, whole=True)]
    found += [
        Way(
            name="pipeline 2, average, all recomputed",
            grid={"pipeline": 2},
            whole=True,
            more={"average": Average(decay=0.5), "recompute": "full"},
        ),
        *(
            Way(name=f"pipeline 2, {dtype} SGD", grid={"pipeline": 2}, dtype=dtype, optimizer=SGD(momentum=0.9))
            for dtype in ("float32", "bfloat16")
        ),
    ]
    both: dict[str, Any] = {"tensor": 2, "pipeline": 2}
    found += [
        Way(name="pipeline 2, ZeRO-1", zero=1, grid={"pipeline": 2}),
        Way(name="pipeline 2, ZeRO-1, all learns", zero=1, grid={"pipeline": 2}, whole=True),
        Way(name="tensor 2, pipeline 2", grid=both, kv_heads=4, worlds=(4, 8)),
        Way(name="tensor 2, pipeline 2, all learns", grid=both, kv_heads=4, whole=True, worlds=(4, 8)),
        Way(name="tensor 2, pipeline 2, ZeRO-1, all learns", zero=1, grid=both, kv_heads=4, whole=True, worlds=(8,)),
        Way(
            name="tensor 2, pipeline 2, GPipe, clipped, all recomputed",
            grid=both | {"schedule": "gpipe"},
            kv_heads=4,
            whole=True,
            more={"clip_norm": 1e-2, "recompute": "full", "average": Average(decay=0.5)},
        ),
    ]
    return found


def compute_in(dtype: str) -> Compute:
    """On the CPU; float64 needs nothing of the loop."""
    return Compute(device="cpu", dtype="bfloat16" if dtype == "bfloat16" else "float32", threads=1, why=())


# --- models and data -----------------------------------------------------------------------------------------------


def source(*, pieces: int = 1, packed: bool = True, parallel: Parallel | None = None) -> ConversationBatches:
    """Six conversations a step, some with pictures; the share of this process."""
    rank, world = (parallel or Parallel()).grid(mesh.rank(), mesh.world()).share
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
        rank=rank,
        world=world,
    )


class Pictures:
    """Eight pictures and the features of their texts, the same in every step; the share of this process."""

    def __init__(self, *, pieces: int) -> None:
        self.pieces = pieces

    def step_batches(self, step: int) -> list[Batch]:
        """Of any step."""
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
    """A picture tower from scratch beside features of texts."""
    torch.manual_seed(0)
    sizes = ViTSizes(transformer=TransformerSizes(d=16, depth=2, heads=2, d_ff=24), patch=8, grid=(2, 2))
    return DualEncoder(nn.Linear(16, 8), nn.Linear(6, 8), scale=5.0, tower=VisionTransformer(sizes)).train()


def trained(
    model: nn.Module,
    folder: Path,
    *,
    batches: Batches | None = None,
    objective: Objective | None = None,
    hooks: Hooks | None = None,
    said: list[Event] | None = None,
    **settings: Any,
) -> nn.Module:
    """A model after its steps; each process has a folder of its own."""
    folder = folder / f"rank-{mesh.rank()}" if mesh.rank() else folder
    folder.mkdir(parents=True, exist_ok=True)
    compute = compute_in("float32")
    fit(
        model,
        objective or NextToken(),
        batches or source(parallel=settings.get("parallel")),
        settings=Settings(**{"steps": STEPS, "compute": compute, "optimizer": AdamW(weight_decay=0.1)} | settings),
        folder=folder,
        events=Events(listeners=() if said is None else (said.append,)),
        hooks=hooks,
    )
    return model


# --- the comparison ------------------------------------------------------------------------------------------------


def weights(model: nn.Module) -> dict[str, Tensor]:
    """What learns, in float64."""
    return {name: weight.detach().double() for name, weight in model.named_parameters() if weight.requires_grad}


def apart(found: Mapping[str, Tensor], expected: Mapping[str, Tensor], start: Mapping[str, Tensor]) -> float:
    """Largest distance of a weight, as a share of how far it moved."""
    assert found.keys() == expected.keys()
    moved = {name: float((expected[name] - start[name]).norm()) for name in expected}
    assert min(moved.values()) > 0
    return max(float((found[name] - expected[name]).norm()) / moved[name] for name in expected)


def compared(way: Way, folder: Path, *, world: int, pieces: int) -> list[Any]:
    """For each process how far it ended from one that trained alone, or what went wrong."""
    folder.mkdir(parents=True)

    def alone() -> str:
        batches = replace(way, grid={}).batches(1)
        model = trained(way.model(), folder / "alone", objective=way.objective(), batches=batches, **way.alone)
        torch.save(weights(model), folder / "alone.pt")
        return "kept"

    def work() -> float:
        model = trained(
            way.model(), folder / "several", objective=way.objective(), batches=way.batches(pieces), **way.settings
        )
        return apart(weights(model), torch.load(folder / "alone.pt", weights_only=True), weights(way.model()))

    kept = together(1, alone)
    return together(world, work) if kept == ["kept"] else kept


def measure(folder: Path, chosen: Sequence[Way] = ()) -> Iterator[dict[str, Any]]:
    """A record for each way (all of them by default), number of processes and micro-batches."""
    for way in chosen or ways():
        for world in filter(way.fits, way.worlds):
            for pieces in (1, 2):
                found = compared(way, folder / f"{way.name} {world} {pieces}", world=world, pieces=pieces)
                wrong = [one for one in found if not isinstance(one, float)]
                yield {
                    "way": way.name,
                    "format": way.dtype,
                    "processes": world,
                    "micro_batches": pieces,
                    "apart": None if wrong else max(found),
                    **({"wrong": wrong} if wrong else {}),
                }


def table(records: list[dict[str, Any]]) -> str:
    """Markdown: a line each way, largest distances for 2, 4 and 8 processes."""
    lines = ["| way | format | 2 processes | 4 processes | 8 processes |", "|---|---|---|---|---|"]
    for name in dict.fromkeys(record["way"] for record in records):
        mine = [record for record in records if record["way"] == name]
        worst = {n: max((r["apart"] for r in mine if r["processes"] == n), default=None) for n in (2, 4, 8)}
        said = ["" if number is None else f"{number:.1e}" for number in worst.values()]
        lines.append(f"| {name} | {mine[0]['format']} | {' | '.join(said)} |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description="How far several processes end from one that trains alone.")
    parser.add_argument("--keep", action="store_true", help="write the figures")
    parser.add_argument("--only", default="", help="ways whose names begin so; with --keep in place of their figures")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        records: list[dict[str, Any]] = []
        for record in measure(Path(folder), [way for way in ways() if way.name.startswith(args.only)]):
            print(record, flush=True)
            records.append(record)
    print(table(records))
    if args.keep:
        versions = {"plait": __version__, "torch": torch.__version__}
        order = {way.name: number for number, way in enumerate(ways())}
        others = read_json(RESULTS)["rows"] if args.only else []
        records += [row for row in others if row["way"] in order and not row["way"].startswith(args.only)]
        records.sort(key=lambda row: order[row["way"]])
        about = {"date": str(datetime.date.today()), "cpu": cpu_name(), **versions, "steps": STEPS}
        write_json(RESULTS, about | {"bounds": dict(BOUNDS), "rows": records})


if __name__ == "__main__":
    main()
