"""What ``test_norm_ranks.py`` starts: ``python norm_ranks.py FOLDER`` trains in several processes, prints JSON.

torch is imported once; every rank is forked from there, before any torch operation.
"""

from __future__ import annotations

import json
import sys
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

from benchmarks.layouts import Way, source, trained, ways
from benchmarks.sides.several import together

from plait.core import collectives, mesh
from plait.core.files import read_jsonl
from plait.training import norm
from plait.training.model_flops import multimodal_flops
from plait.training.units import placeholders, total_units

TRIED = {
    "DDP": 2,
    "ZeRO-3, all learns": 2,
    "tensor 2, ZeRO-3, all learns": 4,
    "pipeline 2, GPipe": 2,
    "tensor 2, pipeline 2, all learns": 4,
    "expert 2, all learns": 2,
}
MESSAGES: list[None] = []


def counting(*arguments: Any) -> Any:
    MESSAGES.append(None)
    return collectives.all_reduce_sum(*arguments)


class Counted:
    """The collectives as the norm sees them."""

    all_reduce_sum = staticmethod(counting)


def norms(way: Way, folder: Path) -> dict[str, Any]:
    """Norms of every step of one process, what a step works on, and messages a step that norms took."""
    norm.collectives = Counted  # pyright: ignore[reportAttributeAccessIssue]
    settings = way.settings if mesh.world() > 1 else way.alone
    batches = source(parallel=way.parallel, packed=way.packed)
    trained(way.model(), folder, batches=batches, objective=way.objective(), **settings)
    own = folder / f"rank-{mesh.rank()}" if mesh.rank() else folder
    records = read_jsonl(own / "metrics.jsonl")
    model = way.model()
    grid = way.parallel.grid(mesh.rank(), mesh.world())
    flops = None if way.mixture else multimodal_flops(model)
    units = total_units(batches.step_batches(0), grid, placeholders=placeholders(model), flops=flops)
    told = asdict(units)
    told |= told.pop("media")
    del told["positions"]  # each process packs its own share
    return {
        "norms": [{k: v for k, v in one.items() if k.startswith("grad_norm")} for one in records],
        "units": told,
        "messages": len(MESSAGES) / len(records),
    }


def main(root: Path) -> dict[str, Any]:
    """By way: what one process says, and each of several."""
    known = {way.name: way for way in ways()}
    found: dict[str, Any] = {}
    for name, world in TRIED.items():
        one = together(1, partial(norms, known[name], root / f"{name} one"))
        found[name] = one + together(world, partial(norms, known[name], root / f"{name} {world}"))
    return found


if __name__ == "__main__":
    print(json.dumps(main(Path(sys.argv[1]))))
