"""CLIP's layout of Hugging Face (``CLIPModel``, ``CLIPVisionModel``) and ours."""

from collections.abc import Mapping
from typing import Any

from torch import Tensor

from plait.models.clip import ClipSizes
from plait.models.hub.rename import Rule, to_theirs
from plait.models.hub.rename import to_ours as renamed
from plait.models.hub.settings import activation_from, activation_name, require, require_same, square, understood
from plait.models.towers.pixels import CLIP_MEAN, CLIP_STD
from plait.models.towers.text_transformer import TextSizes
from plait.models.towers.vit import ViTSizes
from plait.models.transformer import TransformerSizes


def _blocks(ours: str, theirs: str) -> tuple[Rule, ...]:
    block, layer = f"{ours}.transformer.blocks.*", f"{theirs}.encoder.layers.*"
    return (
        Rule(ours=f"{block}.attention.qkv", theirs=tuple(f"{layer}.self_attn.{part}_proj" for part in ("q", "k", "v"))),
        Rule(ours=f"{block}.attention.out", theirs=(f"{layer}.self_attn.out_proj",)),
        Rule(ours=f"{block}.attention_part.norm", theirs=(f"{layer}.layer_norm1",)),
        Rule(ours=f"{block}.feed_forward_part.norm", theirs=(f"{layer}.layer_norm2",)),
        Rule(ours=f"{block}.feed_forward.up", theirs=(f"{layer}.mlp.fc1",)),
        Rule(ours=f"{block}.feed_forward.down", theirs=(f"{layer}.mlp.fc2",)),
    )


VISION_RULES = (
    Rule(ours="vision.class_token", theirs=("vision_model.embeddings.class_embedding",), leading=-1),
    Rule(ours="vision.embed.conv", theirs=("vision_model.embeddings.patch_embedding",)),
    Rule(ours="vision.position.table", theirs=("vision_model.embeddings.position_embedding.weight",)),
    Rule(ours="vision.norm_first", theirs=("vision_model.pre_layrnorm",)),  # spelled so in every published file
    Rule(ours="vision.norm_pooled", theirs=("vision_model.post_layernorm",)),
    *_blocks("vision", "vision_model"),
)
RULES = (
    *VISION_RULES,
    Rule(ours="text.embedding", theirs=("text_model.embeddings.token_embedding",)),
    Rule(ours="text.position.table", theirs=("text_model.embeddings.position_embedding.weight",)),
    *_blocks("text", "text_model"),
    Rule(ours="text.transformer.norm", theirs=("text_model.final_layer_norm",)),
    Rule(ours="image_projection", theirs=("visual_projection",)),
    Rule(ours="text_projection", theirs=("text_projection",)),
    Rule(ours="log_scale", theirs=("logit_scale",)),
)
_REPEATED = ("vision_model.embeddings.position_ids", "text_model.embeddings.position_ids")
_OLD_END = 2
"""First published configurations give this as the end of a text; the highest id in the text is meant (arXiv 2103.00020,
section 2.4; it is the last of the vocabulary)."""


@understood("CLIP")
def vision_sizes_from(config: Mapping[str, Any]) -> ViTSizes:
    """Sizes of the picture tower, of its part of a ``config.json``.

    Raises:
        CheckpointError: It asks for something that ours has not.
    """
    require(config, {"model_type": "clip_vision_model", "num_channels": 3})
    patch = square(config, "patch_size", 32, place="config.json")
    side = square(config, "image_size", 224, place="config.json") // patch
    return ViTSizes(
        transformer=_sizes(config),
        patch=patch,
        grid=(side, side),
        norm="pooled",
        norm_first=True,
        patch_bias=False,
        mean=CLIP_MEAN,
        std=CLIP_STD,
    )


@understood("CLIP")
def sizes_from(config: Mapping[str, Any]) -> ClipSizes:
    """Sizes of a ``config.json``.

    Raises:
        CheckpointError: It asks for something that ours has not.
    """
    require(config, {"model_type": "clip"})
    text = config["text_config"]
    end = text.get("eos_token_id", _OLD_END)
    return ClipSizes(
        vision=vision_sizes_from(config["vision_config"]),
        text=TextSizes(
            transformer=_sizes(text),
            vocabulary=text["vocab_size"],
            causal=True,
            max_tokens=text["max_position_embeddings"],
            pool="end",
            end=text["vocab_size"] - 1 if end == _OLD_END else end,
        ),
        d_shared=config["projection_dim"],
    )


def config_from(sizes: ClipSizes) -> dict[str, Any]:
    """The ``config.json`` of sizes.

    Raises:
        CheckpointError: The layout has no place for what these sizes ask for.
    """
    vision, text = sizes.vision, sizes.text
    record = {
        "architectures": ["CLIPModel"],
        "model_type": "clip",
        "projection_dim": sizes.d_shared,
        "vision_config": {
            "model_type": "clip_vision_model",
            **_config(vision.transformer),
            "patch_size": vision.patch,
            "image_size": vision.grid[0] * vision.patch,
            "num_channels": 3,
        },
        "text_config": {
            "model_type": "clip_text_model",
            **_config(text.transformer),
            "vocab_size": text.vocabulary,
            "max_position_embeddings": text.max_tokens,
            "eos_token_id": text.end,
            "bos_token_id": None,
            "pad_token_id": None,
        },
    }
    require_same(sizes, sizes_from(record), besides=("mean", "std", "remainder", "drop_path", "patch_dropout"))
    return record


def to_ours(state: Mapping[str, Tensor], *, place: str = "") -> dict[str, Tensor]:
    """Weights of a file under our names; of a ``CLIPVisionModel``, under those of a Clip's ``vision``.

    Raises:
        CheckpointError: Names have no place here.
    """
    # transformers 5 writes a CLIPVisionModel without the part's name; files published before have it.
    bare = "embeddings.class_embedding" in state
    named = {f"vision_model.{name}": value for name, value in state.items()} if bare else state
    return renamed(named, RULES, ignored=_REPEATED, place=place)


def to_official(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Our weights under the names of a file.

    Raises:
        CheckpointError: Some have no name in this layout.
    """
    return to_theirs(state, RULES, place="Clip")


def _sizes(config: Mapping[str, Any]) -> TransformerSizes:
    return TransformerSizes(
        d=config["hidden_size"],
        depth=config["num_hidden_layers"],
        heads=config["num_attention_heads"],
        d_ff=config["intermediate_size"],
        eps=config.get("layer_norm_eps", 1e-5),
        activation=activation_from(config.get("hidden_act", "quick_gelu")),
        attention_dropout=config.get("attention_dropout", 0.0),
    )


def _config(inner: TransformerSizes) -> dict[str, Any]:
    return {
        "hidden_size": inner.d,
        "num_hidden_layers": inner.depth,
        "num_attention_heads": inner.heads,
        "intermediate_size": inner.d_ff or 4 * inner.d,
        "layer_norm_eps": inner.eps,
        "hidden_act": activation_name(inner.activation),
        "attention_dropout": inner.attention_dropout,
    }
