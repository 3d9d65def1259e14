"""Swin in Hugging Face's layout (``SwinModel``, ``SwinForImageClassification``), both ways."""

from collections.abc import Mapping
from typing import Any

from torch import Tensor

from plait.models.hub.rename import Rule
from plait.models.hub.rename import to_ours as renamed
from plait.models.hub.rename import to_theirs as renamed_back
from plait.models.hub.settings import labeled, labels, require, square
from plait.models.towers.swin import SwinSizes

_HEAD = "classifier"
_PREFIX = "swin."
_BLOCK = "encoder.layers.*.blocks.*"
_FIXED = {"num_channels": 3, "hidden_act": "gelu", "use_absolute_embeddings": False}
RULES = (
    Rule(ours="embedding.projection", theirs=("embeddings.patch_embeddings.projection",)),
    Rule(ours="embedding.norm", theirs=("embeddings.norm",)),
    Rule(
        ours="blocks.*.blocks.*.attention.qkv",
        theirs=tuple(f"{_BLOCK}.attention.self.{part}" for part in ("query", "key", "value")),
    ),
    Rule(
        ours="blocks.*.blocks.*.attention.relative.table",
        theirs=(f"{_BLOCK}.attention.self.relative_position_bias_table",),
    ),
    Rule(ours="blocks.*.blocks.*.attention.out", theirs=(f"{_BLOCK}.attention.output.dense",)),
    Rule(ours="blocks.*.blocks.*.attention_part.norm", theirs=(f"{_BLOCK}.layernorm_before",)),
    Rule(ours="blocks.*.blocks.*.feed_forward.up", theirs=(f"{_BLOCK}.intermediate.dense",)),
    Rule(ours="blocks.*.blocks.*.feed_forward.down", theirs=(f"{_BLOCK}.output.dense",)),
    Rule(ours="blocks.*.blocks.*.feed_forward_part.norm", theirs=(f"{_BLOCK}.layernorm_after",)),
    Rule(ours="merges.*.norm", theirs=("encoder.layers.*.downsample.norm",)),
    Rule(ours="merges.*.reduction", theirs=("encoder.layers.*.downsample.reduction",)),
    Rule(ours="norm", theirs=("layernorm",)),
    Rule(ours="classifier", theirs=(_HEAD,)),
)
_IGNORED = (f"{_BLOCK}.attention.self.relative_position_index",)
"""Computed from the window; files of transformers 4 hold it."""


def sizes_from(config: Mapping[str, Any]) -> SwinSizes:
    """Sizes of the tower that a ``config.json`` describes.

    Raises:
        CheckpointError: A setting has no place in :class:`~plait.models.towers.swin.Swin`.
    """
    require(config, _FIXED, place="config.json of Swin")
    return SwinSizes(
        d=config.get("embed_dim", 96),
        depths=tuple(config.get("depths", (2, 2, 6, 2))),
        heads=tuple(config.get("num_heads", (3, 6, 12, 24))),
        window=config.get("window_size", 7),
        patch=square(config, "patch_size", 4, place="config.json of Swin"),
        mlp_ratio=float(config.get("mlp_ratio", 4.0)),
        qkv_bias=config.get("qkv_bias", True),
        eps=config.get("layer_norm_eps", 1e-5),
        dropout=float(config.get("hidden_dropout_prob", 0.0)),
        attention_dropout=float(config.get("attention_probs_dropout_prob", 0.0)),
        drop_path=float(config.get("drop_path_rate", 0.1)),
        num_classes=labels(config),
    )


def config_from(sizes: SwinSizes, *, image_size: int = 224) -> dict[str, Any]:
    """A ``config.json`` that ``AutoConfig`` reads.

    Args:
        sizes: Of the tower.
        image_size: Pixels a side that users of the file should prepare; the tower itself takes any.
    """
    return {
        "model_type": "swin",
        "image_size": image_size,
        "patch_size": sizes.patch,
        "embed_dim": sizes.d,
        "depths": list(sizes.depths),
        "num_heads": list(sizes.heads),
        "window_size": sizes.window,
        "mlp_ratio": sizes.mlp_ratio,
        "qkv_bias": sizes.qkv_bias,
        "layer_norm_eps": sizes.eps,
        "hidden_dropout_prob": sizes.dropout,
        "attention_probs_dropout_prob": sizes.attention_dropout,
        "drop_path_rate": sizes.drop_path,
        **_FIXED,
        **labeled("Swin", sizes.num_classes),
    }


def to_ours(state: Mapping[str, Tensor], *, place: str = "") -> dict[str, Tensor]:
    """Weights of a published file, of the bare model or of the one with a classifier, under our names.

    Raises:
        CheckpointError: Some names have no place here; lists them.
    """
    bare = {name.removeprefix(_PREFIX): value for name, value in state.items()}
    return renamed(bare, RULES, ignored=_IGNORED, place=place)


def to_official(state: Mapping[str, Tensor], *, place: str = "") -> dict[str, Tensor]:
    """Our weights as ``save_pretrained`` names them: with the prefix of the model inside where there is a classifier.

    Raises:
        CheckpointError: Some of our names have none in this layout; lists them.
    """
    found = renamed_back(state, RULES, place=place)
    prefix = _PREFIX if f"{_HEAD}.weight" in found else ""
    return {name if name.startswith(_HEAD) else prefix + name: value for name, value in found.items()}
