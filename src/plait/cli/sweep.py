"""``plait sweep SWEEP.yaml``: search over a recipe's settings, then one run of the best."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import TYPE_CHECKING

from plait.cli.output import Out

if TYPE_CHECKING:
    from plait.recipes.search.run import Outcome


def add(parser: argparse.ArgumentParser) -> None:
    """Arguments of the verb."""
    parser.add_argument(
        "target", nargs="?", default="latest", help="YAML file of a sweep, or a recipe; or see --resume"
    )
    parser.add_argument(
        "overrides",
        nargs="*",
        default=[],
        metavar="key=value",
        help="settings of the sweep, such as metric=pretrain.evaluation trials=30; of the recipe: a list or a range is "
        "searched ('stages.pretrain.lr=[1e-3, 3e-3]'), a value is set",
    )
    parser.add_argument(
        "--resume", action="store_true", help="go on with a sweep: its folder or name (default: the latest)"
    )
    parser.add_argument(
        "--again",
        action="store_true",
        help="with --resume: read the test splits once more, for the best settings of now",
    )
    parser.add_argument(
        "--sweeps", type=Path, default=Path("sweeps"), metavar="FOLDER", help="where sweeps go (default: sweeps)"
    )


def main(args: argparse.Namespace, out: Out) -> int:
    """Search, and print the table and what came of it."""
    from plait.cli.panel import watch
    from plait.core.errors import Stopped, UsageError
    from plait.recipes.search.run import find_sweep, resume, start
    from plait.recipes.search.sweep import load_sweep

    if args.again and not args.resume:
        raise UsageError("--again is of a sweep that ended", remedy="use `plait sweep --resume SWEEP --again`")
    if not args.resume and args.target == "latest":
        raise UsageError("nothing to search", remedy="give a sweep's YAML file, a recipe, or --resume")
    folder = find_sweep(args.target, args.sweeps) if args.resume else None
    trials = _trials(args.overrides) if args.resume else None
    with watch(quiet_stdout=out.json) as listener:
        try:
            if folder is not None:
                found = resume(folder, trials=trials, again=args.again, listeners=(listener,))
            else:
                sweep = load_sweep(args.target, args.overrides)
                found = start(sweep, root=args.sweeps, listeners=(listener,))
        except KeyboardInterrupt as stop:
            number = stop.signal if isinstance(stop, Stopped) else 2
            raise Stopped(number, "stopped; go on with `plait sweep --resume`") from stop
    _show(found, out)
    return 0


def _trials(words: list[str]) -> int | None:
    """How many trials there are to be, where a resumed sweep is given another number."""
    from plait.core.errors import UsageError
    from plait.core.yamltext import read_override

    found: int | None = None
    for word in words:
        keys, node = read_override(word)
        value = node.value
        if keys != ("trials",) or not isinstance(value, int) or isinstance(value, bool) or value < 1:
            raise UsageError(
                f"{word!r}: a sweep that goes on takes another number of trials, and nothing else",
                remedy="write trials=30, or begin another sweep",
            )
        found = value
    return found


def _show(found: Outcome, out: Out) -> None:
    from dataclasses import asdict

    from plait.cli.run_tables import aligned, score_text
    from plait.core.files import read_json
    from plait.recipes.search.folder import ACCESS, BEST, TABLE
    from plait.report.compare_page import value_text
    from plait.report.sides import read_side
    from plait.report.sweep_page import NAME

    sweep, best = found.plan.sweep, found.best
    rows = [["trial", "", sweep.metric, "step", *sweep.search]]
    for trial in found.trials:
        mark = "best" if best and trial.number == best.number else trial.state
        value = "-" if trial.value is None else f"{trial.value:.6g}"
        rows.append([str(trial.number), mark, value, str(trial.step or "-"), *map(value_text, trial.values.values())])
    for line in ("", *aligned(rows)):
        out.line(line)
    out.line()
    scores = read_side(found.final).scores if found.final else {}
    for (stage, name), score in scores.items():
        out.line(f"test  {stage}  {name}  {score_text(score)}  n {score.n:,}")
    out.line(
        f"the best of {len(found.trials)} values is optimistic, since it was chosen by them"
        + ("; quote the test scores, which were looked at once" if scores else "")
    )
    where = {"best": BEST, "table": TABLE, "page": NAME} | ({"tests read": ACCESS} if found.final else {})
    for what, name in where.items():
        out.line(f"{what:<11} {found.folder / name}")
    if found.final:
        out.line(f"{'last run':<11} {found.final}")
    out.result(
        {
            "sweep": str(found.folder),
            "trials": [asdict(trial) for trial in found.trials],
            "best": None if best is None else best.number,
            "final": str(found.final) if found.final else None,
            "scores": [
                {"stage": s, "name": n, "value": v.value, "low": v.low, "high": v.high} for (s, n), v in scores.items()
            ],
            "test_access": read_json(found.folder / ACCESS) if found.final else [],
        }
    )
