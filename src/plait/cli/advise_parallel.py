"""``plait advise parallel``: which layout of several processes fits their memory, and which of them is fastest."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import TYPE_CHECKING

from plait.cli.output import Out

if TYPE_CHECKING:
    from plait.training.cost import DecoderShape
    from plait.training.parallel.advise import Judged

_SHOWN = 8
_NUMBERS = ("processes", "per_host", "memory_gib", "rows", "length", "micro_rows", "tflops", "near_gbps", "far_gbps")


def add(parser: argparse.ArgumentParser) -> None:
    """Arguments of the verb."""
    parser.add_argument("--decoder", type=Path, metavar="FOLDER", help="model folder (config.json); else SmolLM2-135M")
    parser.add_argument("--processes", type=int, required=True, metavar="N", help="how many torchrun starts, in all")
    parser.add_argument("--per-host", type=int, default=8, metavar="N", help="of them on one machine (default: 8)")
    parser.add_argument("--memory-gib", type=float, required=True, metavar="GIB", help="memory of each process")
    parser.add_argument("--rows", type=int, default=64, metavar="N", help="rows of a batch (default: 64)")
    parser.add_argument("--length", type=int, default=2048, metavar="N", help="positions of a row (default: 2048)")
    parser.add_argument("--micro-rows", type=int, default=1, metavar="N", help="rows at once (default: 1)")
    parser.add_argument(
        "--lora", type=int, default=0, metavar="RANK", help="adapters alone learn (default: all learns)"
    )
    parser.add_argument("--recompute", action="store_true", help="blocks keep their inputs alone")
    parser.add_argument("--tflops", type=float, default=100.0, help="what a process reaches (default: 100)")
    parser.add_argument("--near-gbps", type=float, default=100.0, help="GB/s within a machine (default: 100)")
    parser.add_argument("--far-gbps", type=float, default=10.0, help="GB/s between machines (default: 10)")


def main(args: argparse.Namespace, out: Out) -> int:
    """Rank layouts and print what each takes."""
    from plait.core.errors import UsageError
    from plait.training.cost import SMOLLM2_135M, Lora
    from plait.training.parallel.advise import Cluster, Work, layouts

    for name in (
        "processes",
        "per_host",
        "memory_gib",
        "rows",
        "length",
        "micro_rows",
        "tflops",
        "near_gbps",
        "far_gbps",
    ):
        if not 0 < getattr(args, name) < float("inf"):
            flag = f"--{name.replace('_', '-')}"
            raise UsageError(
                f"{flag} is {getattr(args, name):g}, expected more than 0", place=flag, remedy=f"give {flag} N"
            )
    shape = _shape(args.decoder) if args.decoder else SMOLLM2_135M
    work = Work(
        shape=shape,
        rows=args.rows,
        length=args.length,
        micro_rows=args.micro_rows,
        lora=Lora(rank=args.lora, targets=tuple(shape.matrices())) if args.lora else None,
        recompute=args.recompute,
    )
    cluster = Cluster(
        processes=args.processes,
        per_host=args.per_host,
        memory_bytes=round(args.memory_gib * 2**30),
        flops=args.tflops * 1e12,
        near=args.near_gbps * 1e9,
        far=args.far_gbps * 1e9,
    )
    found = layouts(work, cluster)
    for line in describe(found, shape.params, args.memory_gib):
        out.line(line)
    plain = [
        {
            "parallel": one.parallel.model_dump(exclude_defaults=True),
            "data": one.data,
            "fits": one.fits,
            "memory": one.memory,
            "sent": one.sent,
            "idle": one.idle,
            "compute_s": one.compute_s,
            "step_s": one.step_s,
        }
        for one in found
    ]
    out.result({"weights": shape.params, "layouts": plain})
    return 0


def _shape(folder: Path) -> DecoderShape:
    from plait.core.errors import ConfigError
    from plait.training.cost import DecoderShape

    if not (folder / "config.json").is_file():
        raise ConfigError(
            "there is no config.json",
            place=str(folder),
            remedy="give the folder of a decoder in Hugging Face's layout, or leave --decoder out",
        )
    if (shape := DecoderShape.of_folder(folder)) is None:
        raise ConfigError(
            "no decoder of LLaMA's kin: sizes have other names",
            place=str(folder / "config.json"),
            remedy="give another folder",
        )
    return shape


def describe(found: list[Judged], weights: int, memory_gib: float) -> list[str]:
    """The answer as lines."""
    from plait.cli.plan import si

    rows = [["", "trainer.parallel", "data", "GiB a process", "sent a step, GiB", "idle", "s a step"]]
    fitting = [one for one in found if one.fits]
    for number, one in enumerate((fitting or found)[:_SHOWN], 1):
        settings = ", ".join(f"{k}: {v}" for k, v in one.parallel.model_dump(exclude_defaults=True).items())
        settings = settings.replace("True", "true")  # as a recipe has it
        sent = " + ".join(f"{count / 2**30:.2f} {name}" for name, count in one.sent.items()) or "0"
        rows.append(
            [
                str(number),
                f"{{{settings}}}",
                str(one.data),
                f"{one.peak / 2**30:.1f}",
                sent,
                f"{one.idle:.0%}",
                f"{one.step_s:.3g}",
            ]
        )
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    lines = ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows]
    head = f"{si(weights)} weights: {len(fitting)} of {len(found)} layouts fit {memory_gib:g} GiB"
    if not fitting:
        head += "; those that come nearest:"
    return [
        head,
        *lines,
        "from closed forms: weights, gradients and Adam's moments in float32, activations that autograd keeps,",
        "messages around rings, nothing overlapping; without towers and what is gathered for a moment",
    ]
