"""``plait runs``: what was run, and how it went."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from plait.cli.output import Out


def add(parser: argparse.ArgumentParser) -> None:
    """Arguments of the verb."""
    parser.add_argument(
        "action", nargs="?", choices=["list", "show"], default="list", help="list all (default), or show one run"
    )
    parser.add_argument("run", nargs="?", help="run to show (default: the latest)")
    parser.add_argument(
        "--runs", type=Path, default=Path("runs"), metavar="FOLDER", help="where run folders are (default: runs)"
    )


def main(args: argparse.Namespace, out: Out) -> int:
    """Print the list or one run's stages."""
    from plait.core.errors import UsageError

    if args.action == "show":
        return _show(args.run or "latest", args.runs, out)
    if args.run:
        raise UsageError(f"list takes no run, got {args.run!r}", remedy=f"use `plait runs show {args.run}`")
    return _list(args.runs, out)


def _show(name: str, root: Path, out: Out) -> int:
    from plait.core.files import find_run
    from plait.recipes.run import summary

    result = summary(find_run(name, root))
    for stage in result["stages"]:
        out.line(f"{stage['folder']:<16} {stage['state']:<8} {'  '.join(stage['lines'][:1])}")
    out.result(result)
    return 0


def _list(root: Path, out: Out) -> int:
    from plait.core.errors import PlaitError
    from plait.recipes.run import summary

    results: list[dict[str, Any]] = []
    for folder in sorted(p.parent for p in root.glob("*/recipe.yaml") if not p.parent.is_symlink()):
        try:
            result = summary(folder)
        except PlaitError as fault:  # one run that cannot be read does not hide the others
            out.line(f"{folder.name:<24} unreadable: {fault}")
            results.append({"name": folder.name, "error": fault.as_dict()})
            continue
        done = sum(s["state"] == "done" for s in result["stages"])
        out.line(f"{result['name']:<24} {done}/{len(result['stages'])} stages done")
        results.append(result)
    if not results:
        out.line(f"no runs in {root.absolute()}; start one with `plait run quickstart`")
    out.result(results)
    return 0
