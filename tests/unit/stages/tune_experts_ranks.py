"""What ``test_tune_experts.py`` starts: a tune stage in one process and in two that divide its experts; prints JSON.

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
from plait.stages.tune import Tune


def run(data_stage: Path, image: str, decoder: str, *, world: int) -> str:
    new: dict[str, Any] = {"kind": "new", "model_type": "mixtral", "d": 16, "depth": 2, "heads": 2, "context": 256}
    new |= {"tokenizer": decoder, "mixture": {"experts": 4, "capacity": 1.0}}
    adapt = {"steps": 2, "lr_connector": 1e-3, "drop": {"most": 0.0, "least": 0.0}}
    trainer = {"parallel": {"expert": world}, "optimizer": {"kind": "sgd"}}
    stage = Tune.model_validate(
        {
            "image_tower": image,
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


if __name__ == "__main__":
    data, image, decoder = sys.argv[1:]
    print(json.dumps({str(n): together(n, partial(run, Path(data), image, decoder, world=n)) for n in (1, 2)}))
