"""``plait plan RECIPE``: what a run will need, or what a model costs, before anything runs. Writes nothing."""

from __future__ import annotations

import argparse
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING

from plait.cli import plan_size
from plait.cli.output import Out
from plait.core.launch import place, processes

if TYPE_CHECKING:
    from plait.core.estimate import Estimate, Machine
    from plait.core.spec import Resolved
    from plait.recipes.probe import Probed
    from plait.recipes.recipe import Recipe
    from plait.stages.stage import Stage
    from plait.training.plan import Total

_PROMPT, _SECONDS = 32, 3.0


def add(parser: argparse.ArgumentParser) -> None:
    """Arguments of the verb."""
    parser.add_argument(
        "recipe",
        nargs="?",
        help="shipped recipe (quickstart), or a YAML file: a recipe, or a model (encoders, connectors, decoder)",
    )
    parser.add_argument(
        "overrides", nargs="*", default=[], metavar="key=value", help="dotted settings, such as data.source=./pairs.csv"
    )
    parser.add_argument(
        "--runs", type=Path, default=Path("runs"), metavar="FOLDER", help="where the run would go (default: runs)"
    )
    parser.add_argument(
        "--probe",
        action=argparse.BooleanOptionalAction,
        default=None,
        help="how much is measured. Without: this machine's speed, some seconds. --probe: also a few real steps of "
        "each training stage, in a temporary folder (features and converted weights are kept under PLAIT_HOME, as by a "
        "run). --no-probe: nothing, the speed is guessed from the CPU's flags",
    )
    parser.add_argument(
        "--processes",
        type=int,
        metavar="N",
        help="plan for N processes on this machine, which share the work as trainer.parallel says (default: 1, or as "
        "many as torchrun started)",
    )
    plan_size.add(parser)


def main(args: argparse.Namespace, out: Out) -> int:
    """Print the plan; exit 3 or 5 if a stage could not run or would not fit the disk."""
    from plait.core.errors import ConfigError, PlaitError
    from plait.recipes.recipe import load_recipe
    from plait.recipes.refusals import refusals
    from plait.training import plan

    if plan_size.asked(args):
        return plan_size.main(args, out)
    if _is_model(_named(args)):
        _refuse_of_runs(args)
        return _plan_model(_named(args), args.overrides, out)

    if place():  # of several processes, the first one plans
        return 0
    count = _processes(args)
    resolved = load_recipe(args.recipe, args.overrides)
    recipe = resolved.spec
    guess = args.probe is False
    out.line(f"plan of {recipe.name}" + ("" if guess else ": measuring this machine, a few seconds ..."))
    machine = plan.survey(args.runs, probe=not guess, processes=count)
    stages = [("data", recipe.data), *recipe.stages.items()]
    faults = list(refusals(recipe, machine))
    faults.sort(key=lambda fault: not isinstance(fault, ConfigError))  # a wrong setting before what is only missing
    refused = faults[0] if faults else None
    if isinstance(refused, ConfigError) and not out.json:
        raise refused  # a table of other parts than those that are meant would mislead
    sums = plan.total(plan.estimate_all(stages, machine), machine)
    for line in describe(sums, machine):
        out.line(line)
    for line in _for_one(stages, count):
        out.line(line)
    probed: list[Probed] = []
    try:
        if refused is not None:
            raise refused
        plan.require(sums, machine, place=args.runs.absolute())
        if args.probe:
            _try(resolved, sums, probed=probed, out=out)
    except PlaitError as error:
        if not out.json:
            raise
        refused = error
    out.result(
        {
            "recipe": recipe.name,
            "machine": asdict(machine),
            **asdict(sums),
            "probe": [asdict(one) | {"expected_s": one.expected_s} for one in probed] if args.probe else None,
            "refused": refused.as_dict() if refused else None,
        }
    )
    return refused.exit_code if refused else 0


