"""How long the stages of a pipeline stand idle, measured, beside the formula ``(p - 1) / (m + p - 1)``.

Stages sleep instead of computing, 60 ms forward and 120 ms backward, so that any number of them is at work at the same
time whatever the cores; messages are real, over gloo. What is above the formula is their time, and the system's.

Run: ``python benchmarks/bubbles.py [--keep]``, a minute; writes ``benchmarks/results/bubbles.json``. A test holds
bounds for some of them.
"""

from __future__ import annotations

import argparse
import datetime
import sys
import time
from collections.abc import Iterator
from dataclasses import astuple
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

sys.path.insert(0, str(Path(__file__).parents[1]))

from benchmarks.sides.several import together

from plait import __version__
from plait.core import mesh
from plait.core.device import cpu_name
from plait.core.files import write_json
from plait.training.parallel.order import SCHEDULES, Span, bubble, idle_share
from plait.training.parallel.runner import Link, Timeline, run

RESULTS = Path(__file__).parent / "results" / "bubbles.json"
SLEEP_S = 0.06


def link() -> Link:
    """All processes in one pipeline."""
    world = list(range(mesh.world()))
    return Link(dist.new_group(world), dist.new_group(world), device="cpu")


class Slow(torch.autograd.Function):
    """Nothing; its gradient takes twice as long as what comes before it."""

    @staticmethod
    def forward(_: Any, value: Tensor) -> Tensor:
        """The same."""
        return value * 1

    @staticmethod
    def backward(_: Any, gradient: Tensor) -> Tensor:
        """The same, later."""
        time.sleep(2 * SLEEP_S)
        return gradient


def asleep(name: str, *, micro: int) -> list[list[Any]]:
    """The timeline of stages that only sleep, as plain data of all of them."""
    ends = link()
    weight = torch.ones((), requires_grad=True)

    def compute(_: int, received: Tensor | None) -> Tensor:
        time.sleep(SLEEP_S)
        output = Slow.apply((torch.zeros(4) if received is None else received) * weight)
        return output.sum() if ends.last else output

    run(SCHEDULES[name](ends.stage, ends.stages, 1), compute, ends)  # connections are made
    timeline = Timeline(ends.stage)
    run(SCHEDULES[name](ends.stage, ends.stages, micro), compute, ends, timeline=timeline)
    return [astuple(span) for spans in mesh.gather(timeline.spans) for span in spans]


def measured(name: str, stages: int, micro: int) -> list[Span]:
    """What the stages did in a step."""
    return [Span(*span) for span in together(stages, partial(asleep, name, micro=micro))[0]]


def measure() -> Iterator[dict[str, Any]]:
    """A record for each schedule, number of stages and of micro-batches."""
    for stages in (2, 4):
        for micro in (1, 2, 4, 8):
            for name in SCHEDULES:
                idle = idle_share(measured(name, stages, micro))
                yield {
                    "schedule": name,
                    "stages": stages,
                    "micro_batches": micro,
                    "idle": round(idle, 4),
                    "formula": round(bubble(stages, micro), 4),
                }


def table(records: list[dict[str, Any]]) -> str:
    """Markdown: a line for each number of stages and micro-batches."""
    lines = ["| stages | micro-batches | formula | 1F1B | GPipe |", "|---|---|---|---|---|"]
    keys = dict.fromkeys((record["stages"], record["micro_batches"], record["formula"]) for record in records)
    for stages, micro, formula in keys:
        mine = [r for r in records if (r["stages"], r["micro_batches"]) == (stages, micro)]
        idle = {record["schedule"]: record["idle"] for record in mine}
        lines.append(f"| {stages} | {micro} | {formula:.1%} | {idle['1f1b']:.1%} | {idle['gpipe']:.1%} |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description="How long the stages of a pipeline stand idle.")
    parser.add_argument("--keep", action="store_true", help="write the figures")
    args = parser.parse_args()
    records: list[dict[str, Any]] = []
    for record in measure():
        print(record, flush=True)
        records.append(record)
    print(table(records))
    if args.keep:
        versions = {"plait": __version__, "torch": torch.__version__}
        about = {"date": str(datetime.date.today()), "cpu": cpu_name(), **versions, "sleep_s": SLEEP_S}
        write_json(RESULTS, about | {"rows": records})


if __name__ == "__main__":
    main()
