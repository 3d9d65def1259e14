"""How the house's tests run other programs: from the root of the checkout, with what they said in the failure."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest


@pytest.fixture(scope="session")
def root() -> Path:
    """The checkout."""
    return Path(__file__).parents[2]


@pytest.fixture(scope="session")
def call(root: Path) -> Callable[..., str]:
    """Run a command and return what it printed: a console script of this environment by name, or ``python``."""

    def run(program: str, *arguments: str) -> str:
        # A ruff or basedpyright elsewhere on PATH would be another version: only the one beside this Python counts.
        path = sys.executable if program == "python" else str(Path(sys.executable).parent / program)
        result = subprocess.run(
            [path, *arguments],
            cwd=root,
            env=os.environ | {"NO_COLOR": "1"},
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            check=False,
            timeout=300,
        )
        said = result.stdout + result.stderr
        assert result.returncode == 0, f"{program} {' '.join(arguments[:3])} exited {result.returncode}\n{said}"
        return result.stdout

    return run
