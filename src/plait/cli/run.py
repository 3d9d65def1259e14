"""``plait run RECIPE``: the whole life in one command."""

from __future__ import annotations

import argparse
import os
import shutil
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from plait.cli.output import Out
from plait.core.launch import place


def add(parser: argparse.ArgumentParser) -> None:
    """Arguments of the verb."""
    parser.epilog = f"{parser.epilog}; in several processes: torchrun --nproc-per-node N -m plait run RECIPE"
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
    if place():
        return 0
    from plait.recipes.run import summary

    result = summary(run)
    out.line()
    for stage in result["stages"]:
        for line in stage["lines"] if lines else ():
            out.line(line)
    out.line(f"run folder  {result['run']}")
    out.line(f"report      {result['run']}/report.html")
    made = {stage["kind"]: stage for stage in result["stages"] if stage["state"] == "done"}
    if "tune" in made:
        out.line(f"ask it      {_command()} chat {result['run']} --image PICTURE")
    elif "pretrain" in made and _is_dual(run, made["pretrain"]):
        out.line(f"compare     {_command()} embed {result['run']} --image PICTURE --text TEXT ...")
    out.result(result)
    return 0


def _is_dual(run: Path, stage: Mapping[str, Any]) -> bool:
    """Whether a pretrain stage made a dual encoder; a Q-Former embeds nothing by itself."""
    from plait.core.files import read_json

    record = run / stage["folder"] / str(stage["summary"].get("checkpoint")) / "plait.json"
    return record.is_file() and read_json(record).get("kind") == "dual"


def _command() -> str:
    """How this very program is called from here: a virtual environment need not be on the path."""
    own = Path(sys.argv[0])
    return "plait" if own.name != "plait" or shutil.which("plait") else os.path.relpath(own)
