"""Small files, small functions: the ceilings of the house, without exceptions."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

pytestmark = pytest.mark.light

ROOT = Path(__file__).parents[2]
MAX_FILE_LINES = 500
MAX_FUNCTION_LINES = 80
EXCEPTIONS: frozenset[str] = frozenset()
"""Files that may break a ceiling: none. The test below refuses an entry that is not needed."""


def sources() -> list[Path]:
    return sorted(p for top in ("src", "tests", "benchmarks") for p in (ROOT / top).rglob("*.py"))


def too_long(path: Path) -> list[str]:
    """What is too long in a file, as ``path:line``."""
    text = path.read_text(encoding="utf-8")
    name = path.relative_to(ROOT).as_posix()
    lines = len(text.splitlines())
    found = [f"{name}: {lines} lines"] if lines > MAX_FILE_LINES else []
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            length = (node.end_lineno or node.lineno) - node.lineno + 1
            if length > MAX_FUNCTION_LINES:
                found.append(f"{name}:{node.lineno}: {node.name} has {length} lines")
    return found


def test_files_and_functions_are_small() -> None:
    broken = {path.relative_to(ROOT).as_posix(): found for path in sources() if (found := too_long(path))}
    assert not [line for name, found in broken.items() if name not in EXCEPTIONS for line in found]
    assert set(broken) >= EXCEPTIONS, "an exception that is no longer needed"


def test_the_ruler_measures(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(globals(), "ROOT", tmp_path)
    body = "\n".join(f"    x = {n}" for n in range(MAX_FUNCTION_LINES))
    (tmp_path / "a.py").write_text(f"def f():\n{body}\n")
    assert too_long(tmp_path / "a.py") == [f"a.py:1: f has {MAX_FUNCTION_LINES + 1} lines"]
    (tmp_path / "b.py").write_text("x = 1\n" * (MAX_FILE_LINES + 1))
    assert too_long(tmp_path / "b.py") == [f"b.py: {MAX_FILE_LINES + 1} lines"]
