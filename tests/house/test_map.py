"""The map in the README is the tree: every file is on it with a word about it, and nothing else is."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

pytestmark = pytest.mark.light

ROOT = Path(__file__).parents[2]
TOP = "src/plait/"


def on_the_map(readme: str) -> dict[str, str]:
    """Path below ``src/plait`` (folders end in ``/``) → what the fenced block of the README says about it.

    A line is indented by two spaces a level: ``  core/   NOUNS``, ``    types.py   Sample, Turn``.
    """
    block = re.search(rf"^```text\n{re.escape(TOP)}[^\n]*\n(.*?)^```", readme, re.MULTILINE | re.DOTALL)
    assert block, f"the README has no ```text block that begins with {TOP}"
    found: dict[str, str] = {}
    folders: list[str] = []
    for line in block[1].splitlines():
        entry = re.fullmatch(r"((?:  )+)(\S+)(?:\s+(.*))?", line)
        assert entry, f"not a line of a map: {line!r}"
        depth = len(entry[1]) // 2 - 1
        assert depth <= len(folders), f"indented too far: {line!r}"
        path = "".join(folders[:depth]) + entry[2]
        assert path not in found, f"twice on the map: {path}"
        if path.endswith("/"):
            folders = [*folders[:depth], entry[2]]
        found[path] = entry[3] or ""
    return found


def in_the_tree(top: Path) -> set[str]:
    """Every folder and file, but for ``__init__.py``, whose word is its folder's."""
    found: set[str] = set()
    for path in top.rglob("*"):
        parts = path.relative_to(top).parts
        if "__pycache__" in parts or path.name == "__init__.py" or path.name.startswith("."):
            continue
        name = "/".join(parts)
        if path.is_file():
            found.add(name)
        elif (path / "__init__.py").is_file():
            found.add(name + "/")
    return found


def test_the_map_is_the_tree() -> None:
    listed = on_the_map((ROOT / "README.md").read_text(encoding="utf-8"))
    there = in_the_tree(ROOT / TOP)
    assert sorted(there - set(listed)) == [], "in the tree, not on the map of the README"
    assert sorted(set(listed) - there) == [], "on the map of the README, not in the tree"
    assert [path for path, word in listed.items() if not word] == [], "on the map without a word about it"


def test_a_wrong_map_is_seen() -> None:
    readme = "```text\nsrc/plait/\n  core/    nouns\n    types.py   raw data\n  cli/\n```\n"
    assert on_the_map(readme) == {"core/": "nouns", "core/types.py": "raw data", "cli/": ""}
    with pytest.raises(AssertionError, match="too far"):
        on_the_map("```text\nsrc/plait/\n      types.py   raw data\n```\n")
    with pytest.raises(AssertionError, match="twice"):
        on_the_map("```text\nsrc/plait/\n  a.py   x\n  a.py   x\n```\n")
