"""Reference outputs written by make_goldens.py, and tiny models as files."""

from __future__ import annotations

import copy
import hashlib
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from safetensors.torch import load, save_file
from tests.tiny_towers import TinyTowers
from torch import Tensor
from transformers import PreTrainedModel

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


@pytest.fixture(scope="session")
def tiny_towers(tmp_path_factory: pytest.TempPathFactory) -> TinyTowers:
    """Tiny picture towers of every family of transformers."""
    return TinyTowers(tmp_path_factory.mktemp("towers"))


class Saved(NamedTuple):
    """A model as ``save_pretrained`` writes it; names in files are not those in memory."""

    config: dict[str, Any]
    state: dict[str, Tensor]


@pytest.fixture
def as_saved(tmp_path: Path) -> Callable[..., Saved]:
    """Writes a model of transformers and reads its files; of ``gradients`` the same, under the names of the weights."""

    def save(model: PreTrainedModel, *, gradients: bool = False) -> Saved:
        if gradients:
            found = [torch.zeros_like(p) if p.grad is None else p.grad for p in model.parameters()]
            model = copy.deepcopy(model)
            for weight, gradient in zip(model.parameters(), found, strict=True):
                weight.data = gradient.clone()
        model.save_pretrained(tmp_path / "theirs")
        config = json.loads((tmp_path / "theirs" / "config.json").read_text(encoding="utf-8"))
        return Saved(config, load((tmp_path / "theirs" / "model.safetensors").read_bytes()))

    return save


@pytest.fixture
def loaded(tmp_path: Path) -> Callable[..., Any]:
    """A model of transformers from a config and weights of ours; every name must be known, and none missing."""

    def read(auto: Any, config: dict[str, Any], state: dict[str, Tensor]) -> Any:
        folder = tmp_path / "ours"
        folder.mkdir()
        (folder / "config.json").write_text(json.dumps(config), encoding="utf-8")
        save_file(
            {name: value.contiguous() for name, value in state.items()}, folder / "model.safetensors", {"format": "pt"}
        )
        model, found = auto.from_pretrained(folder, output_loading_info=True, dtype="auto")
        assert not any(found.values()), found
        return model.eval()

    return read
