"""A tune stage whose decoder has experts: several processes that divide them make the model of one."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from benchmarks.sides.several import together
from safetensors.torch import load_file

from plait.core import mesh
from plait.core.events import Events
from plait.core.files import find_model, read_jsonl
from plait.stages.tune import Tune

Folders = dict[str, Path]


@pytest.mark.row("S4-68")
def test_processes_that_divide_experts_make_the_model_that_one_makes(data_stage: Path, tiny_folders: Folders) -> None:
    new: dict[str, Any] = {"kind": "new", "model_type": "mixtral", "d": 16, "depth": 2, "heads": 2, "context": 256}
    new |= {"tokenizer": str(tiny_folders["decoder"]), "mixture": {"experts": 4, "capacity": 1.0}}
    adapt = {"steps": 2, "lr_connector": 1e-3, "drop": {"most": 0.0, "least": 0.0}}
    folders: dict[int, Path] = {}

    def run(world: int) -> str:
        trainer = {"parallel": {"expert": world}, "optimizer": {"kind": "sgd"}}
        stage = Tune.model_validate(
            {
                "image_tower": str(tiny_folders["image"]),
                "resolution": 0,
                "views": 1,
                "decoder": new,
                "dtype": "float32",
                "connector": {"kind": "mlp"},
                "adapt": adapt,
                "batch_size": 4,
                "row": 192,
                "save_every": 1,
                "device": "cpu",
                "trainer": trainer,
            }
        )
        folder = data_stage.parent / f"experts-{world}"
        own = folder / "ranks" / str(mesh.rank()) if mesh.rank() else folder
        own.mkdir(parents=True, exist_ok=True)
        stage.run(data_stage, own, events=Events())
        return "done"

    for world in (1, 2):
        assert together(world, partial(run, world)) == ["done"] * world
        folders[world] = find_model(data_stage.parent / f"experts-{world}") / "decoder" / "model.safetensors"
    one, two = (load_file(folders[world]) for world in (1, 2))
    assert one.keys() == two.keys()
    for name, weight in one.items():
        torch.testing.assert_close(two[name], weight, atol=1e-6, rtol=1e-5)
    records = read_jsonl(data_stage.parent / "experts-2" / "decoder" / "metrics.jsonl")
    assert all(0 < record["loss/dropped"] < 1 and record["loss/balance"] > 2 for record in records)