def _try(resolved: Resolved[Recipe], sums: Total, *, probed: list[Probed], out: Out) -> None:
    """A few real steps of each training stage; what is found goes to ``probed`` as it comes, then beside the plan."""
    from plait.recipes.probe import probe

    out.line()
    out.line("a few real steps of each training stage, caches filled as by a run:")
    for one in probe(resolved, say=lambda text: out.line(f"  {text}")):
        probed.append(one)
    planned = {estimate.stage: estimate for estimate in sums.stages}
    for line in describe_probe(probed, planned):
        out.line(line)


def _for_one(stages: Sequence[tuple[str, Stage]], processes: int) -> list[str]:
    """Where settings of several processes count for nothing, and what is of one process though there are several."""
    if processes > 1:
        alone = [name for name, stage in stages if not stage.together]
        return [
            f"note     {', '.join(alone)}: by process 0 alone, the others wait",
            "note     FLOP and time are those of one process that does all of it",
        ]
    trainers = [(name, getattr(stage, "trainer", None)) for name, stage in stages]
    return [
        f"note     {name}: trainer.parallel is for several processes, and this is for one; plan with --processes N"
        for name, trainer in trainers
        if trainer is not None and (trainer.parallel.spreads or trainer.parallel.divides)
    ]


def _processes(args: argparse.Namespace) -> int:
    """How many to plan for.

    Raises:
        UsageError: Less than one; or real steps of several are asked for.
    """
    from plait.core.errors import UsageError

    if args.processes is not None and args.processes < 1:
        raise UsageError(f"--processes is {args.processes}", place="--processes", remedy="give 1 or more")
    count = args.processes or processes()
    if count > 1 and args.probe:
        raise UsageError(
            f"--probe runs steps in one process, and {count} are planned",
            place="--probe",
            remedy="leave one of the two out",
        )
    return count


def _named(args: argparse.Namespace) -> Path:
    """What is to be planned.

    Raises:
        UsageError: Nothing is named.
    """
    from plait.core.errors import UsageError

    if args.recipe is None:
        raise UsageError(
            "nothing to plan", remedy="name a recipe (`plait plan quickstart`), or give --params and --tokens"
        )
    return Path(args.recipe)


def _is_model(path: Path) -> bool:
    """Whether a file describes a model rather than a recipe."""
    from plait.core.yamltext import read_file

    return path.is_file() and read_file(path).get("encoders") is not None


def _refuse_of_runs(args: argparse.Namespace) -> None:
    """See that nothing is asked of a model that only a run has.

    Raises:
        UsageError: Processes, or measuring.
    """
    from plait.core.errors import UsageError

    if args.probe is not None or args.processes:
        what = "--processes" if args.processes else "--probe" if args.probe else "--no-probe"
        raise UsageError(
            f"{what} and a model are both given: {args.recipe} has no run in it",
            place=what,
            remedy=f"leave {what} out, or plan a recipe that trains the model",
        )


def _plan_model(path: Path, overrides: Sequence[str], out: Out) -> int:
    from plait.assembly.account import composition_account, heard
    from plait.core.events import Events
    from plait.core.spec import load
    from plait.models.composition import Composition

    spec = load(Composition, path, overrides).spec
    events = Events(None, listeners=(lambda event: out.line(event.text) if event.kind == "note" else None,))
    parts = composition_account(spec, prompt=_PROMPT, seconds=_SECONDS, events=events)
    rows = [["part", "kind", "weights", "learn", "tokens", "in the text", "FLOP"]]
    for part in parts:
        counts = (part.parameters, part.trainable, part.tokens, part.slots)
        rows.append([part.part, part.kind, *(f"{count:,}" if count else "-" for count in counts), si(part.flops)])
    sums = [sum(getattr(part, name) for part in parts) for name in ("parameters", "trainable", "flops")]
    rows.append(["total", "", f"{sums[0]:,}", f"{sums[1]:,}", "", "", si(sums[2])])
    for line in _aligned(rows, rule_before_last=True):
        out.line(line)
    seconds = _SECONDS if spec.encoders.audio is None else heard(spec.encoders.audio, _SECONDS)
    items = {"image": "one square picture of the tower's size", "audio": f"a sound of {seconds:g} s"}
    items |= {"video": "a video of as many frames as are looked at"}
    there = [items[modality] for modality in spec.encoders.by_modality()]
    out.line(f"for {', '.join(there)}, and {_PROMPT} tokens of text")
    out.result({"parts": [asdict(part) for part in parts], "prompt": _PROMPT, "seconds": seconds})
    return 0


