"""What the pages say exists: links, make targets, commands, and files."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from plait.cli.main import VERBS

pytestmark = pytest.mark.light

ROOT = Path(__file__).parents[2]
PAGES = sorted([*ROOT.glob("*.md"), *(ROOT / "docs").rglob("*.md")])


def code(text: str) -> str:
    """Everything a reader may copy: fenced blocks and inline code."""
    return "\n".join(block or inline for block, inline in re.findall(r"```\w*\n(.*?)```|`([^`\n]+)`", text, re.DOTALL))


@pytest.mark.parametrize("page", PAGES, ids=lambda p: p.relative_to(ROOT).as_posix())
def test_links_lead_somewhere(page: Path) -> None:
    targets = re.findall(r"\]\(([^)\s]+)\)|(?:src|href)=\"([^\"]+)\"", page.read_text(encoding="utf-8"))
    local = [a or b for a, b in targets if not (a or b).startswith(("http://", "https://", "mailto:", "#"))]
    assert [link for link in local if not (page.parent / link.partition("#")[0]).exists()] == []


@pytest.mark.parametrize("page", PAGES, ids=lambda p: p.relative_to(ROOT).as_posix())
def test_commands_exist(page: Path) -> None:
    copied = code(page.read_text(encoding="utf-8"))
    phony = re.search(r"^\.PHONY: (.*)$", (ROOT / "Makefile").read_text(encoding="utf-8"), re.MULTILINE)
    assert phony
    targets = {
        word
        for line in re.findall(r"^(?:\w+=\S+ )*make ((?:[a-z-]+ ?)+)", copied, re.MULTILINE)
        for word in line.split()
    }
    assert targets - set(phony[1].split()) == set(), "make targets that do not exist"
    verbs = set(re.findall(r"(?:^|[ /(])plait ([a-z]+)\b", copied, re.MULTILINE))
    assert verbs - set(VERBS) == set(), "verbs that do not exist"
