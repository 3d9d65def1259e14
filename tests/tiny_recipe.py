"""A whole recipe of a second, on random towers and 32 pictures of noise, for tests that run it as a person would."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from plait.core.yamltext import write_text

COLORS = ("red", "blue", "green", "black", "white", "brown", "gray", "pink")
THINGS = ("cat", "bus", "lamp", "tree")


def write_recipe(root: Path, folders: Mapping[str, Path], *, steps: int, pretrain: bool = True) -> Path:
    """Pictures with names, and a recipe: data, pretrain, tune in three phases, align. Nothing in it draws dropout.

    Args:
        root: Where; an empty folder.
        folders: Of the tiny towers and decoder.
        steps: Of the last phase of tune, a checkpoint every second one.
        pretrain: Whether there is a pretrain stage.
    """
    lines = ["image,text"]
    for number, name in enumerate(f"{color} {thing}" for thing in THINGS for color in COLORS):
        noise = np.random.default_rng(number).integers(0, 256, (32, 32, 3), dtype=np.uint8)
        Image.fromarray(noise).save(root / f"{number}.png")
        lines.append(f"{number}.png,{name}")
    (root / "pairs.csv").write_text("\n".join(lines) + "\n")
    image, text, decoder = (str(folders[name]) for name in ("image", "text", "decoder"))
    stages: dict[str, Any] = {
        "pretrain": {
            "image_tower": image,
            "resolution": 0,
            "text_tower": text,
            "max_tokens": 32,
            "dropout": 0.0,
            "steps": 4,
            "batch_size": 8,
            "device": "cpu",
        },
        "tune": {
            "image_tower": image,
            "resolution": 0,
            "views": 1,
            "decoder": decoder,
            "dtype": "float32",
            "connector": {"d_hidden": 16, "tokens": 3, "free": 1, "dropout": 0.0},
            "words": {"steps": 3, "batch_size": 8},
            "frozen": {"steps": 2},
            "adapt": {"steps": steps, "rank": 2, "lr_connector": 1e-3},
            "batch_size": 8,
            "save_every": 2,
            "device": "cpu",
            "trainer": {"async_save": True},
        },
        "align": {  # the third batch has one pair
            "tasks": ["name.en", "yesno"],
            "steps": 3,
            "max_pairs": 7,
            "batch_size": 3,
            "test_pairs": 8,
            "device": "cpu",
        },
    }
    if not pretrain:
        del stages["pretrain"]
    source = {"kind": "pairs", "path": str(root / "pairs.csv"), "test_fraction": 0.25}
    path = root / "tiny.yaml"
    path.write_text(write_text({"name": "tiny", "seed": 3, "data": {"source": source}, "stages": stages}))
    return path
