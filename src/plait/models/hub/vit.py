"""ViT's layout of Hugging Face (``ViTModel``, ``ViTForImageClassification``; also DeiT's body) and ours."""

from collections.abc import Mapping
from typing import Any

from torch import Tensor

from plait.models.hub.rename import Rule, to_theirs
from plait.models.hub.rename import to_ours as renamed
from plait.models.hub.settings import activation_from, activation_name, require, require_plain_blocks
from plait.models.towers.vit import ViTSizes
from plait.models.transformer import TransformerSizes

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


def sizes_from(config: Mapping[str, Any]) -> ViTSizes:
    """Sizes of a ``config.json``.

    Raises:
        CheckpointError: It asks for something that :class:`~plait.models.towers.vit.VisionTransformer` has not.
    """
    require(config, {"model_type": "vit", "num_channels": 3, "qkv_bias": True, "pooler_act": "tanh"})
    require(config, {"pooler_output_size": config["hidden_size"]})
    side = config["image_size"] // config["patch_size"]
    classifies = "ViTForImageClassification" in config.get("architectures", ())
    return ViTSizes(
        transformer=TransformerSizes(
            d=config["hidden_size"],
            depth=config["num_hidden_layers"],
            heads=config["num_attention_heads"],
            d_ff=config["intermediate_size"],
            eps=config["layer_norm_eps"],
            activation=activation_from(config["hidden_act"]),
            dropout=config["hidden_dropout_prob"],
            attention_dropout=config["attention_probs_dropout_prob"],
        ),
        patch=config["patch_size"],
        grid=(side, side),
        pooler=not classifies,
        num_classes=len(config["id2label"]) if classifies else 0,
    )


def config_from(sizes: ViTSizes) -> dict[str, Any]:
    """The ``config.json`` of sizes.

    Raises:
        CheckpointError: The layout has no place for what these sizes ask for.
    """
    inner = sizes.transformer
    given = {name: getattr(sizes, name) for name in ("position", "relative", "norm", "class_token", "registers")}
    given |= {"norm_first": sizes.norm_first, "patch_bias": sizes.patch_bias, "square": sizes.grid[0] == sizes.grid[1]}
    plain = {"position": "learned", "relative": "none", "norm": "all", "class_token": True, "registers": 0}
    require(given, {**plain, "norm_first": False, "patch_bias": True, "square": True}, place="ViTSizes")
    require_plain_blocks(inner)
    return {
        "architectures": ["ViTForImageClassification" if sizes.num_classes else "ViTModel"],
        "model_type": "vit",
        "hidden_size": inner.d,
        "num_hidden_layers": inner.depth,
        "num_attention_heads": inner.heads,
        "intermediate_size": inner.d_ff or 4 * inner.d,
        "layer_norm_eps": inner.eps,
        "hidden_act": activation_name(inner.activation),
        "hidden_dropout_prob": inner.dropout,
        "attention_probs_dropout_prob": inner.attention_dropout,
        "image_size": sizes.grid[0] * sizes.patch,
        "patch_size": sizes.patch,
        "num_channels": 3,
        "qkv_bias": True,
        "id2label": {str(i): f"LABEL_{i}" for i in range(sizes.num_classes)} if sizes.num_classes else {},
    }


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
