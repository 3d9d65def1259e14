"""What ``test_pretrain_views.py`` starts: a pretrain stage in one process and in two, in micro-batches; prints JSON.

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

TOWER = {"kind": "vit", "size": 16, "patch": 8, "d": 16, "depth": 1, "heads": 2}
KINDS: dict[str, dict[str, Any]] = {
    "nt-xent": {"kind": "nt-xent"},
    "moco": {"kind": "moco", "queue": 20, "momentum": 0.9, "temperature": 0.2},
}


def run(data_stage: Path, kind: str, *, world: int) -> str:
    stage = Pretrain.model_validate(
        {
            "image_tower": TOWER,
            "objective": KINDS[kind],
            "steps": 3,
            "batch_size": 9,
            "d_hidden": 8,
            "d_shared": 4,
            "save_every": 1,
            "lr": 0.05,
            "device": "cpu",
            "trainer": {"optimizer": {"kind": "sgd"}, "micro_batch": 0 if world == 1 else 2},
        }
    )
    folder = data_stage.parent / f"{kind}-{world}"
    own_folder = folder / "ranks" / str(mesh.rank()) if mesh.rank() else folder
    own_folder.mkdir(parents=True, exist_ok=True)
    stage.run(data_stage, own_folder, events=Events())
    return "done"


if __name__ == "__main__":
    (data,) = sys.argv[1:]
    every = {
        f"{kind}-{world}": together(world, partial(run, Path(data), kind, world=world))
        for kind in KINDS
        for world in (1, 2)
    }
    print(json.dumps(every))
