"""What ``test_overfitting.py`` starts: ``python overfitting.py FOLDER SEEDS FORMS``.

A hundred pictures, learned by heart by the heads of a dual encoder without dropout or decay of weights, at a constant
rate; a hundred other concepts judge. Each form runs to the end, and again with patience.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import torch
from torch.nn import functional

from plait.assembly.dual import load_dual
from plait.assembly.pairs import read_pairs
from plait.core.events import Events
from plait.core.files import read_done, read_jsonl
from plait.core.packages import home
from plait.stages.data import Data
from plait.stages.pretrain import Pretrain

EVERY, PATIENCE, STEPS, SAMPLES = 4, 3, 80, 100
FORMS: dict[str, dict[str, Any]] = {
    "plain": {},
    "average": {"trainer": {"average": {"decay": 0.9}}},
    "dropout": {"dropout": 0.5},
}


def pictures(folder: Path, seed: int) -> Path:
    questions = dict.fromkeys(("canvases", "test_canvases", "yes_no", "yes_no_easy"), 0) | {"chinese": False}
    source = {"kind": "emoji", "validation": SAMPLES, "max_train": 100, "max_test": 2}
    folder.mkdir()
    spec = Data.model_validate({"seed": seed, "source": source, "questions": questions})
    return spec.run(None, folder, events=Events())


def learned(data: Path, folder: Path, seed: int, *, form: str, patience: int) -> dict[str, Any]:
    validation = {"every": EVERY, "samples": SAMPLES, "patience": patience}
    changes = FORMS[form]
    trainer = {
        "schedule": {"kind": "constant"},
        "optimizer": {"weight_decay": 0.0},
        "validation": validation,
        **changes.get("trainer", {}),
    }
    settings = {"seed": seed, "steps": STEPS, "batch_size": 100, "lr": 2e-4, "dropout": 0.0, "keywords": False}
    folder.mkdir()
    Pretrain.model_validate(settings | {"resolution": 64} | changes | {"trainer": trainer}).run(
        data, folder, events=Events()
    )
    done = read_done(folder)
    assert done is not None
    records = [record for record in read_jsonl(folder / "metrics.jsonl") if "evaluation" in record]
    return {
        "curve": {record["step"]: record["evaluation"] for record in records},
        "training": {record["step"]: record["evaluation_training"] for record in records},
        "summary": done["summary"],
        "kept": loss_of(folder / done["summary"]["checkpoint"], data),
    }


def loss_of(checkpoint: Path, data: Path) -> float:
    """Of a saved model over all pairs of validation, by torch's cross-entropy: each concept has one picture."""
    dual = load_dual(checkpoint)
    pairs = read_pairs(
        data / "shards", ("validation",), dual, cache=home() / "features", keywords=False, events=Events()
    )["validation"]
    dual.model.eval()
    with torch.no_grad():
        image = functional.normalize(dual.model.image(pairs.image), dim=1)
        text = functional.normalize(dual.model.text(pairs.text[[rows[0] for rows in pairs.texts_of]]), dim=1)
        scores = dual.model.scale * image @ text.T
    own = torch.arange(len(scores))
    return float(functional.cross_entropy(scores, own) + functional.cross_entropy(scores.T, own)) / 2


def main(root: Path, seeds: list[int], forms: list[str]) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for seed in seeds:
        data = pictures(root / f"data-{seed}", seed)
        found[str(seed)] = {
            form: {
                name: learned(data, root / f"{form}-{seed}-{name}", seed, form=form, patience=patience)
                for name, patience in (("to the end", 0), ("early", PATIENCE))
            }
            for form in forms
        }
    return found


if __name__ == "__main__":
    print(json.dumps(main(Path(sys.argv[1]), json.loads(sys.argv[2]), json.loads(sys.argv[3]))))
