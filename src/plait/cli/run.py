"""``plait run RECIPE``: the whole life in one command."""

from __future__ import annotations

import argparse
import os
import shutil
import sys
from pathlib import Path

from plait.cli.output import Out


def add(parser: argparse.ArgumentParser) -> None:
    """Arguments of the verb."""
    parser.add_argument("recipe", help="name of a shipped recipe (quickstart) or path of a YAML file")
    parser.add_argument(
        "overrides", nargs="*", default=[], metavar="key=value", help="dotted settings, such as data.source=./pairs.csv"
    )
    parser.add_argument(
        "--runs", type=Path, default=Path("runs"), metavar="FOLDER", help="where run folders go (default: runs)"
    )


def main(args: argparse.Namespace, out: Out) -> int:
    """Run and print the closing lines."""
    from plait.cli.panel import watch

    with watch(quiet_stdout=out.json) as listener:
        from plait.recipes.run import start

        run = start(args.recipe, args.overrides, root=args.runs, listeners=(listener,))
    return closing(run, out)


def closing(run: Path, out: Out, *, lines: bool = True) -> int:
    """Print what a person wants to know at the end of a run; with the lines of its stages, unless said otherwise."""
    from plait.recipes.run import summary

    result = summary(run)
    out.line()
    for stage in result["stages"]:
        for line in stage["lines"] if lines else ():
            out.line(line)
    out.line(f"run folder  {result['run']}")
    out.line(f"report      {result['run']}/report.html")
    if any((stage["kind"], stage["state"]) == ("tune", "done") for stage in result["stages"]):
        out.line(f"ask it      {_command()} chat {result['run']} --image PICTURE")
    out.result(result)
    return 0


def _command() -> str:
    """How this very program is called from here: a virtual environment need not be on the path."""
    own = Path(sys.argv[0])
    return "plait" if own.name != "plait" or shutil.which("plait") else os.path.relpath(own)
