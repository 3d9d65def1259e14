"""A contrastive batch at once and in micro-batches with cached gradients: memory and time of one step, equal gradients.

A vision transformer from scratch and a head on text features learn from 512 pairs by symmetric InfoNCE. Every
measurement is a process of its own with one thread; the variants take turns. Memory is measured in two ways: the bytes
of all tensors alive at once in the step (weights, their gradients and the input left out), counted operation by
operation; and the RAM of the process above what it held before the step. Time is wall time and CPU time.

Run: ``python benchmarks/big_batch.py [--rounds 3] [--batch 512]``; writes ``benchmarks/results/big_batch.json``.
"""

from __future__ import annotations

import argparse
import datetime
import multiprocessing
import os
import platform
import statistics
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from plait import __version__
from plait.assembly.scratch import build_tower
from plait.core.device import cpu_name, usable_cores
from plait.core.files import read_json, write_json
from plait.core.tensors import Batch, Patches
from plait.models.dual import DualEncoder
from plait.models.heads import ProjectionHead
from plait.models.measure import Alive
from plait.models.specs import ViT
from plait.objectives.contrastive import Contrastive
from plait.training.gradient import accumulate
from sides.measure import Start

RESULTS = Path(__file__).parent / "results" / "big_batch.json"
TOWER = ViT(size=64, patch=8, d=128, depth=6, heads=4)
TEXT_WIDTH, HIDDEN, SHARED = 384, 1024, 512


@dataclass(frozen=True)
class Case:
    """A step of ``batch`` pairs, ``micro`` at once; counted, with its gradient kept, or timed."""

    batch: int
    micro: int
    count: bool = False


def build() -> DualEncoder:
    """Tower and heads, drawn anew; no dropout, so that all variants compute the same function."""
    torch.manual_seed(0)
    heads = [ProjectionHead(width, HIDDEN, SHARED, dropout=0.0) for width in (TOWER.d, TEXT_WIDTH)]
    return DualEncoder(heads[0], heads[1], tower=build_tower(TOWER)).train()


def draw(batch: int, micro: int) -> list[Batch]:
    """A batch of random pixels and text features in micro-batches."""
    generator = torch.Generator().manual_seed(1)
    cells = TOWER.size**2
    pixels, text = (
        torch.rand(batch * cells, 3, generator=generator),
        torch.randn(batch, TEXT_WIDTH, generator=generator),
    )
    pieces: list[Batch] = []
    for start in range(0, batch, micro):
        number = min(micro, batch - start)
        ones, place = torch.ones(number, 3, dtype=torch.long), torch.arange(number)
        grid = torch.tensor([[1, TOWER.size, TOWER.size]] * number)
        media: Any = {
            "image": Patches(values=pixels[start * cells : (start + number) * cells].clone(), grid=grid),
            "text": Patches(values=text[start : start + number].clone(), grid=ones),
        }
        pieces.append(
            Batch(
                token_ids=torch.zeros(number, 1, dtype=torch.long),
                labels=torch.arange(start, start + number)[:, None],
                segment_ids=ones[:, :1],
                media=media,
                item_row={"image": place, "text": place},
                sample_ids=tuple(str(start + i) for i in range(number)),
            )
        )
    return pieces


def step(model: DualEncoder, pieces: list[Batch]) -> float:
    """Gradients of one step; returns the loss."""
    return accumulate(model, Contrastive(), pieces, weights={}).loss


def measure(case: Case, path: Path) -> None:
    """One step in this process."""
    torch.set_num_threads(1)
    model, pieces = build(), draw(case.batch, case.micro)
    for weight in model.parameters():
        weight.grad = torch.zeros_like(weight)
    step(model, draw(8, 8))  # what is made once
    model.zero_grad(set_to_none=False)
    found: dict[str, Any] = {}
    if case.count:
        inputs = [media.values for piece in pieces for media in piece.media.values()]
        gradients = [weight.grad for weight in model.parameters() if weight.grad is not None]
        with Alive((*model.parameters(), *model.buffers(), *gradients, *inputs)) as alive:
            found["loss"] = step(model, pieces)
        found["counted"] = alive.most
        np.save(path.with_suffix(".npy"), torch.cat([gradient.flatten() for gradient in gradients]).numpy())
    else:
        start, cpu = Start.now(model.parameters()), time.process_time()
        step(model, pieces)
        found |= start.stop() | {"cpu": time.process_time() - cpu}
    write_json(path, found)


def forked(case: Case, path: Path) -> dict[str, Any]:
    """The same in a process of its own, which does not load torch again."""
    child = multiprocessing.get_context("fork").Process(target=measure, args=(case, path))
    child.start()
    child.join()
    if child.exitcode:
        raise SystemExit(f"{case}: the process ended with {child.exitcode}")
    return read_json(path)


def spread(values: list[float]) -> dict[str, float]:
    """Median, least and most."""
    return {"median": statistics.median(values), "least": min(values), "most": max(values)}


def distance(one: Tensor, other: Tensor) -> float:
    """Norm of the difference over the norm of the other."""
    return float((one.double() - other.double()).norm() / other.double().norm())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--batch", type=int, default=512)
    parser.add_argument("--micro", type=int, nargs="*", default=[64, 32])
    given = parser.parse_args()
    sizes = [given.batch, *given.micro]
    load = os.getloadavg()[0]
    rows: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        counted = [forked(Case(given.batch, size, count=True), folder / f"count-{size}.json") for size in sizes]
        whole = torch.from_numpy(np.load(folder / f"count-{sizes[0]}.npy"))
        gaps = [distance(torch.from_numpy(np.load(folder / f"count-{size}.npy")), whole) for size in sizes]
        if max(gaps) > 1e-5:
            raise SystemExit(f"gradients differ: {gaps}")
        rounds = [
            [forked(Case(given.batch, size), folder / f"{at}-{size}.json") for size in sizes]
            for at in range(given.rounds)
        ]
    for at, (size, one) in enumerate(zip(sizes, counted, strict=True)):
        runs = [row[at] for row in rounds]
        rows.append(
            {
                "batch": given.batch,
                "micro_batch": size,
                "gradient_distance": gaps[at],
                "loss": one["loss"],
                "counted_bytes": one["counted"],
                "counted_ratio": one["counted"] / counted[0]["counted"],
                "above_bytes": spread([run["above"] for run in runs]),
                **{part: spread([run[part] for run in runs]) for part in ("seconds", "cpu")},
                "cpu_ratio": spread([run["cpu"] / row[0]["cpu"] for run, row in zip(runs, rounds, strict=True)]),
            }
        )
        print(rows[-1], flush=True)
    record = {
        "benchmark": "big_batch",
        "date": datetime.datetime.now(datetime.UTC).date().isoformat(),
        "machine": {"cpu": cpu_name(), "cores": usable_cores(), "system": f"{platform.system()} {platform.machine()}"},
        "versions": {"plait": __version__, "torch": torch.__version__, "python": platform.python_version()},
        "rounds": given.rounds,
        "threads": 1,
        "load_average_before": load,
        "tower": TOWER.model_dump(mode="json"),
        "learning_weights": sum(weight.numel() for weight in build().parameters()),
        "rows": rows,
    }
    write_json(RESULTS, record)


if __name__ == "__main__":
    main()
