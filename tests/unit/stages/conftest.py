"""A finished data stage over own pictures, and after it one that left a tiny multimodal model with an adapter."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

COLORS = ("red", "blue", "green", "black", "white", "brown", "gray", "pink")
THINGS = ("cat", "bus", "lamp", "tree", "boat", "fork")


@pytest.fixture
def data_stage(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """48 named pictures of noise, a quarter of them held out as ``test-concept``."""
    from plait.core.events import Events
    from plait.stages.data import Data, PairsSource

    monkeypatch.setenv("PLAIT_HOME", str(tmp_path / "home"))
    own, stage = tmp_path / "own", tmp_path / "01-data"
    for path in (own, stage):
        path.mkdir()
    lines = ["image,text"]
    for number, name in enumerate(f"{color} {thing}" for thing in THINGS for color in COLORS):
        noise = np.random.default_rng(number).integers(0, 256, (32, 32, 3), dtype=np.uint8)
        Image.fromarray(noise).save(own / f"{number}.png")
        lines.append(f"{number}.png,{name}")
    (own / "pairs.csv").write_text("\n".join(lines) + "\n")
    Data(source=PairsSource(path=own / "pairs.csv", test_fraction=0.25)).run(None, stage, events=Events())
    return stage


@pytest.fixture
def tuned_stage(data_stage: Path, tiny_model: Any) -> Path:
    """Sealed folder of a stage whose model is ``checkpoints/000001``, with an adapter that does something."""
    import torch

    from plait.adapters.lora import Lora, attach
    from plait.assembly.multimodal import save_multimodal
    from plait.core.files import mark_done

    lora = Lora(rank=4, alpha=8.0, targets=("q_proj", "v_proj", "down_proj"), dropout=0.3)
    attach(tiny_model.language.model, lora)
    torch.manual_seed(2)
    for name, weight in tiny_model.language.model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(weight, std=0.1)
    folder = data_stage.parent / "02-tune"
    model = folder / "checkpoints" / "000001"
    model.mkdir(parents=True)
    save_multimodal(tiny_model.with_lora(lora), model)
    mark_done(folder, kind="tune", previous=data_stage, summary={"model": "checkpoints/000001"})
    return folder
