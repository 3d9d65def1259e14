"""What processes that divide matrices keep for the backward pass, without and with pieces of rows between them.

One step over one document, as in ``benchmarks/context.py``: bytes of distinct storages that autograd saves in a
process, weights left out, and what it sends in a step by the closed form. All weights learn.

Run: ``python benchmarks/pieces.py [--keep]``, a minute on two cores; writes ``benchmarks/results/pieces.json``.
"""

from __future__ import annotations

import argparse
import datetime
import sys
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import torch

sys.path.insert(0, str(Path(__file__).parents[1]))

from benchmarks.context import HEADS, KEYS, LAYERS, LENGTH, WIDTH, WORDS, kept
from benchmarks.sides.several import together

from plait import __version__
from plait.core.device import cpu_name
from plait.core.files import write_json
from plait.training.cost import DecoderShape, Recompute
from plait.training.parallel.messages import messages
from plait.training.parallel.share import Member, Model
from plait.training.trainer import Parallel

RESULTS = Path(__file__).parent / "results" / "pieces.json"
SHAPE = DecoderShape(layers=LAYERS, d_model=WIDTH, d_ff=688, heads=HEADS, kv_heads=KEYS, vocab=WORDS)


def memory(length: int = LENGTH) -> Iterator[dict[str, Any]]:
    """A record for each layout and recomputation; the largest of all processes."""
    alone: list[dict[str, Any]] = [{}]
    several = [{"tensor": world, "sequence": sequence} for world in (2, 4) for sequence in (False, True)]
    for setting in alone + several:
        member = Member.of(Parallel.model_validate(setting), rank=0, world=setting.get("tensor", 1))
        again: Recompute
        for again in ("none", "full"):
            found = together(member.world, partial(kept, length, setting, fused=True, recompute=again))
            assert all(isinstance(one, dict) for one in found), found
            sent = messages(
                member,
                Model(shape=SHAPE, width=4, learns=True),
                positions=length,
                micro=1,
                width=4,
                stream=4,
                again=again == "full",
            )
            parts = [name if value is True else f"{name} {value}" for name, value in setting.items() if value]
            yield {
                "way": ", ".join(parts) or "one process",
                "recompute": again,
                "length": length,
                "kept": max(one["kept"] for one in found),
                "sent": sent.get("tensor", 0),
            }


def table(records: list[dict[str, Any]]) -> str:
    """Markdown: MiB of each process."""
    lines = ["| way | kept, MiB | recomputed | sent, MiB | recomputed |", "|---|---|---|---|---|"]
    for plain, again in zip(records[::2], records[1::2], strict=True):
        sizes = (plain["kept"], again["kept"], plain["sent"], again["sent"])
        lines.append(f"| {plain['way']} | {' | '.join(f'{size / 2**20:.1f}' for size in sizes)} |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description="Activations kept where matrices are divided, and pieces of rows.")
    parser.add_argument("--keep", action="store_true", help="write the figures")
    args = parser.parse_args()
    records: list[dict[str, Any]] = []
    for record in memory():
        print(record, flush=True)
        records.append(record)
    print(table(records))
    if args.keep:
        versions = {"plait": __version__, "torch": torch.__version__}
        write_json(RESULTS, {"date": str(datetime.date.today()), "cpu": cpu_name(), **versions, "rows": records})


if __name__ == "__main__":
    main()