def describe_probe(probed: Sequence[Probed], planned: Mapping[str, Estimate]) -> list[str]:
    """What was measured beside what was planned."""
    from plait.training.plan import size

    rows = [["stage", "memory planned", "measured", "highest", "phase", "steps", "s a step", "all steps"]]
    for one in probed:
        memory = [size(sum(planned[one.stage].memory.values())), size(one.peak_bytes), one.section]
        for number, phase in enumerate(one.phases):
            first = [one.stage, *memory] if not number else ["", "", "", ""]
            expected = duration((phase.expected_s, phase.expected_s)).partition("-")[2]
            rows.append([*first, phase.phase, f"{phase.steps:,}", f"{phase.step_s:.3g}", expected])
    lines = ["", *_aligned(rows), ""]
    for one in probed:
        low, high = planned[one.stage].seconds
        lines.append(
            f"time     {one.stage}: {one.expected_s:,.0f} s if all steps go like these, {one.rest_s:,.0f} s of it not "
            f"steps; planned {duration((low, high))}"
        )
    lines.append("note     what is shown and scored between further steps comes on top")
    return lines


# --- for a person --------------------------------------------------------------------------------------------------


def describe(sums: Total, machine: Machine) -> list[str]:
    """The plan as lines: needs by stage, memory by part, notes, warnings."""
    from plait.training.peak import PARTS
    from plait.training.plan import size

    head = ["stage", "trained", "frozen", "samples", "tokens", "of images", "FLOP", "peak memory", "disk", "time"]
    needs = [head, *(_row(e) for e in sums.stages)]
    flops = si(sums.flops) if sums.flops else "-"
    disk = size(sums.disk_bytes + sums.spare_bytes)
    summed = [flops, size(sums.peak_bytes), disk, duration(sums.seconds)]
    needs.append(["total", *[""] * (len(head) - len(summed) - 1), *summed])
    known = [e.memory for e in sums.stages] + [share.memory for e in sums.stages for share in e.shares]
    columns = [*PARTS, *sorted({part for memory in known for part in memory} - set(PARTS))]
    parts = [["peak memory of", "in", *columns]]
    for e in sums.stages:
        counted = (size(e.memory[part]) if e.memory.get(part) else "-" for part in columns)
        parts.append([e.stage, e.moment or "-", *counted])
    lines = ["", *_aligned(needs, rule_before_last=True), *captions(sums), "", *_aligned(parts), ""]
    if sums.processes > 1:
        there = {part for e in sums.stages for share in e.shares for part in share.memory}
        lines += [*_aligned(_by_process(sums, [part for part in columns if part in there])), ""]
    lines += _limits(sums, machine)
    notes = [f"note     {e.stage}: {note}" for e in sums.stages for note in e.notes]
    return [*lines, *notes, *(f"warning  {warning}" for warning in sums.warnings)]


def captions(sums: Total) -> list[str]:
    """What columns count that do not say it themselves."""
    from plait.training.plan import size

    found = [
        "tokens: places of rows that pass a model, padding included, over all steps; of images: those that are pictures"
    ]
    if sums.spare_bytes:
        found.append(f"disk: the total has {size(sums.spare_bytes)} more, for a checkpoint that is being written")
    if sums.processes > 1:
        found.append(f"memory: of the process that has most, of {sums.processes}")
    return found


def _by_process(sums: Total, columns: Sequence[str]) -> list[list[str]]:
    """Memory of each process by part, and what it sends."""
    from plait.training.plan import size

    rows = [["stage", "process", "in", *columns, "in all", "sends a step"]]
    for e in sums.stages:
        alike: dict[tuple[str, ...], list[int]] = {}
        for share in e.shares:
            counted = (size(share.memory[part]) if share.memory.get(part) else "-" for part in columns)
            sent = ", ".join(f"{size(count)} {name}" for name, count in share.sent.items() if count) or "-"
            line = (share.moment, *counted, size(sum(share.memory.values())), sent)
            alike.setdefault(line, []).extend(share.ranks)
        rows += [[e.stage, _ranks(sorted(ranks)), *line] for line, ranks in alike.items()]
    return rows


