"""ViT's layout of Hugging Face (``ViTModel``, ``ViTForImageClassification``) and ours."""

from collections.abc import Mapping
from typing import Any

from torch import Tensor

from plait.models.hub.rename import Rule, to_theirs
from plait.models.hub.rename import to_ours as renamed
from plait.models.hub.settings import (
    blocks_from,
    blocks_record,
    labeled,
    labels,
    require,
    require_same,
    square,
    understood,
)
from plait.models.towers.vit import ViTSizes

_LAYER, _BLOCK = "vit.encoder.layer.*", "transformer.blocks.*"
RULES = (
    Rule(ours="class_token", theirs=("vit.embeddings.cls_token",), leading=1),
    Rule(ours="position.table", theirs=("vit.embeddings.position_embeddings",), leading=1),
    Rule(ours="embed.conv", theirs=("vit.embeddings.patch_embeddings.projection",)),
    Rule(
        ours=f"{_BLOCK}.attention.qkv",
        theirs=tuple(f"{_LAYER}.attention.attention.{part}" for part in ("query", "key", "value")),
    ),
    Rule(ours=f"{_BLOCK}.attention.out", theirs=(f"{_LAYER}.attention.output.dense",)),
    Rule(ours=f"{_BLOCK}.attention_part.norm", theirs=(f"{_LAYER}.layernorm_before",)),
    Rule(ours=f"{_BLOCK}.feed_forward_part.norm", theirs=(f"{_LAYER}.layernorm_after",)),
    Rule(ours=f"{_BLOCK}.feed_forward.up", theirs=(f"{_LAYER}.intermediate.dense",)),
    Rule(ours=f"{_BLOCK}.feed_forward.down", theirs=(f"{_LAYER}.output.dense",)),
    Rule(ours="transformer.norm", theirs=("vit.layernorm",)),
    Rule(ours="pooler.0", theirs=("vit.pooler.dense",)),
    Rule(ours="classifier", theirs=("classifier",)),
)
"""With the prefix ``vit.`` that models with a head have; a bare ``ViTModel`` is saved without it."""


@understood("ViT")
def sizes_from(config: Mapping[str, Any]) -> ViTSizes:
    """Sizes of a ``config.json``.

    Raises:
        CheckpointError: It asks for something that :class:`~plait.models.towers.vit.VisionTransformer` has not.
    """
    require(config, {"model_type": "vit", "num_channels": 3, "qkv_bias": True, "pooler_act": "tanh"})
    require(config, {"pooler_output_size": config["hidden_size"]})
    patch = square(config, "patch_size", 16, place="config.json")
    side = square(config, "image_size", 224, place="config.json") // patch
    classes = labels(config)
    return ViTSizes(
        transformer=blocks_from(config),
        patch=patch,
        grid=(side, side),
        pooler=not classes,
        num_classes=classes,
    )


def config_from(sizes: ViTSizes) -> dict[str, Any]:
    """The ``config.json`` of sizes.

    Mean and deviation of pixels belong into ``preprocessor_config.json``; what happens to pixels that make no whole
    patch, ``drop_path`` and ``patch_dropout`` have no place in any file of the layout.

    Raises:
        CheckpointError: The layout has no place for what these sizes ask for.
    """
    inner = sizes.transformer
    record = {
        **labeled("ViT", sizes.num_classes),
        "model_type": "vit",
        **blocks_record(inner),
        "image_size": sizes.grid[0] * sizes.patch,
        "patch_size": sizes.patch,
        "num_channels": 3,
        "qkv_bias": True,
    }
    require_same(sizes, sizes_from(record), besides=("mean", "std", "remainder", "drop_path", "patch_dropout"))
    return record


def to_ours(state: Mapping[str, Tensor], *, place: str = "") -> dict[str, Tensor]:
    """Weights of a file under our names.

    Raises:
        CheckpointError: Names have no place here.
    """
    bare = not any(name.startswith("vit.") for name in state)
    named = {f"vit.{name}": value for name, value in state.items()} if bare else state
    return renamed(named, RULES, place=place)


def to_official(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Our weights under the names of a file.

    Raises:
        CheckpointError: Some have no name in this layout.
    """
    named = to_theirs(state, RULES, place="VisionTransformer")
    if "classifier.weight" in named:
        return named
    return {name.removeprefix("vit."): value for name, value in named.items()}
