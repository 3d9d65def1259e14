"""Pictures at their own resolution: packed, a batch a shape, or padded to one canvas; pictures a second.

One vision transformer, the same weights and pictures: packed pictures and batches of one shape give the same values
(checked first); a canvas of the largest height and width is what one has without either. The waste is counted beside
it: places computed for each real token, and scores of attention computed for each that is needed. All ways run in turn,
so that a busy moment hits them alike; figures are medians.

Run: ``python benchmarks/native_packing.py [--rounds 5] [--keep]``; ``--keep`` writes
``benchmarks/results/native_packing.json``.
"""

from __future__ import annotations

import argparse
import datetime
import os
import random
import statistics
import time
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

from plait import __version__
from plait.assembly.fit import Native
from plait.core.device import cpu_name, usable_cores
from plait.core.files import write_json
from plait.core.tensors import Patches
from plait.models.build import build_encoder
from plait.models.ragged import packed_rows
from plait.models.specs import ViT
from plait.models.towers.vit import VisionTransformer

RESULTS = Path(__file__).parent / "results" / "native_packing.json"
PATCH = 16
Shapes = list[tuple[int, int]]


def shapes(count: int, *, most: int, seed: int = 0) -> Shapes:
    """Heights and widths as a contract at native resolution gives them: sides drawn log-uniformly, 64 to 1,024."""
    rng = random.Random(seed)
    fit = Native(cell=PATCH, max_pixels=most)
    drawn = [[round(64 * 16 ** rng.random()) for _ in range(2)] for _ in range(count)]
    return [(item.height, item.width) for width, height in drawn for item in fit.items(width, height, size=0)]


def ways(tower: VisionTransformer, sizes: Shapes, rows: list[int]) -> dict[str, Callable[[], Tensor]]:
    """Each way as a call that gives tokens."""
    torch.manual_seed(0)
    grid = torch.tensor([[1, h, w] for h, w in sizes])
    media = Patches(values=torch.rand(int(grid.prod(1).sum()), 3), grid=grid)
    canvas = torch.zeros(len(sizes), 3, *(max(side) for side in zip(*sizes, strict=True)))
    for place, values, (h, w) in zip(canvas, media.values.split(grid.prod(1).tolist()), sizes, strict=True):
        place[:, :h, :w] = values.view(h, w, 3).permute(2, 0, 1)

    def run(row: int | None) -> Tensor:
        tower.row = row
        return tower(media).values

    found: dict[str, Callable[[], Tensor]] = {
        "a batch a shape": lambda: run(None),
        "packed, picture by picture": lambda: run(0),
    }
    found |= {f"packed, rows of {row}": lambda row=row: run(row) for row in rows}
    reference = run(None).detach()
    for name, call in found.items():
        if (call().detach() - reference).norm() > 1e-4 * reference.norm():
            raise SystemExit(f"{name} gives other values")
    return found | {"padded to one canvas": lambda: tower.features(canvas)}


def waste(tower: VisionTransformer, sizes: Shapes, name: str) -> tuple[float, float]:
    """Places computed for a real token, and scores computed for one that is needed."""
    lengths = torch.tensor([tower.prefix + (h // PATCH) * (w // PATCH) for h, w in sizes])
    needed = int(lengths.sum()), int(lengths.square().sum())
    if name.startswith("packed, rows"):
        b, t = packed_rows(lengths, int(name.rpartition(" ")[2])).segment_ids.shape
    elif name.startswith("padded"):
        h, w = (max(side) // PATCH for side in zip(*sizes, strict=True))
        b, t = len(sizes), tower.prefix + h * w
    else:
        return 1.0, 1.0
    return b * t / needed[0], b * t * t / needed[1]


def main() -> None:
    """Measure and print; write the figures if asked to."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--pictures", type=int, default=32)
    parser.add_argument("--width", type=int, default=384)
    parser.add_argument("--depth", type=int, default=12)
    parser.add_argument("--max-pixels", type=int, default=224 * 224)
    parser.add_argument("--rows", type=int, nargs="*", default=[196, 256, 512])
    parser.add_argument("--keep", action="store_true")
    parser.add_argument("--cpu-time", action="store_true", help="seconds of this process, where others run beside it")
    args = parser.parse_args()
    clock = time.process_time if args.cpu_time else time.perf_counter
    load = os.getloadavg()[0]
    spec = ViT(d=args.width, depth=args.depth, heads=args.width // 64, position="sincos", relative="rope")
    tower = build_encoder(spec)
    assert isinstance(tower, VisionTransformer)
    sizes = shapes(args.pictures, most=args.max_pixels)
    calls = ways(tower, sizes, args.rows)
    print(f"{len(sizes)} pictures, {len(set(sizes))} shapes; load {load:.1f}")
    times: dict[tuple[str, bool], list[float]] = {(name, back): [] for name in calls for back in (False, True)}
    for _ in range(args.rounds):
        for name, call in calls.items():
            for backward in (False, True):
                begun = clock()
                with torch.set_grad_enabled(backward):
                    found = call()
                    if backward:
                        found.sum().backward()
                times[name, backward].append(clock() - begun)
    rows = []
    for name in calls:
        tokens, scores = waste(tower, sizes, name)
        forward, both = (len(sizes) / statistics.median(times[name, backward]) for backward in (False, True))
        rows.append({"way": name, "forward_per_s": forward, "both_per_s": both, "places": tokens, "scores": scores})
        print(f"| {name} | {forward:.1f} | {both:.1f} | {tokens:.2f} | {scores:.2f} |", flush=True)
    if args.keep:
        machine = {"cpu": cpu_name(), "cores": usable_cores(), "load_before": load, **vars(args)}
        versions = {"plait": __version__, "torch": torch.__version__}
        write_json(RESULTS, {"date": str(datetime.date.today()), **machine, **versions, "rows": rows})


if __name__ == "__main__":
    main()
