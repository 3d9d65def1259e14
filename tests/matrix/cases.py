"""Parts that the matrix composes, and a choice of cases in which every pair of parts meets."""

from __future__ import annotations

import itertools
import random
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from tests.tiny_towers import TOWERS

SIZE = 32
"""Pixels a side of all pictures."""

SCRATCH: dict[str, dict[str, Any]] = {
    "vit": {"kind": "vit", "patch": 8, "d": 16, "depth": 2, "heads": 2},
    "vit-hybrid": {
        "kind": "vit",
        "patch": 8,
        "d": 16,
        "depth": 1,
        "heads": 2,
        "position": "sincos",
        "relative": "rope",
    },
    "resnet": {"kind": "resnet", "depth": 18, "width": 8},
    "efficientnet-lite": {"kind": "efficientnet-lite"},
    "swin": {"kind": "swin", "d": 8, "depths": [1, 1], "heads": [2, 2], "window": 4, "drop_path": 0.0},
    "hybrid": {"kind": "hybrid", "widths": [8, 16], "d": 16, "depth": 1, "heads": 2},
    "coatnet": {"kind": "coatnet", "widths": [8, 8, 16], "depths": [1, 1, 1], "attention": 1, "d_head": 8},
}
"""Encoders that are drawn, and learn."""

FAMILIES = ("clip", "siglip", "siglip2", "vit", "vit_mae", "dinov2", "dinov3", "beit", "swin", "swinv2", "convnext")
"""Frozen encoders of the short form; the full one has all of :data:`tests.tiny_towers.TOWERS`."""

_RESAMPLER = {"kind": "resampler", "queries": 3, "depth": 1, "heads": 2}
CONNECTORS: dict[str, dict[str, Any]] = {
    "linear": {"kind": "linear"},
    "mlp": {"kind": "mlp", "shuffle": 2, "d_hidden": 8},
    "words": {"kind": "words", "d_hidden": 8, "tokens": 3, "free": 1},
    "qformer": {"kind": "qformer", "queries": 3, "d": 16, "depth": 2, "heads": 2},
    "resampler": _RESAMPLER,
    "gated-cross-attention": {"kind": "gated-cross-attention", "every": 1, "heads": 2, "resampler": _RESAMPLER},
    "gated-cross-attention-plain": {"kind": "gated-cross-attention", "every": 2, "heads": 2, "resampler": None},
}

_NEW = {"kind": "new", "d": 32, "depth": 2, "heads": 4, "d_ff": 48, "context": 256}
DECODERS: dict[str, dict[str, Any]] = {
    "llama": _NEW | {"model_type": "llama", "tied": False},
    "qwen2": _NEW | {"model_type": "qwen2", "kv_heads": 2},
    "gpt2": _NEW | {"model_type": "gpt2"},
    "smollm2": {"kind": "pretrained"},
}
"""Three that are drawn and learn as a whole, and a frozen one in SmolLM2's form, from a folder."""


class Case(NamedTuple):
    """Names of one composition."""

    encoder: str
    connector: str
    decoder: str

    def __str__(self) -> str:
        return " x ".join(self)


def encoders(*, short: bool) -> tuple[str, ...]:
    """Names of encoders; those of Hugging Face begin with ``hf-``."""
    return (*SCRATCH, *(f"hf-{name}" for name in (FAMILIES if short else TOWERS)))


def product() -> list[Case]:
    """Every composition."""
    return [Case(*names) for names in itertools.product(encoders(short=False), CONNECTORS, DECODERS)]


def pairwise() -> list[Case]:
    """Few compositions in which each encoder meets each connector, each connector each decoder, and so on."""
    return [Case(*names) for names in cover([encoders(short=True), tuple(CONNECTORS), tuple(DECODERS)])]


def cover(axes: Sequence[Sequence[str]], *, seed: int = 0) -> list[tuple[str, ...]]:
    """Rows in which every two values of two axes meet: greedy, each row the best of all that the widest pair allows."""
    draw = random.Random(seed)
    missing = {
        ((i, a), (j, b)) for i, j in itertools.combinations(range(len(axes)), 2) for a in axes[i] for b in axes[j]
    }
    rows: list[tuple[str, ...]] = []
    while missing:
        tried = [tuple(draw.choice(axis) for axis in axes) for _ in range(20)]
        for (i, a), (j, b) in draw.sample(sorted(missing), min(20, len(missing))):
            row = [draw.choice(axis) for axis in axes]
            row[i], row[j] = a, b
            tried.append(tuple(row))
        best = max(tried, key=lambda row: len(_pairs(row) & missing))
        if found := _pairs(best) & missing:
            rows.append(best)
            missing -= found
    return rows


def _pairs(row: Sequence[str]) -> set[tuple[tuple[int, str], tuple[int, str]]]:
    return {((i, row[i]), (j, row[j])) for i, j in itertools.combinations(range(len(row)), 2)}


def settings(case: Case, *, towers: Mapping[str, Path], decoder: Path) -> dict[str, Any]:
    """A case as the settings of a composition.

    Args:
        case: Names.
        towers: Folder of each Hugging Face tower.
        decoder: Folder of a tiny decoder: its weights for ``smollm2``, its tokenizer for all others.
    """
    if case.encoder in SCRATCH:
        encoder = SCRATCH[case.encoder] | {"size": SIZE}
    else:
        encoder = {"kind": "pretrained", "name": str(towers[case.encoder.removeprefix("hf-")]), "dtype": "float32"}
    language = DECODERS[case.decoder]
    language = language | ({"name": str(decoder)} if case.decoder == "smollm2" else {"tokenizer": str(decoder)})
    return {
        "encoders": {"image": encoder},
        "connectors": {"image": CONNECTORS[case.connector]},
        "decoder": language,
    }
