"""Fixtures shared by all tests."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from jaxtyping import install_import_hook

os.environ.setdefault("OMP_NUM_THREADS", "2")

# What a hooked module imports first (torch, transformers) is compiled under the hook's own cache tag. Where the machine
# forbids writing bytecode, that would be 20 s of compiling in every test process instead of in the first one.
sys.dont_write_bytecode = False

# Shapes in signatures are checked while testing, and only then.
install_import_hook("plait", "beartype.beartype")


@pytest.fixture(scope="session")
def packages() -> Callable[[str], Path]:
    """Folder of a fetched package by name; fails with the command that fetches it when it is missing."""
    from plait.core.packages import locate

    return locate
