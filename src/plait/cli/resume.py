"""``plait resume RUN``: go on where a run was interrupted."""

from __future__ import annotations

import argparse
from pathlib import Path

from plait.cli.output import Out
from plait.core.launch import first, together


def add(parser: argparse.ArgumentParser) -> None:
    """Arguments of the verb."""
    parser.add_argument("run", nargs="?", default="latest", help="run folder or its name (default: the latest)")
    parser.add_argument(
        "--accept",
        action="append",
        default=[],
        metavar="KEY",
        help="go on although this setting changed since the checkpoint, as the refusal names it (repeatable)",
    )
    parser.add_argument(
        "--runs", type=Path, default=Path("runs"), metavar="FOLDER", help="where run folders are (default: runs)"
    )


def main(args: argparse.Namespace, out: Out) -> int:
    """Resume and print the closing lines."""
    from plait.cli.panel import watch
    from plait.cli.run import closing
    from plait.core.errors import UsageError
    from plait.core.files import find_run
    from plait.recipes.run import summary
    from plait.recipes.search.folder import SWEEP

    finished: list[bool] = []

    def find() -> str:
        if (Path(args.run) / SWEEP).is_file():
            raise UsageError(f"{args.run} is a sweep", remedy=f"use `plait sweep --resume {args.run}`")
        found = find_run(args.run, args.runs)
        finished.append(all(stage["state"] == "done" for stage in summary(found)["stages"]))
        return str(found)

    with together():
        run = Path(first(find))
        with watch(quiet_stdout=out.json) as listener:
            from plait.recipes.run import resume

            resume(run, accept=args.accept, listeners=(listener,))
    if any(finished):
        out.line("nothing to resume: all its stages were finished before (`plait runs` shows what came of them)")
    return closing(run, out, lines=not any(finished))
