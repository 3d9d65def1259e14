"""Hugging Face folder to the picture backbone of transformers in it: safetensors only, whole, of a known family."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from transformers import AutoModel, PreTrainedModel

from plait.assembly.local import IMAGE_TOWER, quiet, unreported
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
    try:
        with quiet(), unreported():
            model, report = AutoModel.from_pretrained(
                folder, local_files_only=True, use_safetensors=True, dtype=dtype, output_loading_info=True
            )
    except (ImportError, KeyError, OSError, RuntimeError, SafetensorError, ValueError) as error:
        raise CheckpointError(
            f"no picture tower can be read: {error}",
            place=str(folder),
            remedy="give a folder that transformers' AutoModel loads from safetensors, without other libraries",
        ) from error
    part = next((name for name in _TOWERS if hasattr(model, name)), "")
    inside = f"{part}." if part else ""
    missing = sorted(key.removeprefix(inside) for key in report["missing_keys"] if key.startswith(inside))
    missing = [key for key in missing if not key.startswith(_UNUSED)]
    if missing:
        raise CheckpointError(
            f"{len(missing)} weights are missing, such as {missing[0]}",
            place=str(folder),
            remedy="use an undamaged copy of the folder: config.json and weights must come from one checkpoint",
        )
    return getattr(model, part) if part else model


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
