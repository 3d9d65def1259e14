"""``plait runs``: what was run, and how it went."""

from __future__ import annotations

import argparse
from pathlib import Path

from plait.cli.output import Out


def add(parser: argparse.ArgumentParser) -> None:
    """Arguments of the verb."""
    parser.add_argument(
        "action", nargs="?", choices=["list", "show"], default="list", help="list all (default), or show one run"
    )
    parser.add_argument("run", nargs="?", default="latest", help="run to show (default: the latest)")
    parser.add_argument(
        "--runs", type=Path, default=Path("runs"), metavar="FOLDER", help="where run folders are (default: runs)"
    )


def main(args: argparse.Namespace, out: Out) -> int:
    """Print the list or one run's stages."""
    from plait.core.files import find_run
    from plait.recipes.run import summary

    if args.action == "show":
        result = summary(find_run(args.run, args.runs))
        for stage in result["stages"]:
            out.line(f"{stage['folder']:<16} {stage['state']:<8} {'  '.join(stage['lines'][:1])}")
        out.result(result)
        return 0
    folders = sorted(p.parent for p in args.runs.glob("*/recipe.yaml") if not p.parent.is_symlink())
    results = [summary(folder) for folder in folders]
    for result in results:
        done = sum(s["state"] == "done" for s in result["stages"])
        out.line(f"{result['name']:<24} {done}/{len(result['stages'])} stages done")
    if not results:
        out.line(f"no runs in {args.runs.absolute()}; start one with `plait run quickstart`")
    out.result(results)
    return 0
