"""docs/sweep.md: its example is a sweep that would run."""

from __future__ import annotations

import re
import shlex
from pathlib import Path

import pytest

from plait.cli.main import build_parser
from plait.recipes.search.sweep import check, load_sweep

pytestmark = pytest.mark.light

PAGE = Path(__file__).parents[4] / "docs" / "sweep.md"


def test_the_example_is_a_sweep(tmp_path: Path) -> None:
    found = re.search(r"```yaml\n# lr.yaml\n(.*?)```", PAGE.read_text(encoding="utf-8"), re.DOTALL)
    assert found
    path = tmp_path / "lr.yaml"
    path.write_text(found[1])
    plan = check(load_sweep(str(path)))
    assert (plan.sweep.name, plan.sweep.number, plan.shared, plan.stage) == ("lr", 12, ("data",), "pretrain")
    assert plan.sweep.halving is not None


def test_its_commands_are_taken() -> None:
    block = re.search(r"```bash\n(.*?)```", PAGE.read_text(encoding="utf-8"), re.DOTALL)
    assert block
    parser = build_parser(["sweep"])
    lines = [shlex.split(line, comments=True)[1:] for line in block[1].splitlines()]
    assert len(lines) == 5
    for words in lines:
        parser.parse_args(words)
    check(load_sweep(lines[2][1], lines[2][2:]))
