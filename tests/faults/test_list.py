"""The list of faults in ``docs/reliability.md`` cannot rot: every test that it names is there, no fault without one."""

from __future__ import annotations

import ast
import re
from pathlib import Path

import pytest

pytestmark = pytest.mark.light

ROOT = Path(__file__).parents[2]


def listed(page: str) -> dict[str, list[tuple[str, str]]]:
    """Id of each fault → pairs of file and test, as its item names them."""
    section = page.partition("\n## Faults\n")[2]
    items = re.findall(r"^- \*\*(\w+)\*\* (.*?)(?=^- |^\S|\Z)", section, re.MULTILINE | re.DOTALL)
    found: dict[str, list[tuple[str, str]]] = {}
    for name, text in items:
        assert name not in found, f"twice: {name}"
        found[name], file = [], ""
        for word in re.findall(r"`([^`\s]+)`", text):
            if word.startswith(("faults/", "unit/", "parity/")):
                file = word
            elif word.startswith("test_"):
                found[name].append((file, word))
    return found


PAGE = (ROOT / "docs" / "reliability.md").read_text(encoding="utf-8")


def test_every_fault_is_listed_with_a_test() -> None:
    faults = listed(PAGE)
    assert set(faults) == {f"T{number}" for number in range(1, 27)}
    assert [name for name, tests in faults.items() if not tests] == []


@pytest.mark.parametrize("fault", sorted(listed(PAGE), key=lambda name: int(name[1:])))
def test_each_named_test_exists(fault: str) -> None:
    for file, name in listed(PAGE)[fault]:
        tree = ast.parse((ROOT / "tests" / file).read_text(encoding="utf-8"))
        there = {node.name for node in tree.body if isinstance(node, ast.FunctionDef)}
        assert name in there, f"{fault} names {file}::{name}"


def test_the_reader_of_the_page_reads() -> None:
    page = "\n## Faults\n\n- **T1** Said. `faults/a.py`: `test_x`,\n  `test_y`; `unit/b.py`: `test_z`\n"
    page += "- **T2** None.\n\nEnd `test_w`."
    tests = [("faults/a.py", "test_x"), ("faults/a.py", "test_y"), ("unit/b.py", "test_z")]
    assert listed(page) == {"T1": tests, "T2": []}
