"""Who may import whom, and what must stay light: the directions of the design, at rest and at run time."""

from __future__ import annotations

import json
import tomllib
from collections.abc import Callable
from pathlib import Path

import pytest

pytestmark = pytest.mark.light

HEAVY = ("torch", "transformers", "tokenizers", "peft", "numpy", "scipy", "PIL", "rich", "fastapi", "plotly")

FRAMEWORK_FREE = (
    "plait.core",
    "plait.objectives",
    "plait.reasoning",
    "plait.training.schedule",
    "plait.alignment.advantage",
    "plait.inference.sampling",
    "plait.inference.scheduler",
)
"""What the design keeps from transformers, peft, fastapi and plotly, once it exists."""

# Import every module of a package, but not of packages inside it (they hold what a stage runs), and tell which heavy
# ones came with it.
TELL = """
import importlib, json, pkgutil, sys
package = importlib.import_module({package!r})
for module in pkgutil.walk_packages(package.__path__, package.__name__ + "."):
    if module.name.rpartition(".")[2] != "__main__" and module.name.count(".") == package.__name__.count(".") + 1:
        importlib.import_module(module.name)
print(json.dumps([name for name in {heavy!r} if name in sys.modules]))
"""


def heavy_after_importing(package: str, call: Callable[..., str]) -> list[str]:
    return json.loads(call("python", "-c", TELL.format(package=package, heavy=HEAVY)))


def test_contracts_hold(call: Callable[..., str]) -> None:
    call("lint-imports", "--no-cache")


def test_the_contract_names_every_framework_free_module(root: Path) -> None:
    settings = tomllib.loads((root / "pyproject.toml").read_text(encoding="utf-8"))
    contracts = settings["tool"]["importlinter"]["contracts"]
    named = next(c["source_modules"] for c in contracts if c["type"] == "forbidden")

    def exists(module: str) -> bool:
        path = root / "src" / Path(*module.split("."))
        return path.is_dir() or path.with_suffix(".py").is_file()

    assert sorted(named) == sorted(module for module in FRAMEWORK_FREE if exists(module))


def test_specs_load_no_torch(call: Callable[..., str]) -> None:
    """Recipes and stages are settings: reading and planning one needs pydantic and YAML, and nothing heavier."""
    assert heavy_after_importing("plait.stages", call) == []
    assert heavy_after_importing("plait.recipes", call) == []
