"""``plait advise encoder``: which encoder, from what is counted, measured on this machine, and published.

And ``plait advise parallel`` (:mod:`plait.cli.advise_parallel`).
"""

from __future__ import annotations

import argparse
import os
import sys
import textwrap
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from plait.cli import advise_parallel
from plait.cli.output import Out

if TYPE_CHECKING:
    from plait.models.advise import Candidate, Judged, Need

MOST_PIXELS = 2**26
"""In a batch; encoders need some hundred bytes for each."""
TASKS = ("classify", "retrieve", "generate", "dense")


def add(parser: argparse.ArgumentParser) -> None:
    """Arguments of the verb."""
    parts = parser.add_subparsers(dest="part", metavar="WHAT", required=True)
    _add_encoder(parts.add_parser("encoder", help="which encoder: counted, measured on this machine, published"))
    advise_parallel.add(parts.add_parser("parallel", help="how several processes divide a model that trains"))


def _add_encoder(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--modality", choices=("image",), default="image", help="what it reads (default: image)")
    parser.add_argument("--size", type=int, default=224, metavar="PIXELS", help="pixels a side (default: 224)")
    parser.add_argument("--batch", type=int, default=1, metavar="N", help="pictures at once (default: 1)")
    parser.add_argument("--task", choices=TASKS, help="what its features are for (default: classify)")
    parser.add_argument("--latency-ms", type=float, metavar="MS", help="most milliseconds a picture")
    parser.add_argument("--memory-mib", type=float, metavar="MIB", help="most memory")
    parser.add_argument("--train-pictures", type=int, metavar="N", help="pictures there are to train on")
    parser.add_argument(
        "--pretrained", action="append", default=[], metavar="FOLDER", help="also a tower from a local folder; repeat"
    )
    parser.add_argument("--seconds", type=float, default=30.0, help="time for measuring, in all (default: 30)")
    parser.add_argument("--again", action="store_true", help="measure anew what was measured before")


def main(args: argparse.Namespace, out: Out) -> int:
    """Rank candidates and print why."""
    if args.part == "parallel":
        return advise_parallel.main(args, out)
    _check(args)
    if not out.json and sys.stdin.isatty() and sys.stdout.isatty():
        _ask(args)
    out.line(f"counting, then measuring for at most about {args.seconds:.0f} s ...")
    import torch

    from plait import __version__
    from plait.core.device import fingerprint, setup, usable_cores
    from plait.core.packages import home
    from plait.models.advise import Clock, Need, judge, rules, scratch_candidates

    need = Need(
        size=args.size,
        batch=args.batch,
        task=args.task or "classify",
        latency_ms=args.latency_ms or 0.0,
        memory_mib=args.memory_mib or 0.0,
        train_pictures=args.train_pictures,
    )
    compute = setup()
    towers, notes = _pretrained(args.pretrained, need, compute.dtype)
    clock = Clock(compute=compute, cache=home() / "advise", seconds=args.seconds, again=args.again)
    found = judge([*towers, *scratch_candidates(need.size)], need, clock)
    load = os.getloadavg()[0]
    machine = {**fingerprint(compute), "torch": torch.__version__, "plait": __version__, "load_average": round(load, 2)}
    if load > 1.5 * usable_cores():
        notes.append(f"load average {load:.1f} on {usable_cores()} cores: the machine is busy, and alone it is faster")
    for line in describe(found, need, notes):
        out.line(line)
    out.line(f"machine  {machine['device']}, {compute.threads} threads, {compute.dtype}; torch {torch.__version__}")
    out.result(
        {
            "need": {name: getattr(need, name) for name in need.__dataclass_fields__},
            "machine": machine,
            "candidates": [one.as_dict() for one in found],
            "rules": [{"says": r.says, "evidence": r.evidence, "source": r.source} for r in rules(need)],
            "notes": notes,
        }
    )
    return 0


def _check(args: argparse.Namespace) -> None:
    """Refuse numbers that mean nothing."""
    from plait.core.errors import UsageError

    least = {"size": 1, "batch": 1, "latency_ms": None, "memory_mib": None, "train_pictures": 0, "seconds": 0}
    for name, bound in least.items():
        value = getattr(args, name)
        if value is not None and not ((value > 0 if bound is None else value >= bound) and value < float("inf")):
            flag = f"--{name.replace('_', '-')}"
            expected = "more than 0; leave it out for no limit" if bound is None else f"{bound} or more"
            raise UsageError(f"{flag} is {value:g}, expected {expected}", place=flag, remedy=f"give {flag} N")
    if (pixels := args.batch * args.size**2) > MOST_PIXELS:
        raise UsageError(
            f"{args.batch:,} pictures of {args.size:,} x {args.size:,} are {pixels:,} pixels, measured are at most "
            f"{MOST_PIXELS:,}",
            place="--size, --batch",
            remedy="give smaller or fewer pictures: from a few on, time and memory grow with the batch",
        )


def _ask(args: argparse.Namespace) -> None:
    """Ask for what was not given; an empty answer leaves it open."""
    from plait.core.errors import UsageError

    questions = {
        "task": (str, f"what for ({', '.join(TASKS)}) [classify]: "),
        "latency_ms": (float, "most milliseconds a picture [no limit]: "),
        "memory_mib": (float, "most MiB of memory [no limit]: "),
        "train_pictures": (int, "pictures to train on [not said]: "),
    }
    if any(getattr(args, name) is not None for name in questions):
        return
    for name, (kind, question) in questions.items():
        try:
            answer = input(question).strip()
        except EOFError:  # Ctrl-D: nothing more will be answered
            return
        try:
            setattr(args, name, kind(answer) if answer else None)
        except ValueError as error:
            raise UsageError(f"{answer!r} is no number", remedy="answer with a number, or nothing") from error
    if args.task not in (None, *TASKS):
        raise UsageError(f"no task {args.task!r}", remedy=f"choose from: {', '.join(TASKS)}")
    _check(args)


def _pretrained(folders: Sequence[str], need: Need, dtype: str) -> tuple[list[Candidate], list[str]]:
    """Towers with trained weights: those that were named, and the packaged one if it is here."""
    from torch import nn

    from plait.assembly.towers import IMAGE_TOWER, load_image_tower
    from plait.core.errors import ConfigError, ResourceError
    from plait.models.advise import pretrained_candidate

    found: list[Candidate] = []
    notes: list[str] = []
    for name in (*folders, IMAGE_TOWER):
        try:
            tower = load_image_tower(name, size=need.size, dtype=dtype)
        except (ConfigError, ResourceError) as error:
            if name != IMAGE_TOWER:
                raise
            missing = isinstance(error, ResourceError)
            said = f"is not here: plait data fetch {name}" if missing else f"is left out: {error.cause}"
            notes.append(f"{name} with its weights {said}")
            continue
        assert isinstance(tower.encoder, nn.Module)
        settings = {"tower": tower.key}
        found.append(pretrained_candidate(f"{name}, pretrained", tower.encoder, settings=settings))
    return found, notes


# --- for a person ----------------------------------------------------------------------------------------------------


def describe(found: Sequence[Judged], need: Need, notes: Sequence[str] = ()) -> list[str]:
    """The answer as lines: what fits, what does not and why, the rules with their evidence."""
    from plait.models.advise import rules

    rows = [["", "encoder", "weights", "tokens", "width", "GFLOP", "MiB", "ms a picture", "top-1"]]
    rows += [_row(i, one) for i, one in enumerate((f for f in found if f.status == "fits"), 1)]
    lines = ["", *_table(rows)] if len(rows) > 1 else ["", "no candidate is within these limits"]
    for status, head in (
        ("over", "over a limit"),
        ("unmeasured", "not measured"),
        ("refused", "cannot be built"),
    ):
        group = [one for one in found if one.status == status]
        lines += ["", head, *(f"  {one.candidate.name}: {one.why}" for one in group)] if group else []
    lines += ["", "why in this order (a later rule decides between equals)"]
    pad = " " * 5
    for number, rule in enumerate(rules(need), 1):
        lines += [
            f"  {number}. {rule.says}",
            *textwrap.wrap(rule.evidence, 115, initial_indent=pad, subsequent_indent=pad),
        ]
        lines.append(f"{pad}source: {rule.source}")
    if need.train_pictures is None:
        lines.append("  How many pictures there are to train on was not said (--train-pictures): no rule looks at it.")
    lines += ["", *_legend(found, need), *(f"note     {note}" for note in notes)]
    return lines


def _row(number: int, one: Judged) -> list[str]:
    from plait.cli.plan import si

    assert one.account is not None
    cost, it = one.account, one.candidate
    took = "not measured"
    if one.timing is not None:
        took = f"{one.timing.median:,.1f} ({one.timing.least:,.1f} to {one.timing.most:,.1f})"
        took += f" {one.timing.date}" if one.timing.cached else ""
    costs = [si(cost.parameters), str(cost.tokens), str(cost.d_out), f"{cost.flops / 1e9:,.2f}"]
    return [
        str(number),
        it.name,
        *costs,
        f"{one.memory_bytes / 2**20:,.0f}",
        took,
        f"{it.top1:.1f}" if it.top1 else "unknown",
    ]


def _legend(found: Sequence[Judged], need: Need) -> list[str]:
    from plait.models.advise import ENOUGH

    trained = "weights, gradients, Adam's moments and activations kept for backward, float32 (pretrained ones: frozen)"
    memory = trained if need.train_pictures else "weights, and most of pixels and activations at once without gradients"
    rounds = [one.timing.rounds for one in found if one.timing]
    few = " (few: rough figures, not kept; give more --seconds)" if rounds and min(rounds) < ENOUGH else ""
    shown = (
        f"{'-'.join(map(str, sorted({min(rounds), max(rounds)})))} rounds{few}" if rounds else "nothing was measured"
    )
    if left := sum(one.timing is None and one.status == "fits" for one in found):
        shown += f"; {left} not measured: the time was over, give more --seconds"
    sources: dict[str, list[str]] = {}
    for one in found:
        if one.candidate.source:
            sources.setdefault(one.candidate.source, []).append(one.candidate.name)
    return [
        f"GFLOP    two operations a multiply-add, one picture of {need.size} pixels; counted",
        f"MiB      {memory}, batch {need.batch}; counted",
        f"ms       median (least to most), batch {need.batch}, {shown}; a date: measured then (--again: anew)",
        *(f"top-1    {', '.join(names)}: {source}" for source, names in sources.items()),
    ]


def _table(rows: Sequence[Sequence[Any]]) -> list[str]:
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    return [
        "  ".join(
            c.ljust(w) if i == 1 else c.rjust(w) for i, (c, w) in enumerate(zip(row, widths, strict=True))
        ).rstrip()
        for row in rows
    ]
