"""The command line answers at once: parsing, help and completion load none of the heavy libraries.

Which modules come in is tested here; how long that takes is measured in ``benchmarks/startup.py``.
"""

from __future__ import annotations

import json
import subprocess
import sys

import pytest

from plait.cli.main import VERBS

pytestmark = pytest.mark.light

HEAVY = ("torch", "transformers", "tokenizers", "peft", "numpy", "scipy", "PIL", "pydantic", "yaml", "rich", "plotly")

TELL = """
import contextlib, io, json, sys
{code}
print(json.dumps([name for name in {heavy!r} if name in sys.modules]))
"""

RUN = """
from plait.cli.main import main
with contextlib.redirect_stdout(io.StringIO()) as said:
    try:
        code = main({arguments!r})
    except SystemExit as stop:
        code = stop.code or 0
assert code == 0 and "plait" in said.getvalue(), (code, said.getvalue())
"""

COMPLETE = """
from plait.cli.main import main
with contextlib.redirect_stdout(io.StringIO()):
    main(["completion", "--words"])
"""


def loaded(code: str, stdin: str = "") -> list[str]:
    """Which heavy libraries a fresh interpreter holds after running ``code``."""
    command = [sys.executable, "-c", TELL.format(code=code, heavy=HEAVY)]
    result = subprocess.run(command, input=stdin, capture_output=True, text=True, check=False, timeout=60)
    assert result.returncode == 0, result.stderr
    return json.loads(result.stdout)


@pytest.mark.parametrize("module", [*VERBS, "main", "output", "panel"])
def test_importing_a_verb_is_light(module: str) -> None:
    assert loaded(f"import plait.cli.{module}") == []


@pytest.mark.parametrize(
    "arguments", [["--help"], ["--version"], ["completion", "bash"], *([verb, "--help"] for verb in VERBS)]
)
def test_help_is_light(arguments: list[str]) -> None:
    assert loaded(RUN.format(arguments=arguments)) == []


@pytest.mark.parametrize("words", ["run", "run\n", "resume\n", "completion\n"])
def test_completing_is_light(words: str) -> None:
    assert loaded(COMPLETE, stdin=words) == []


def test_the_probe_sees_a_heavy_import() -> None:
    assert loaded("import numpy") == ["numpy"]
