"""Reference outputs written by make_goldens.py."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load
from torch import Tensor

Golden = tuple[dict[str, Tensor], dict[str, Any]]


@pytest.fixture(scope="session")
def golden() -> Callable[[str], Golden]:
    """Tensors and record of a reference, its bytes checked."""

    def read(name: str) -> Golden:
        folder = Path(__file__).parent / "goldens"
        data = (folder / f"{name}.safetensors").read_bytes()
        record = json.loads((folder / f"{name}.json").read_text(encoding="utf-8"))
        assert hashlib.sha256(data).hexdigest() == record["sha256"], "the golden is not the one its record describes"
        return load(data), record

    return read
