"""Fixtures shared by all tests."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

import pytest
from jaxtyping import install_import_hook

os.environ.setdefault("OMP_NUM_THREADS", "2")

# Shapes in signatures are checked while testing, and only then.
install_import_hook("plait", "beartype.beartype")


@pytest.fixture(scope="session")
def packages() -> Callable[[str], Path]:
    """Folder of a fetched package by name; fails with the command that fetches it when it is missing."""
    from plait.core.packages import locate

    return locate
