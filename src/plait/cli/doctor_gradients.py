"""``plait doctor gradients RECIPE``: whether the user's own model learns what it should, before it takes hours."""

from __future__ import annotations

import argparse
import shutil
import sys
import tempfile
import time
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from plait.cli.output import Out
from plait.core.errors import NumericsError, PlaitError, UsageError
from plait.core.files import check_empty

if TYPE_CHECKING:
    from plait.core.device import Compute
    from plait.core.events import Event, Events
    from plait.recipes.rehearse import Phase
    from plait.training.finding import Finding, Reference

_WIDTH = 20


def add(parser: argparse.ArgumentParser) -> None:
    """Arguments beside those of ``plait doctor``."""
    parser.add_argument("recipe", nargs="?", help="gradients: shipped recipe or YAML file")
    parser.add_argument(
        "overrides", nargs="*", default=[], metavar="key=value", help="gradients: dotted settings of the recipe"
    )
    parser.add_argument("--stage", default="", metavar="NAME", help="gradients: look at this stage alone")
    parser.add_argument(
        "--samples", type=int, default=4, metavar="N", help="gradients: samples of a batch to compare (default: 4)"
    )
    parser.add_argument(
        "--processes",
        default="2",
        metavar="2,4",
        help="gradients: how many processes train together in the comparison (default: 2); 1 does without",
    )
    parser.add_argument(
        "--dtype",
        choices=["auto", "float64", "float32", "recipe"],
        default="auto",
        help="gradients: number format of the comparison (default: float64 for small models, else float32)",
    )
    parser.add_argument("--keep", type=Path, metavar="FOLDER", help="gradients: keep the rehearsal in this new folder")


def main(args: argparse.Namespace, out: Out) -> int:
    """Rehearse the recipe and print a line a check; exit 0, or 6 if one fails."""
    from plait.core import device
    from plait.core.events import Events
    from plait.recipes.recipe import load_recipe
    from plait.recipes.rehearse import check_stage, rehearse, small

    if not args.recipe:
        raise UsageError("gradients needs a recipe", remedy="for example `plait doctor gradients quickstart-ci`")
    if args.samples < 2:
        raise UsageError(f"--samples is {args.samples}", remedy="give 2 or more: one sample cannot be split")
    counts = _counts(args.processes)
    recipe = load_recipe(args.recipe, args.overrides).spec
    check_stage(recipe, args.stage)
    if args.keep is not None:
        check_empty(args.keep)
    begun = time.monotonic()
    out.line(f"gradients of {recipe.name}, on a part of its data; nothing of it is kept")
    ticker = _Ticker(silent=out.json or out.silent)
    page = _Page(out, ticker)
    work = Path(tempfile.mkdtemp(prefix="plait-gradients-"))
    events = Events(None, listeners=(ticker,))
    try:
        compute = device.setup()
        run = work / "run"
        run.mkdir()

        def visit(phase: Phase) -> None:
            page.group(phase.title)
            page.show(_gradients(phase, args.dtype))
            from plait.recipes.rehearsed.labels import labels_of

            page.show(labels_of(phase, say=page.text))

        def after(stage: str) -> None:
            for count in counts:
                found = list(_together(run, stage, count, compute=compute, events=events))
                page.group(f"{stage}: {count} processes")
                page.show(found)

        rehearse(small(recipe, samples=args.samples), run, only=args.stage, visit=visit, after=after, events=events)
        if args.keep is not None:
            shutil.copytree(run, args.keep, dirs_exist_ok=True)
    finally:
        ticker.clear()
        shutil.rmtree(work, ignore_errors=True)
    return page.close(time.monotonic() - begun)


def _gradients(phase: Phase, dtype: Any) -> Iterable[Finding]:
    from plait.recipes.rehearse import expected_rate, keep_reference
    from plait.training.gradient_check import check_gradients

    def keep(reference: Reference) -> None:
        keep_reference(phase, reference)

    asked = phase.asked
    return check_gradients(
        asked.model,
        asked.objective,
        asked.batches,
        settings=asked.settings,
        dtype=dtype,
        rate=expected_rate(phase),
        keep=keep,
    )


