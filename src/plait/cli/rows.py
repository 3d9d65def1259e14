"""``plait rows``: which rows of the checklist have tests, read from the source without running anything."""

from __future__ import annotations

import argparse
import ast
import csv
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from plait.cli.output import Out
from plait.core.errors import DataError, UsageError

CHECKLIST = Path("docs/requirements.tsv")
TESTS = Path("tests")
_COLUMNS = ["id", "category", "type", "priority", "name"]

_Test = ast.FunctionDef | ast.AsyncFunctionDef


@dataclass(frozen=True, slots=True, kw_only=True)
class Claim:
    """One test saying that it checks one row.

    Attributes:
        row: Id of the row.
        test: pytest's node id, without parameters: ``tests/unit/test_x.py::TestY::test_z``.
        place: ``file:line`` of the mark.
    """

    row: str
    test: str
    place: str


def add(parser: argparse.ArgumentParser) -> None:
    """Arguments of the verb."""
    parser.add_argument("--missing", action="store_true", help="show only the rows that no test names")


def main(args: argparse.Namespace, out: Out) -> int:
    """Print coverage by category, or the rows without tests."""
    root = find_root(Path.cwd())
    rows = join(read_checklist(root / CHECKLIST), collect(root))
    if args.missing:
        missing = [row for row in rows if not row["tests"]]
        for row in missing:
            out.line(f"{row['id']:<8} {row['priority']:<8} {row['category']:<20} {row['name']}")
        out.line(f"{len(missing)} of {len(rows)} rows have no test")
        out.result({"rows": missing})
        return 0
    for line in table(rows):
        out.line(line)
    out.result({"rows": rows})
    return 0


# --- reading -------------------------------------------------------------------------------------------------------


def find_root(start: Path) -> Path:
    """The source checkout that holds ``start``: the nearest folder upwards with the checklist and tests.

    Raises:
        UsageError: There is none.
    """
    for folder in (start, *start.parents):
        if (folder / CHECKLIST).is_file() and (folder / TESTS).is_dir():
            return folder
    raise UsageError(
        f"no {CHECKLIST} beside a tests folder here or above",
        place=str(start),
        remedy="run it inside a source checkout of Plait: installed packages carry no tests",
    )


def read_checklist(path: Path) -> list[dict[str, str]]:
    """Rows of the checklist, in order.

    Raises:
        DataError: Other columns than expected, another number of fields, or an id used twice; names the line.
    """
    rows: dict[str, dict[str, str]] = {}
    with path.open(encoding="utf-8", newline="") as file:
        lines = csv.reader(file, delimiter="\t", quoting=csv.QUOTE_NONE)
        header = next(lines, [])
        if header != _COLUMNS:
            raise DataError(f"columns are {header}, expected {_COLUMNS}", place=f"{path}:1", remedy="mend the header")
        for fields in lines:
            place = f"{path}:{lines.line_num}"
            if len(fields) != len(_COLUMNS):
                raise DataError(
                    f"{len(fields)} fields, expected {len(_COLUMNS)}", place=place, remedy="separate with tabs"
                )
            row = dict(zip(_COLUMNS, fields, strict=True))
            if row["id"] in rows:
                raise DataError(f"row {row['id']} is there twice", place=place, remedy="give every row its own id")
            rows[row["id"]] = row
    return list(rows.values())


def collect(root: Path) -> list[Claim]:
    """Every ``pytest.mark.row("ID")`` under ``tests/``: on functions, classes, parameters, and in ``pytestmark``.

    Raises:
        DataError: A file does not parse, an id is not a literal string, or a mark is on nothing that pytest collects.
    """
    claims: list[Claim] = []
    for path in sorted((root / TESTS).rglob("test_*.py")):
        name = path.relative_to(root).as_posix()
        try:
            tree = ast.parse(path.read_bytes(), filename=name)
        except SyntaxError as error:
            raise DataError(f"cannot parse: {error.msg}", place=f"{name}:{error.lineno}", remedy="mend it") from error
        claims += _claims_of_file(tree, name)
    return claims


