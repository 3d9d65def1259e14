"""Parts that the matrix composes, and a choice of cases in which every pair of parts meets."""

from __future__ import annotations

import itertools
import random
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

from plait.core.types import Modality
from tests.tiny_towers import HEARS, TOWERS, WATCHES

SIZE = 32
"""Pixels a side of all pictures and frames."""

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
"""Encoders of pictures that are drawn, and learn."""

SOUNDS: dict[str, dict[str, Any]] = {
    "whisper": {"kind": "whisper", "d": 16, "depth": 1, "heads": 2, "mels": 8, "tokens": 25},
    "wav2vec2": {
        "kind": "wav2vec2",
        "d": 16,
        "depth": 1,
        "heads": 2,
        "channels": 8,
        "position_kernel": 4,
        "position_groups": 2,
    },
}
"""Encoders of sounds that are drawn, and learn."""

_TIME = {"kind": "frames", "depth": 1, "heads": 2}
VIDEOS: dict[str, dict[str, Any]] = {
    "frames": _TIME | {"tower": SCRATCH["vit"] | {"size": SIZE}, "frames": 3},
    "frames-of-clip": _TIME | {"tower": "clip", "frames": 4, "sampling": "every", "step": 2, "cells": "all"},
    "space-time": {"kind": "space-time", "size": SIZE, "frames": 4, "patch": 16, "d": 16, "depth": 1, "heads": 2},
}
"""Encoders of videos that are drawn, and learn; the tower of frames in one of them is a frozen one of pictures."""

FAMILIES = ("clip", "siglip2", "vit", "dinov2", "dinov3", "swinv2", "convnext")
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
    frozen = (*(FAMILIES if short else TOWERS), *(HEARS if not short else list(HEARS)[:1]), *WATCHES)
    return (*SCRATCH, *SOUNDS, *VIDEOS, *(f"hf-{name}" for name in frozen))


def modality_of(encoder: str) -> Modality:
    """What an encoder reads."""
    name = encoder.removeprefix("hf-")
    if encoder in SOUNDS or name in HEARS:
        return "audio"
    return "video" if encoder in VIDEOS or name in WATCHES else "image"


def folder_of(encoder: str) -> str:
    """Name of the tiny tower that an encoder is loaded from, or that is in it; empty where all of it is drawn."""
    if encoder in VIDEOS and isinstance(VIDEOS[encoder].get("tower"), str):
        return VIDEOS[encoder]["tower"]
    return encoder.removeprefix("hf-") if encoder.startswith("hf-") else ""


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


def settings(case: Case, *, tower: Path | None, decoder: Path) -> dict[str, Any]:
    """A case as the settings of a composition.

    Args:
        case: Names.
        tower: Folder of the Hugging Face tower that it has, if any (:func:`folder_of`).
        decoder: Folder of a tiny decoder: its weights for ``smollm2``, its tokenizer for all others.
    """
    loaded = {"kind": "pretrained", "name": str(tower), "dtype": "float32"}
    if case.encoder in SCRATCH:
        encoder = SCRATCH[case.encoder] | {"size": SIZE}
    elif case.encoder in VIDEOS:
        encoder = VIDEOS[case.encoder] | ({"tower": loaded} if folder_of(case.encoder) else {})
    else:
        encoder = SOUNDS.get(case.encoder, loaded)
    modality = modality_of(case.encoder)
    language = DECODERS[case.decoder]
    language = language | ({"name": str(decoder)} if case.decoder == "smollm2" else {"tokenizer": str(decoder)})
    return {
        "encoders": {modality: encoder},
        "connectors": {modality: CONNECTORS[case.connector]},
        "decoder": language,
    }
