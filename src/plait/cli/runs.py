"""``plait runs``: what was run, how it went, and what differs between runs."""

from __future__ import annotations

import argparse
from datetime import datetime
from pathlib import Path
from typing import Any

from plait.cli.output import Out


def add(parser: argparse.ArgumentParser) -> None:
    """Arguments of the verb."""
    parser.add_argument(
        "action",
        nargs="?",
        choices=["list", "show", "compare"],
        default="list",
        help="list all (default), show one run, or compare several",
    )
    parser.add_argument("run", nargs="*", help="run to show (default: the latest), or runs to compare: name or folder")
    parser.add_argument(
        "--runs", type=Path, default=Path("runs"), metavar="FOLDER", help="where run folders are (default: runs)"
    )
    parser.add_argument(
        "--page",
        type=Path,
        metavar="FILE",
        help="where compare writes its page (default: compare.html beside them)",
    )


def main(args: argparse.Namespace, out: Out) -> int:
    """Print the list, one run, or a comparison."""
    from plait.core.errors import UsageError

    if args.page and args.action != "compare":
        raise UsageError("--page is of compare", remedy="use `plait runs compare RUN RUN --page FILE`")
    if args.action == "compare":
        return _compare(args.run, args.runs, page=args.page, out=out)
    if args.action == "show":
        if len(args.run) > 1:
            raise UsageError(f"show takes one run, got {len(args.run)}", remedy="use `plait runs compare RUN RUN`")
        return _show(args.run[0] if args.run else "latest", args.runs, out)
    if args.run:
        raise UsageError(f"list takes no run, got {args.run[0]!r}", remedy=f"use `plait runs show {args.run[0]}`")
    return _list(args.runs, out)


def _show(name: str, root: Path, out: Out) -> int:
    from plait.cli.run_tables import show_run
    from plait.core.errors import PlaitError
    from plait.core.files import find_run
    from plait.recipes.run import summary
    from plait.report.sides import read_side

    run = find_run(name, root)
    side = read_side(run)
    try:
        result = summary(run)
    except PlaitError as fault:
        result = {"name": run.name, "error": fault.as_dict()}
    lines, found = show_run(side)
    for line in lines:
        out.line(line)
    out.result(result | found)
    return 0


def _compare(names: list[str], root: Path, *, page: Path | None, out: Out) -> int:
    from plait.cli.run_tables import compared, plain
    from plait.core.errors import UsageError
    from plait.core.files import find_run
    from plait.recipes.compare import compare
    from plait.report.compare_page import NAME, write_comparison

    paths = list(dict.fromkeys(find_run(name, root) for name in names))
    if len(paths) < 2:
        raise UsageError(
            f"compare takes two runs or more, got {len(paths)}{' (named twice)' if len(names) > 1 else ''}",
            remedy="use `plait runs compare RUN RUN`; `plait runs` lists them",
        )
    found = compare(paths)
    for line in compared(found):
        out.line(line)
    written = write_comparison(found, page or paths[0].parent / NAME)
    out.line()
    out.line(f"page        {written}")
    out.result(plain(found) | {"page": str(written)})
    return 0


def _list(root: Path, out: Out) -> int:
    from plait.cli.run_tables import aligned
    from plait.core.errors import PlaitError
    from plait.recipes.run import summary
    from plait.report.folder import RunFolder

    results: list[dict[str, Any]] = []
    rows: list[list[str]] = []
    unreadable: list[str] = []
    for folder in sorted(p.parent for p in root.glob("*/recipe.yaml") if not p.parent.is_symlink()):
        try:
            result = summary(folder)
        except PlaitError as fault:  # one run that cannot be read does not hide the others
            unreadable.append(f"{folder.name}: unreadable: {fault}")
            results.append({"name": folder.name, "error": fault.as_dict()})
            continue
        run = RunFolder(folder)
        begun = next((event["time"] for event in run.events if "time" in event), None)
        result |= {"state": run.state, "begun": begun}
        done = sum(s["state"] == "done" for s in result["stages"])
        when = "-" if begun is None else f"{datetime.fromtimestamp(begun):%Y-%m-%d %H:%M}"
        rows.append([result["name"], result["recipe"], f"{done}/{len(result['stages'])} stages", run.state, when])
        results.append(result)
    for line in aligned([["run", "recipe", "done", "state", "begun"], *rows]) if rows else []:
        out.line(line)
    for line in unreadable:
        out.line(line)
    if not results:
        out.line(f"no runs in {root.absolute()}; start one with `plait run quickstart`")
    out.result(results)
    return 0
