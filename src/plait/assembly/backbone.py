"""Hugging Face folder to the picture backbone of transformers in it: safetensors only, whole, of a known family."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from transformers import AutoModel, PreTrainedModel

from plait.assembly.hf_folder import load_folder
from plait.assembly.local import IMAGE_TOWER
from plait.core.errors import CheckpointError, DataError
from plait.core.files import read_json
from plait.models.towers.families import DUAL, FAMILIES

_UNUSED = ("pooler.", "head.")
"""Parts that a tower of tokens does without; folders of classifiers lack them, or have others."""
_TOWERS = ("vision_model", "vision_tower")
"""What CLIP's like and LLaVA call their picture tower."""


def load_backbone(folder: Path, dtype: str) -> PreTrainedModel:
    """The picture model of a folder, weights in ``dtype``; of CLIP and its like and of LLaVA the picture tower alone.

    Raises:
        CheckpointError: Its family is not known, it needs another library, its files cannot be read, or weights are
            missing: transformers would draw those at random.
    """
    _check_family(folder / "config.json")
    loaded = load_folder(AutoModel, folder, dtype=dtype, what="picture tower")
    inside = loaded.part(_TOWERS)
    loaded.check(inside=inside, needed=lambda name: not name.startswith(_UNUSED))
    return getattr(loaded.model, inside[:-1]) if inside else loaded.model


def _check_family(path: Path) -> None:
    """Refuse by the configuration alone, before weights are read."""
    try:
        config: Any = read_json(path)
    except DataError as error:
        raise CheckpointError(error.cause, place=str(path), remedy="use an undamaged copy of the folder") from error
    kind = config.get("model_type") if isinstance(config, dict) else None
    if kind in FAMILIES or kind in DUAL or kind == "llava":
        return
    if isinstance(config, dict) and (str(kind).startswith("timm") or (kind is None and "architecture" in config)):
        raise CheckpointError(
            "this is a folder of timm, which Plait does not use",
            place=f"{path}: model_type",
            remedy="use the same model in transformers' own form, such as a ViT, Swin or ConvNeXt folder",
        )
    raise CheckpointError(
        f"model_type is {kind!r}, which is no picture tower that is known here",
        place=f"{path}: model_type",
        remedy=f"use {IMAGE_TOWER!r}, or a folder of one of: {', '.join([*DUAL, *FAMILIES])}",
    )
