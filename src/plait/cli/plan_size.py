"""``plait plan --params N --tokens D --gpus G``: what a pretraining of that size takes, before there is any recipe."""

from __future__ import annotations

import argparse
from dataclasses import asdict

from plait.cli.output import Out

_DEFAULTS = {"gpus": 1.0, "tflops": 312.0, "mfu": 0.4, "memory_gib": 80.0, "batch_tokens": 4e6, "length": 2048.0}
"""An A100's peak in bfloat16 and its memory; 40 % of the peak is what large trainings reach."""


def add(parser: argparse.ArgumentParser) -> None:
    """Arguments for a plan without a recipe."""
    group = parser.add_argument_group("without a recipe: a pretraining of some size, from closed forms")
    group.add_argument("--params", type=float, metavar="N", help="weights, such as 7e9")
    group.add_argument("--tokens", type=float, metavar="D", help="tokens seen in training, such as 1.4e12")
    helps = {
        "gpus": "devices that work on it",
        "tflops": "peak of each in TFLOP/s, an A100's in bfloat16 by default",
        "mfu": "share of the peak that is reached",
        "memory_gib": "memory of each",
        "batch_tokens": "tokens of a step",
        "length": "tokens of a row",
    }
    for name, text in helps.items():
        flag = f"--{name.replace('_', '-')}"
        group.add_argument(flag, type=float, metavar="X", help=f"{text} (default: {_DEFAULTS[name]:g})")


def asked(args: argparse.Namespace) -> bool:
    """Whether any of these arguments is given."""
    return any(getattr(args, name) is not None for name in ("params", "tokens", *_DEFAULTS))


def main(args: argparse.Namespace, out: Out) -> int:
    """Print operations, time, memory and the layouts that fit."""
    from plait.cli.advise_parallel import describe
    from plait.cli.plan import si
    from plait.training.parallel.advise import Cluster, Work, layouts
    from plait.training.plan import size
    from plait.training.scale import scale, usual_shape

    given = _numbers(args)
    devices, length = round(given["gpus"]), round(given["length"])
    found = scale(
        weights=given["params"], tokens=given["tokens"], devices=devices, peak=given["tflops"] * 1e12, mfu=given["mfu"]
    )
    shape = usual_shape(given["params"])
    rows = max(1, round(given["batch_tokens"] / length))
    cluster = Cluster(
        processes=devices,
        per_host=min(8, devices),
        memory_bytes=round(given["memory_gib"] * 2**30),
        flops=given["tflops"] * 1e12 * given["mfu"],
        near=100e9,
        far=10e9,
    )
    ways = layouts(Work(shape=shape, rows=rows, length=length, recompute=True), cluster)
    days = found.seconds / 86_400
    weights, tokens = (si(given[name]).strip() for name in ("params", "tokens"))
    out.line(f"{weights} weights, {tokens} tokens: {found.tokens_per_weight:.3g} tokens a weight")
    out.line(f"operations  {found.flops:.3g} = 6 N D, {_round(found.petaflop_days)} petaFLOP/s-days")
    out.line(
        f"time        {_round(days)} days on {devices:,} devices at {given['mfu']:.0%} of {given['tflops']:g} TFLOP/s: "
        f"{_round(found.device_hours)} device-hours, {_round(found.tokens_per_s)} tokens/s each"
    )
    out.line(f"state       {size(round(found.state_bytes))} in all: weights, gradients, Adam's moments, float32")
    out.line()
    out.line(f"layouts of a decoder of usual proportions ({shape.layers} layers of {shape.d_model:,}),")
    out.line(f"{rows:,} rows of {length:,} tokens a step, blocks recomputed; of your own: `plait advise parallel`")
    for line in describe(ways, shape.params, given["memory_gib"]):
        out.line(line)
    best = [{"parallel": one.parallel.model_dump(exclude_defaults=True), "bytes": one.peak} for one in ways if one.fits]
    out.result({"asked": given, **asdict(found), "shape": asdict(shape), "layouts": best[:8]})
    return 0


def _round(amount: float) -> str:
    """Three digits, or all before the point."""
    return f"{amount:,.0f}" if amount >= 100 else f"{amount:.3g}"


def _numbers(args: argparse.Namespace) -> dict[str, float]:
    """All numbers, checked.

    Raises:
        UsageError: One is missing, not above 0, or above what it can be.
    """
    from plait.core.errors import UsageError

    if args.recipe is not None or args.probe is not None or args.processes:
        what = args.recipe if args.recipe is not None else "--probe" if args.probe is not None else "--processes"
        raise UsageError(
            f"{what} and a size are both given", remedy="plan a recipe, or a size by --params and --tokens alone"
        )
    given = {name: getattr(args, name) for name in ("params", "tokens")}
    given |= {
        name: default if getattr(args, name) is None else getattr(args, name) for name, default in _DEFAULTS.items()
    }
    for name, value in given.items():
        flag = f"--{name.replace('_', '-')}"
        most = 1.0 if name == "mfu" else float("inf")
        if value is None or not 0 < value <= most or value == float("inf"):
            came = "missing" if value is None else f"{value:g}"
            wanted = "more than 0" if name != "mfu" else "more than 0, at most 1"
            raise UsageError(f"{flag} is {came}, expected {wanted}", place=flag, remedy=f"give {flag} a number")
    for name in ("gpus", "length"):
        if given[name] != round(given[name]):
            raise UsageError(f"--{name} is {given[name]:g}, expected a whole number", place=f"--{name}")
    return given
