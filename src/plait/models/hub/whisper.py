"""Whisper's layout of Hugging Face and our encoder of it.

A file of ``WhisperModel`` or ``WhisperForConditionalGeneration`` holds a decoder too: :func:`split` takes the two
apart, and :func:`to_official` puts them together again.
"""

from collections.abc import Mapping
from typing import Any, NamedTuple

from torch import Tensor

from plait.models.hub.rename import Rule, to_theirs
from plait.models.hub.rename import to_ours as renamed
from plait.models.hub.settings import activation_from, activation_name, require, require_plain_blocks
from plait.models.towers.whisper import WhisperSizes
from plait.models.transformer import TransformerSizes

_LAYER, _BLOCK = "encoder.layers.*", "transformer.blocks.*"
RULES = (
    Rule(ours="stem.0", theirs=("encoder.conv1",)),
    Rule(ours="stem.1", theirs=("encoder.conv2",)),
    Rule(ours="position", theirs=("encoder.embed_positions.weight",)),
    Rule(
        ours=f"{_BLOCK}.attention.qkv.weight",
        theirs=tuple(f"{_LAYER}.self_attn.{part}_proj.weight" for part in ("q", "k", "v")),
    ),
    Rule(
        ours=f"{_BLOCK}.attention.qv_bias",
        theirs=tuple(f"{_LAYER}.self_attn.{part}_proj.bias" for part in ("q", "v")),
    ),
    Rule(ours=f"{_BLOCK}.attention.out", theirs=(f"{_LAYER}.self_attn.out_proj",)),
    Rule(ours=f"{_BLOCK}.attention_part.norm", theirs=(f"{_LAYER}.self_attn_layer_norm",)),
    Rule(ours=f"{_BLOCK}.feed_forward.up", theirs=(f"{_LAYER}.fc1",)),
    Rule(ours=f"{_BLOCK}.feed_forward.down", theirs=(f"{_LAYER}.fc2",)),
    Rule(ours=f"{_BLOCK}.feed_forward_part.norm", theirs=(f"{_LAYER}.final_layer_norm",)),
    Rule(ours="transformer.norm", theirs=("encoder.layer_norm",)),
)
"""Without the prefix ``model.`` that the model with an output layer has."""


class Parts(NamedTuple):
    """A file's weights: those of the encoder, and the others, under their published names."""

    encoder: dict[str, Tensor]
    rest: dict[str, Tensor]


def sizes_from(config: Mapping[str, Any]) -> WhisperSizes:
    """Sizes of the encoder in a ``config.json``; the decoder's settings are not looked at.

    Raises:
        CheckpointError: It asks for something that :class:`~plait.models.towers.whisper.WhisperEncoder` has not.
    """
    require(config, {"model_type": "whisper", "apply_spec_augment": False})
    return WhisperSizes(
        transformer=TransformerSizes(
            d=config["d_model"],
            depth=config["encoder_layers"],
            heads=config["encoder_attention_heads"],
            d_ff=config["encoder_ffn_dim"],
            eps=1e-5,
            activation=activation_from(config["activation_function"]),
            key_bias=False,
            dropout=config["dropout"],
            inner_dropout=config["activation_dropout"],
            attention_dropout=config["attention_dropout"],
            layer_drop=config["encoder_layerdrop"],
        ),
        mels=config["num_mel_bins"],
        tokens=config["max_source_positions"],
    )


def config_from(sizes: WhisperSizes) -> dict[str, Any]:
    """The ``config.json`` of sizes, as far as the encoder goes.

    Raises:
        CheckpointError: The layout has no place for what these sizes ask for.
    """
    inner = sizes.transformer
    require_plain_blocks(inner, key_bias=False, dropouts=True)
    require({"eps": inner.eps, "drop_path": inner.drop_path}, {"eps": 1e-5, "drop_path": 0.0}, place="TransformerSizes")
    return {
        "model_type": "whisper",
        "d_model": inner.d,
        "encoder_layers": inner.depth,
        "encoder_attention_heads": inner.heads,
        "encoder_ffn_dim": inner.d_ff or 4 * inner.d,
        "activation_function": activation_name(inner.activation),
        "dropout": inner.dropout,
        "activation_dropout": inner.dropout_inside,
        "attention_dropout": inner.attention_dropout,
        "encoder_layerdrop": inner.layer_drop,
        "num_mel_bins": sizes.mels,
        "max_source_positions": sizes.tokens,
    }


def split(state: Mapping[str, Tensor]) -> Parts:
    """The encoder's weights of a file under bare names, and what else is in it (decoder, output layer)."""
    named = {name.removeprefix("model."): value for name, value in state.items()}
    if not any(name.startswith("encoder.") for name in named):  # saved from WhisperEncoder alone
        return Parts({f"encoder.{name}": value for name, value in named.items()}, {})
    encoder = {name: value for name, value in named.items() if name.startswith("encoder.")}
    return Parts(encoder, {name: value for name, value in named.items() if name not in encoder})


def to_ours(state: Mapping[str, Tensor], *, place: str = "") -> dict[str, Tensor]:
    """Weights of the encoder in a file under our names; what else is in the file is :func:`split`'s ``rest``.

    Raises:
        CheckpointError: Names of the encoder have no place here.
    """
    return renamed(split(state).encoder, RULES, place=place)


def to_official(state: Mapping[str, Tensor], rest: Mapping[str, Tensor] | None = None) -> dict[str, Tensor]:
    """Our weights under the names of a file of ``WhisperModel``.

    Args:
        state: Of our encoder.
        rest: The decoder's weights that belong to it, as :func:`split` gave them; without, names are those of
            transformers' ``WhisperEncoder`` alone.

    Raises:
        CheckpointError: Some have no name in this layout.
    """
    named = to_theirs(state, RULES, place="WhisperEncoder")
    if rest is None:
        return {name.removeprefix("encoder."): value for name, value in named.items()}
    return named | dict(rest)
