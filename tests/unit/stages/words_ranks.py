"""What ``test_pretrain_words.py`` starts: both towers from scratch in one process and in two; prints JSON.

A process of its own, from which ranks are forked before any torch operation.
"""

from __future__ import annotations

import json
import sys
from functools import partial
from pathlib import Path
from typing import Any

from benchmarks.sides.several import together

from plait.core import mesh
from plait.core.events import Events
from plait.stages.pretrain import Pretrain

VIT = {"kind": "vit", "size": 16, "patch": 8, "d": 16, "depth": 1, "heads": 2}
GPT = {"kind": "gpt", "vocabulary": 300, "max_tokens": 24, "d": 16, "depth": 2, "heads": 2, "dropout": 0.0}
LAYOUTS: dict[str, dict[str, Any]] = {"ddp": {}, "zero": {"zero": 3}}


def run(data_stage: Path, layout: str, objective: str, *, world: int) -> str:
    stage = Pretrain.model_validate(
        {
            "image_tower": VIT,
            "text_tower": GPT,
            "objective": {"kind": objective},
            "dropout": 0.0,
            "steps": 3,
            "batch_size": 9,
            "d_hidden": 8,
            "d_shared": 4,
            "save_every": 1,
            "lr": 0.05,
            "device": "cpu",
            "trainer": {
                "optimizer": {"kind": "sgd"},
                "micro_batch": 0 if world == 1 else 5 if layout == "zero" else 2,
                "parallel": LAYOUTS[layout],
            },
        }
    )
    folder = data_stage.parent / f"{layout}-{objective}-{world}"
    own_folder = folder / "ranks" / str(mesh.rank()) if mesh.rank() else folder
    own_folder.mkdir(parents=True, exist_ok=True)
    stage.run(data_stage, own_folder, events=Events())
    return "done"


if __name__ == "__main__":
    (data,) = sys.argv[1:]
    cases = [("ddp", "contrastive", 1), ("ddp", "contrastive", 2), ("zero", "contrastive", 2)]
    cases += [("ddp", "sigmoid", 1), ("ddp", "sigmoid", 2)]
    every = {
        "-".join([layout, objective, str(world)]): together(
            world, partial(run, Path(data), layout, objective, world=world)
        )
        for layout, objective, world in cases
    }
    print(json.dumps(every))
