"""Scripts of tests that start several processes: called in a process of their own, they print JSON by case."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

Case = Callable[[str], dict[str, Any]]
"""What the processes of one case say, with ``log`` for what all cases said on the way."""


def cases_of(script: Path, *arguments: str) -> dict[str, Any]:
    """What a script prints last, as JSON; with ``log`` for what it said on the way."""
    result = subprocess.run(
        [sys.executable, str(script), *arguments],
        capture_output=True,
        text=True,
        check=False,
        env=os.environ
        | {"OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(sys.path), "TORCH_CPP_LOG_LEVEL": "ERROR"},
        timeout=500,
    )
    assert result.returncode == 0, result.stderr
    sys.stderr.write(result.stderr)  # shown where a test fails
    return json.loads(result.stdout.splitlines()[-1]) | {"log": result.stderr}


def case_of(script: Path, *arguments: str) -> Case:
    """All cases of a script, started once: each costs no import of torch."""
    found = cases_of(script, *arguments)
    return lambda name: found[name] | {"log": found["log"]}