def _ranks(ranks: Sequence[int]) -> str:
    """``0``, ``1 to 3``, ``1, 3``."""
    if len(ranks) > 2 and ranks[-1] - ranks[0] == len(ranks) - 1:
        return f"{ranks[0]} to {ranks[-1]}"
    return ", ".join(map(str, ranks))


def _row(e: Estimate) -> list[str]:
    from plait.training.plan import size

    samples = f"{sum(e.samples.values()):,}" if e.samples else "-"
    tokens, images = (f"{n:,}" if n else "-" for n in (e.tokens, e.image_tokens))
    weights = [si(n) if n else "-" for n in (e.params_trainable, e.params_frozen)]
    flops = si(e.flops) if e.flops else "-"
    return [
        e.stage,
        *weights,
        samples,
        tokens,
        images,
        flops,
        size(sum(e.memory.values())),
        size(e.disk_bytes),
        duration(e.seconds),
    ]


def _limits(sums: Total, machine: Machine) -> list[str]:
    from plait.training.plan import disks, size

    rate = machine.gemm_bf16 if machine.dtype == "bfloat16" else machine.gemm_fp32
    how = "measured" if machine.measured else "guessed"
    threads = f"{machine.threads} of {machine.cores} cores" if machine.device == "cpu" else machine.device

    def share(need: int, free: int) -> str:
        return f"{size(need)} of {size(free)} free, {need / max(free, 1):.0%}"

    run, *others = disks(sums, machine)
    held = [] if others or not sums.home_bytes else [f"{size(sums.home_bytes)} of it in caches"]
    if sums.spare_bytes:
        held.append(f"{size(sums.spare_bytes)} only while a checkpoint is written")
    memory = f"{share(sums.peak_bytes, machine.memory_bytes)}, in {sums.peak_stage}"
    if sums.processes > 1:
        count = machine.local or machine.processes
        memory = f"{share(sums.together_bytes, machine.memory_bytes)}, all {count} processes of this machine together, "
        memory += f"in {sums.together_stage}; {size(sums.peak_bytes)} of it in one at most"
    return [
        f"memory   {memory}",
        f"disk     {', '.join([share(run.needed, run.free), *held])}",
        *(f"caches   {share(disk.needed, disk.free)}" for disk in others),
        f"speed    {machine.dtype} matrix products at {si(rate)}FLOP/s ({how}) on {threads}",
        f"time     {duration(sums.seconds)}",
    ]


def _aligned(rows: Sequence[Sequence[str]], *, rule_before_last: bool = False) -> list[str]:
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    lines = [
        "  ".join(c.ljust(w) if i == 0 else c.rjust(w) for i, (c, w) in enumerate(zip(row, widths, strict=True)))
        for row in rows
    ]
    if rule_before_last:
        lines.insert(-1, "-" * len(lines[0]))
    return [line.rstrip() for line in lines]


def si(amount: float | int) -> str:
    """Three digits, a decimal prefix and room for a unit: ``1.35 T``, ``135 M``, ``27 ``."""
    value, prefix = float(amount), ""
    for prefix in ("", "K", "M", "G", "T", "P", "E"):
        if abs(value) < 999.5 or prefix == "E":
            break
        value /= 1000
    digits = f"{value:#.3g}".rstrip(".") if prefix else f"{value:.0f}"
    return f"{digits} {prefix}"


def duration(seconds: tuple[float, float]) -> str:
    """A range of time in the unit of its longer end: ``20-40 s``, ``2.1-5.0 min``, ``1.0-2.5 h``."""
    low, high = seconds
    if high < 90:
        return f"{low:.0f}-{high:.0f} s"
    unit, name = (60.0, "min") if high < 5400 else (3600.0, "h")
    return f"{low / unit:.1f}-{high / unit:.1f} {name}"
