"""``plait track RUN``: send what ``metrics.jsonl`` has to the trackers of a run, or to another one."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

from plait.cli.output import Out


def add(parser: argparse.ArgumentParser) -> None:
    """Arguments of the verb."""
    parser.add_argument("run", nargs="?", default="latest", help="which run (default: the latest)")
    parser.add_argument(
        "--to",
        choices=["tensorboard", "wandb", "mlflow", "trackio"],
        help="send to this one, by the recipe's settings or by default ones (default: all of the recipe)",
    )
    parser.add_argument(
        "--runs", type=Path, default=Path("runs"), metavar="FOLDER", help="where run folders are (default: runs)"
    )


def main(args: argparse.Namespace, out: Out) -> int:
    """Send what was not sent yet, and say how much it was."""
    from plait.core.errors import PlaitError, ResourceError, UsageError
    from plait.core.files import find_run
    from plait.recipes.follower import Follower
    from plait.recipes.recipe import load_recipe
    from plait.recipes.trackers import READS
    from plait.recipes.tracking import account

    run = find_run(args.run, args.runs)
    named = {tracker.name: tracker for tracker in load_recipe(str(run / "recipe.yaml")).spec.trackers}
    if args.to:
        named = {args.to: named.get(args.to) or READS.validate_python({"kind": args.to})}
    if not named:
        raise UsageError(f"the recipe of {run.name} names no tracker", remedy="say which one: --to tensorboard")
    found: dict[str, dict[str, int | list[str]]] = {}
    for name, tracker in named.items():
        tracker.check(place="--to" if args.to else "trackers")
        follower = Follower(run, name, tracker.open, purges=tracker.purges, queues=tracker.queues)
        try:
            try:
                count = follower.send()
            finally:
                follower.finish()
        except PlaitError:
            raise
        except Exception as error:  # of the tracker's library
            came = account(run, name)
            raise ResourceError(
                f"{name}: {type(error).__name__}: {error}",
                place=f"{came.sent:,} of {came.total:,} records were sent",
                remedy=f"see that it answers, then `plait track {run.name}` goes on",
            ) from error
        came = account(run, name)
        out.line(f"{name}: {count:,} records sent, {came.sent:,} in all{_damaged(came.damaged)}")
        found[name] = {"sent": count, "in_all": came.sent, "damaged": list(came.damaged)}
    out.result({"run": str(run), "trackers": found})
    return 0


def _damaged(lines: Sequence[str]) -> str:
    return f"; {len(lines):,} lines cannot be read: {', '.join(lines[:3])}" if lines else ""
