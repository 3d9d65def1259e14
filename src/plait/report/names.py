"""Settings as a person reads them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from plait.core.yamltext import is_list, is_mapping


def tower_name(setting: Any) -> str:
    """A picture tower: the name or folder of a frozen one, the kind and sizes of one from scratch.

    Args:
        setting: ``image_tower`` as the recipe has it.

    Example:
        >>> tower_name({"kind": "vit", "size": 64, "patch": 8, "d": 96, "depth": 4, "heads": 3})
        'vit d96 x4 /8 at 64 px'
        >>> tower_name({"kind": "resnet", "size": 32, "depth": 18, "width": 16})
        'resnet x18 w16 at 32 px'
    """
    if not is_mapping(setting):
        return str(setting)
    sizes = [
        f"{sign}{_plain(setting[key])}"
        for key, sign in (("d", "d"), ("depth", "x"), ("depths", "x"), ("width", "w"), ("widths", "w"), ("patch", "/"))
        if key in setting
    ]
    return " ".join([str(setting.get("kind")), *sizes, *_size(setting)])


def _size(setting: Mapping[str, Any]) -> list[str]:
    return [f"at {setting['size']} px"] if "size" in setting else []


def _plain(value: Any) -> str:
    return "-".join(map(str, value)) if is_list(value) else str(value)