def _claims_of_file(tree: ast.Module, name: str) -> list[Claim]:
    marks = {call: _row_ids(call, name) for call in ast.walk(tree) if _is_row_mark(call)}
    used: set[ast.AST] = set()
    claims: list[Claim] = []
    for path, above, test in _tests(tree):
        for holder in (*above, *test.decorator_list):
            for call in ast.walk(holder):
                if call in marks:
                    used.add(call)
                    place = f"{name}:{getattr(call, 'lineno', 0)}"
                    claims += [Claim(row=row, test="::".join((name, *path)), place=place) for row in marks[call]]
    for call in marks:
        if call not in used:
            raise DataError(
                "a row mark that no test carries",
                place=f"{name}:{getattr(call, 'lineno', 0)}",
                remedy="put it on a test function, a Test class or in pytestmark",
            )
    return claims


def _tests(tree: ast.Module) -> Iterator[tuple[tuple[str, ...], tuple[ast.expr, ...], _Test]]:
    """Test functions with their names from the outside in, and the marks of what surrounds them."""

    def walk(
        scope: ast.Module | ast.ClassDef, path: tuple[str, ...], above: tuple[ast.expr, ...]
    ) -> Iterator[tuple[tuple[str, ...], tuple[ast.expr, ...], _Test]]:
        above = (*above, *_pytestmark(scope))
        for node in scope.body:
            if isinstance(node, _Test) and node.name.startswith("test"):
                yield (*path, node.name), above, node
            elif isinstance(node, ast.ClassDef) and node.name.startswith("Test"):
                yield from walk(node, (*path, node.name), (*above, *node.decorator_list))

    yield from walk(tree, (), ())


def _pytestmark(scope: ast.Module | ast.ClassDef) -> Iterator[ast.expr]:
    for node in scope.body:
        match node:
            case ast.Assign(targets=[ast.Name(id="pytestmark")], value=value):
                yield value
            case ast.AnnAssign(target=ast.Name(id="pytestmark"), value=ast.expr() as value):
                yield value
            case _:
                pass


def _is_row_mark(node: ast.AST) -> bool:
    """Whether ``node`` is ``pytest.mark.row(...)`` or ``mark.row(...)``."""
    match node:
        case ast.Call(func=ast.Attribute(attr="row", value=ast.Attribute(attr="mark") | ast.Name(id="mark"))):
            return True
        case _:
            return False


def _row_ids(call: ast.AST, name: str) -> list[str]:
    assert isinstance(call, ast.Call)
    ids = [a.value for a in call.args if isinstance(a, ast.Constant) and isinstance(a.value, str)]
    if len(ids) != len(call.args) or not ids or call.keywords:
        raise DataError(
            "a row mark must hold literal row ids",
            place=f"{name}:{call.lineno}",
            remedy='write @pytest.mark.row("S4-01"), so that the mark can be read without running the test',
        )
    return ids


# --- joining and showing -------------------------------------------------------------------------------------------


def join(checklist: Sequence[dict[str, str]], claims: Sequence[Claim]) -> list[dict[str, Any]]:
    """Rows with the tests that name them, in checklist order.

    Raises:
        DataError: Tests name ids that the checklist does not have; names every place.
    """
    known = {row["id"] for row in checklist}
    unknown = [claim for claim in claims if claim.row not in known]
    if unknown:
        raise DataError(
            f"the checklist has no row {', '.join(sorted({c.row for c in unknown}))}",
            place=", ".join(dict.fromkeys(claim.place for claim in unknown)),
            remedy=f"correct the id, or add the row to {CHECKLIST}",
        )
    tests: dict[str, list[str]] = {row: [] for row in known}
    for claim in claims:
        if claim.test not in tests[claim.row]:
            tests[claim.row].append(claim.test)
    shown = ("id", "category", "priority", "name")
    return [{key: row[key] for key in shown} | {"tests": tests[row["id"]]} for row in checklist]


def table(rows: Sequence[dict[str, Any]]) -> list[str]:
    """Coverage by category, categories in checklist order, with a total."""
    lines = [f"{'category':<22} {'covered':>14} {'of them core':>14}"]
    groups: dict[str, list[dict[str, Any]]] = {}
    for row in rows:
        groups.setdefault(row["category"], []).append(row)
    for name, group in (*groups.items(), ("all", list(rows))):
        core = [row for row in group if row["priority"] == "core"]
        lines.append(f"{name:<22} {_share(group):>14} {_share(core):>14}")
    return lines


def _share(rows: Sequence[dict[str, Any]]) -> str:
    covered = sum(bool(row["tests"]) for row in rows)
    return f"{covered:>3} of {len(rows):>3}" if rows else "-"
