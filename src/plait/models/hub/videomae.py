"""VideoMAE's layout of Hugging Face (``VideoMAEModel``, ``VideoMAEForVideoClassification``) and ours.

Files of ``VideoMAEForPreTraining`` hold a decoder of pixels too, which :func:`split` takes off.
"""

from collections.abc import Mapping
from dataclasses import replace
from typing import Any, NamedTuple

from torch import Tensor

from plait.models.hub.rename import Rule, to_theirs
from plait.models.hub.rename import to_ours as renamed
from plait.models.hub.settings import blocks_from, blocks_record, require, require_plain_blocks, square
from plait.models.towers.video import VideoSizes

_LAYER, _BLOCK = "videomae.encoder.layer.*", "transformer.blocks.*"
RULES = (
    Rule(ours="embed.conv", theirs=("videomae.embeddings.patch_embeddings.projection",)),
    Rule(
        ours=f"{_BLOCK}.attention.qkv.weight",
        theirs=tuple(f"{_LAYER}.attention.attention.{part}.weight" for part in ("query", "key", "value")),
    ),
    Rule(
        ours=f"{_BLOCK}.attention.qv_bias",
        theirs=tuple(f"{_LAYER}.attention.attention.{part}_bias" for part in ("q", "v")),
    ),
    Rule(ours=f"{_BLOCK}.attention.out", theirs=(f"{_LAYER}.attention.output.dense",)),
    Rule(ours=f"{_BLOCK}.attention_part.norm", theirs=(f"{_LAYER}.layernorm_before",)),
    Rule(ours=f"{_BLOCK}.feed_forward_part.norm", theirs=(f"{_LAYER}.layernorm_after",)),
    Rule(ours=f"{_BLOCK}.feed_forward.up", theirs=(f"{_LAYER}.intermediate.dense",)),
    Rule(ours=f"{_BLOCK}.feed_forward.down", theirs=(f"{_LAYER}.output.dense",)),
    Rule(ours="transformer.norm", theirs=("videomae.layernorm",)),
    Rule(ours="norm_pooled", theirs=("fc_norm",)),
    Rule(ours="classifier", theirs=("classifier",)),
)
"""With the prefix ``videomae.`` that models with a head have; a bare ``VideoMAEModel`` is saved without it."""
_DECODER = ("encoder_to_decoder.", "mask_token", "decoder.")


class Parts(NamedTuple):
    """A file's weights: those of the tower, and those of pretraining's decoder, under their published names."""

    tower: dict[str, Tensor]
    decoder: dict[str, Tensor]


def sizes_from(config: Mapping[str, Any]) -> VideoSizes:
    """Sizes of a ``config.json``.

    Raises:
        CheckpointError: It asks for something that :class:`~plait.models.towers.video.SpaceTimeTransformer` has not.
    """
    require(config, {"model_type": "videomae", "num_channels": 3, "qv_bias": True})
    side = square(config, "image_size", 224, place="config.json")
    patch = square(config, "patch_size", 16, place="config.json")
    classifies = "VideoMAEForVideoClassification" in (config.get("architectures") or ())
    mean = config["use_mean_pooling"]
    return VideoSizes(
        transformer=replace(blocks_from(config), key_bias=False, inner_dropout=0.0),
        tubelet=config["tubelet_size"],
        patch=patch,
        grid=(config["num_frames"] // config["tubelet_size"], side // patch, side // patch),
        position="sequence",
        norm=("pooled" if classifies else "none") if mean else "all",
        pool="mean" if mean else "first",
        # transformers does not write the names of classes where there are two
        num_classes=len(config.get("id2label") or (0, 1)) if classifies else 0,
    )


def config_from(sizes: VideoSizes) -> dict[str, Any]:
    """The ``config.json`` of sizes.

    Raises:
        CheckpointError: The layout has no place for what these sizes ask for.
    """
    inner = sizes.transformer
    require_plain_blocks(inner, key_bias=False, dropouts=True)
    frames, rows, columns = sizes.grid
    norm = ("pooled" if sizes.num_classes else "none") if sizes.pool == "mean" else "all"
    require(
        {"position": sizes.position, "square": rows == columns, "norm": sizes.norm},
        {"position": "sequence", "square": True, "norm": norm},
        place="VideoSizes",
    )
    require(
        {"inner_dropout": inner.dropout_inside, "layer_drop": inner.layer_drop, "drop_path": inner.drop_path},
        {"inner_dropout": 0.0, "layer_drop": 0.0, "drop_path": 0.0},
        place="TransformerSizes",
    )
    names = {str(i): f"LABEL_{i}" for i in range(sizes.num_classes)}
    return {
        "architectures": ["VideoMAEForVideoClassification" if sizes.num_classes else "VideoMAEModel"],
        "model_type": "videomae",
        **blocks_record(inner),
        "qv_bias": True,
        "use_mean_pooling": sizes.pool == "mean",
        "num_frames": frames * sizes.tubelet,
        "tubelet_size": sizes.tubelet,
        "image_size": rows * sizes.patch,
        "patch_size": sizes.patch,
        "num_channels": 3,
    } | ({"id2label": names, "label2id": {name: int(i) for i, name in names.items()}} if names else {})


def split(state: Mapping[str, Tensor]) -> Parts:
    """The tower's weights of a file, and those of pretraining's decoder."""
    decoder = {name: value for name, value in state.items() if name.startswith(_DECODER)}
    return Parts({name: value for name, value in state.items() if name not in decoder}, decoder)


def to_ours(state: Mapping[str, Tensor], *, place: str = "") -> dict[str, Tensor]:
    """Weights of the tower in a file under our names; a decoder in it is :func:`split`'s.

    Raises:
        CheckpointError: Names have no place here.
    """
    tower = split(state).tower
    bare = not any(name.startswith("videomae.") for name in tower)
    named = {f"videomae.{name}": value for name, value in tower.items()} if bare else tower
    return renamed(named, RULES, place=place)


def to_official(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Our weights under the names of a file.

    Raises:
        CheckpointError: Some have no name in this layout.
    """
    named = to_theirs(state, RULES, place="SpaceTimeTransformer")
    if "classifier.weight" in named:
        return named
    return {name.removeprefix("videomae."): value for name, value in named.items()}
