"""T5's layout of Hugging Face (``T5ForConditionalGeneration``, also T5 v1.1's gated form) and ours."""

from collections.abc import Mapping
from typing import Any

from torch import Tensor

from plait.models.hub.rename import Rule, to_theirs
from plait.models.hub.rename import to_ours as renamed
from plait.models.hub.settings import activation_from, require
from plait.models.towers.seq2seq import Seq2SeqSizes
from plait.models.transformer import TransformerSizes

_FEED_FORWARD = {
    "relu": ("relu", False),
    "gated-gelu": ("gelu_new", True),
    "gated-silu": ("silu", True),
}


def rules(sizes: Seq2SeqSizes) -> tuple[Rule, ...]:
    """Renaming; a gated feed-forward network has one matrix more."""
    return (
        Rule(ours="embedding", theirs=("shared",)),
        *_stack("encoder", gated=sizes.transformer.gated),
        *_stack("decoder", gated=sizes.transformer.gated),
        Rule(ours="head", theirs=("lm_head",)),
    )


def _stack(side: str, *, gated: bool) -> tuple[Rule, ...]:
    layer, block = f"{side}.block.*.layer", f"{side}.blocks.*"
    last = 2 if side == "decoder" else 1
    inner = f"{layer}.{last}.DenseReluDense"
    bias = f"{side}.block.0.layer.0.SelfAttention.relative_attention_bias.weight"
    cross = (
        Rule(ours=f"{block}.cross.q", theirs=(f"{layer}.1.EncDecAttention.q",)),
        Rule(ours=f"{block}.cross.kv", theirs=(f"{layer}.1.EncDecAttention.k", f"{layer}.1.EncDecAttention.v")),
        Rule(ours=f"{block}.cross.out", theirs=(f"{layer}.1.EncDecAttention.o",)),
        Rule(ours=f"{block}.cross_part.norm", theirs=(f"{layer}.1.layer_norm",)),
    )
    return (
        Rule(ours=f"{side}_bias.table", theirs=(bias,)),
        Rule(ours=f"{block}.attention.qkv", theirs=tuple(f"{layer}.0.SelfAttention.{part}" for part in "qkv")),
        Rule(ours=f"{block}.attention.out", theirs=(f"{layer}.0.SelfAttention.o",)),
        Rule(ours=f"{block}.attention_part.norm", theirs=(f"{layer}.0.layer_norm",)),
        *(cross if side == "decoder" else ()),
        Rule(
            ours=f"{block}.feed_forward.up",
            theirs=(f"{inner}.wi_0", f"{inner}.wi_1") if gated else (f"{inner}.wi",),
        ),
        Rule(ours=f"{block}.feed_forward.down", theirs=(f"{inner}.wo",)),
        Rule(ours=f"{block}.feed_forward_part.norm", theirs=(f"{layer}.{last}.layer_norm",)),
        Rule(ours=f"{side}.norm", theirs=(f"{side}.final_layer_norm",)),
    )


def sizes_from(config: Mapping[str, Any]) -> Seq2SeqSizes:
    """Sizes of a ``config.json``.

    Raises:
        CheckpointError: It asks for something that ours has not.
    """
    require(config, {"model_type": "t5"})
    kind = config.get("feed_forward_proj", "relu")
    if kind not in _FEED_FORWARD:
        require(config, {"feed_forward_proj": "relu"})
    act, gated = _FEED_FORWARD[kind]
    return Seq2SeqSizes(
        transformer=TransformerSizes(
            d=config["d_model"],
            depth=config["num_layers"],
            heads=config["num_heads"],
            d_head=config["d_kv"],
            d_ff=config["d_ff"],
            norm="rms",
            eps=config["layer_norm_epsilon"],
            activation=activation_from(act),
            gated=gated,
            bias=False,
            scale=1.0,
            dropout=config["dropout_rate"],
            attention_dropout=config["dropout_rate"],
        ),
        vocabulary=config["vocab_size"],
        depth_decoder=config.get("num_decoder_layers") or 0,
        buckets=config["relative_attention_num_buckets"],
        furthest=config["relative_attention_max_distance"],
        tied=config.get("tie_word_embeddings", True),
        # Files of v1.1 say that the table is not shared, and mean this, too.
        scaled=config.get("scale_decoder_outputs", config.get("tie_word_embeddings", True)),
    )


def config_from(sizes: Seq2SeqSizes) -> dict[str, Any]:
    """The ``config.json`` of sizes.

    Raises:
        CheckpointError: The layout has no place for what these sizes ask for.
    """
    inner = sizes.transformer
    names = ("norm", "norm_place", "residual", "bias", "qk_norm", "layer_scale", "d_source", "scale", "kv_heads")
    plain = {"norm": "rms", "norm_place": "pre", "residual": True, "bias": False, "qk_norm": False, "kv_heads": 0}
    plain |= {"layer_scale": 0.0, "d_source": 0, "scale": 1.0, "attention_dropout": inner.dropout}
    given = {name: getattr(inner, name) for name in (*names, "attention_dropout")}
    require(given, plain, place="TransformerSizes")
    kinds = {(activation_from(act), gated): kind for kind, (act, gated) in _FEED_FORWARD.items()}
    kind = kinds.get((inner.activation, inner.gated))
    require({"feed_forward": kind}, {"feed_forward": kind or "relu"}, place="TransformerSizes")
    # transformers 5 shares the table in every T5 that it loads.
    require({"tied": sizes.tied}, {"tied": True}, place="Seq2SeqSizes")
    return {
        "architectures": ["T5ForConditionalGeneration"],
        "model_type": "t5",
        "d_model": inner.d,
        "num_layers": inner.depth,
        "num_decoder_layers": sizes.depth_decoder or inner.depth,
        "num_heads": inner.heads,
        "d_kv": inner.d_head or inner.d // inner.heads,
        "d_ff": inner.d_ff or 4 * inner.d,
        "layer_norm_epsilon": inner.eps,
        "feed_forward_proj": kind,
        "dropout_rate": inner.dropout,
        "vocab_size": sizes.vocabulary,
        "relative_attention_num_buckets": sizes.buckets,
        "relative_attention_max_distance": sizes.furthest,
        "tie_word_embeddings": sizes.scaled,
        "scale_decoder_outputs": sizes.scaled,
    }


def to_ours(state: Mapping[str, Tensor], sizes: Seq2SeqSizes, *, place: str = "") -> dict[str, Tensor]:
    """Weights of a file under our names.

    Raises:
        CheckpointError: Names have no place here.
    """
    repeated = ["encoder.embed_tokens.weight", "decoder.embed_tokens.weight"]  # old files hold the table three times
    tied = ["lm_head.weight"] if sizes.tied else []
    return renamed(state, rules(sizes), ignored=(*repeated, *tied), place=place)


def to_official(state: Mapping[str, Tensor], sizes: Seq2SeqSizes) -> dict[str, Tensor]:
    """Our weights under the names of a file.

    Raises:
        CheckpointError: Some have no name in this layout.
    """
    return to_theirs(state, rules(sizes), place="EncoderDecoder")