def _together(run: Path, stage: str, count: int, *, compute: Compute, events: Events) -> Iterable[Finding]:
    """Several processes compute a stage's steps; one finding that says so where they cannot."""
    import torch

    from plait.core import device
    from plait.recipes.rehearse import in_processes
    from plait.training.finding import Finding

    lacking = ""
    if compute.device == "cuda" and torch.cuda.device_count() < count:
        lacking = f"{torch.cuda.device_count()} GPUs here"
    elif (need := count * device.rss()) > (free := device.memory().free):
        lacking = f"they would take some {need / 2**30:.1f} GiB, and {free / 2**30:.1f} GiB are free"
    if lacking:
        fix = "compare on a machine that has more, or choose other --processes"
        yield Finding(name="not compared", status="warn", value=lacking, fix=fix)
        return
    try:
        yield from _several(in_processes(run, stage, count, cores=compute.threads, events=events))
    except PlaitError as error:
        yield Finding(name="not compared", status="fail", value=error.cause, fix=error.remedy)


def _several(found: dict[str, list[dict[str, Any]]]) -> Iterable[Finding]:
    """What the processes of a stage found, by phase."""
    from plait.training.finding import Finding, judged, units_differ
    from plait.training.held import Gap

    for phase, told in found.items():
        name = phase or "summed gradient"
        if refused := next((one["refused"] for one in told if "refused" in one), None):
            yield Finding(
                name=name,
                status="warn",
                value=f"refused: {refused['cause']}",
                fix=f"{refused['remedy']}; or check with other --processes",
            )
            continue
        findings = [
            judged(
                name,
                Gap(**{key: one[key] for key in ("parts", "tensor", "own", "mean_z", "along")}),
                one["bounds"],
                fix=_RANKS,
                counts=units_differ(*one["counts"]),
            )
            for one in told
        ]
        yield next((finding for finding in findings if finding.status == "fail"), findings[0])


_RANKS = (
    "the sum over processes is not the whole batch: an objective that averages for itself, a sample dealt twice or to "
    "nobody, a part that synchronizes by itself (SyncBatchNorm, DistributedDataParallel), a fault of trainer.parallel"
)


def _counts(given: str) -> list[int]:
    words = [word.strip() for word in given.split(",")]
    if not all(word.isdigit() and int(word) for word in words):
        raise UsageError(f"--processes is {given!r}", remedy="give numbers, such as 2 or 2,4; 1 does without")
    return [int(word) for word in words if int(word) > 1]


# --- for a person --------------------------------------------------------------------------------------------------


@dataclass
class _Page:
    """Lines as they come, and all of them for ``--json``."""

    out: Out
    ticker: _Ticker
    found: list[dict[str, Any]] = field(default_factory=list)
    at: str = ""

    def group(self, title: str) -> None:
        self.ticker.clear()
        self.out.line(f"\n{title}")
        self.at = title

    def show(self, findings: Iterable[Finding]) -> None:
        from plait.cli.doctor import Check, show

        for one in findings:
            self.ticker.clear()
            check = Check(name=one.name, status=one.status, value=one.value, fix=one.fix)
            self.found.append({"group": self.at, **asdict(check), "facts": dict(one.facts or {})})
            show(check, self.out, width=_WIDTH)
            self.ticker.task(f"{self.at} ...")

    def text(self, lines: Sequence[str]) -> None:
        self.ticker.clear()
        for line in lines:
            self.out.line(f"{'':<8}{line}")

    def close(self, seconds: float) -> int:
        counts = {status: sum(one["status"] == status for one in self.found) for status in ("ok", "warn", "fail")}
        self.out.line(f"\n{counts['ok']} ok, {counts['warn']} to look at, {counts['fail']} failed, in {seconds:.0f} s")
        if counts["fail"]:
            self.out.line("A failed check means that training would not do what the recipe says.")
        result = {"ok": not counts["fail"], "counts": counts, "seconds": round(seconds, 1), "checks": self.found}
        self.out.result(result)
        return NumericsError.exit_code if counts["fail"] else 0


@dataclass
class _Ticker:
    """One changing line on a terminal's stderr: what is at work now."""

    silent: bool
    shown: bool = False

    def __post_init__(self) -> None:
        self.silent = self.silent or not sys.stderr.isatty()

    def __call__(self, event: Event) -> None:
        if event.kind == "progress":
            total = event.fields.get("total")
            self.task(f"{event.text} {event.fields['done']:,}/{total:,}" if total else f"{event.text} ...")

    def task(self, text: str) -> None:
        if not self.silent:
            sys.stderr.write(f"\r\033[2K  {text[:100]}")
            sys.stderr.flush()
            self.shown = True

    def clear(self) -> None:
        if self.shown:
            sys.stderr.write("\r\033[2K")
            sys.stderr.flush()
            self.shown = False
