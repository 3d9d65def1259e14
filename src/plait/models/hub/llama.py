"""LLaMA's layout of Hugging Face (``LlamaForCausalLM``, which SmolLM2 has) and ours."""

from collections.abc import Mapping
from typing import Any

from torch import Tensor

from plait.models.hub.rename import Rule, to_theirs
from plait.models.hub.rename import to_ours as renamed
from plait.models.hub.settings import activation_from, activation_name, require, require_same, understood
from plait.models.towers.text_transformer import TextSizes
from plait.models.transformer import TransformerSizes

_LAYER, _BLOCK = "model.layers.*", "transformer.blocks.*"


def rules(sizes: TextSizes) -> tuple[Rule, ...]:
    """Renaming; how much of the joined matrix are keys and values depends on the heads."""
    heads = sizes.transformer.heads
    keys = sizes.transformer.kv_heads or heads
    return (
        Rule(ours="embedding", theirs=("model.embed_tokens",)),
        Rule(
            ours=f"{_BLOCK}.attention.qkv",
            theirs=tuple(f"{_LAYER}.self_attn.{part}_proj" for part in "qkv"),
            shares=(heads, keys, keys),
        ),
        Rule(ours=f"{_BLOCK}.attention.out", theirs=(f"{_LAYER}.self_attn.o_proj",)),
        Rule(ours=f"{_BLOCK}.attention_part.norm", theirs=(f"{_LAYER}.input_layernorm",)),
        Rule(ours=f"{_BLOCK}.feed_forward.up", theirs=(f"{_LAYER}.mlp.gate_proj", f"{_LAYER}.mlp.up_proj")),
        Rule(ours=f"{_BLOCK}.feed_forward.down", theirs=(f"{_LAYER}.mlp.down_proj",)),
        Rule(ours=f"{_BLOCK}.feed_forward_part.norm", theirs=(f"{_LAYER}.post_attention_layernorm",)),
        Rule(ours="transformer.norm", theirs=("model.norm",)),
        Rule(ours="head", theirs=("lm_head",)),
    )


@understood("LLaMA")
def sizes_from(config: Mapping[str, Any]) -> TextSizes:
    """Sizes of a ``config.json``.

    Raises:
        CheckpointError: It asks for something that ours has not, such as stretched rotations.
    """
    require(config, {"model_type": "llama", "attention_bias": False, "mlp_bias": False, "rope_scaling": None})
    rope = config.get("rope_parameters") or {}
    require(rope, {"rope_type": "default"}, place="config.json: rope_parameters")
    heads = config["num_attention_heads"]
    return TextSizes(
        transformer=TransformerSizes(
            d=config["hidden_size"],
            depth=config["num_hidden_layers"],
            heads=heads,
            kv_heads=config.get("num_key_value_heads") or heads,
            d_head=config.get("head_dim") or 0,
            d_ff=config["intermediate_size"],
            norm="rms",
            eps=config["rms_norm_eps"],
            activation=activation_from(config["hidden_act"]),
            gated=True,
            bias=False,
            attention_dropout=config.get("attention_dropout", 0.0),
        ),
        vocabulary=config["vocab_size"],
        causal=True,
        position="rope",
        rope_base=float(rope.get("rope_theta", config.get("rope_theta", 10_000.0))),
        max_tokens=config["max_position_embeddings"],
        pool="last",
        tied=config.get("tie_word_embeddings", False),
        head=True,
    )


def config_from(sizes: TextSizes) -> dict[str, Any]:
    """The ``config.json`` of sizes.

    Raises:
        CheckpointError: The layout has no place for what these sizes ask for.
    """
    inner = sizes.transformer
    record = {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "hidden_size": inner.d,
        "num_hidden_layers": inner.depth,
        "num_attention_heads": inner.heads,
        "num_key_value_heads": inner.kv_heads or inner.heads,
        "head_dim": inner.d_head or inner.d // inner.heads,
        "intermediate_size": inner.d_ff or 4 * inner.d,
        "rms_norm_eps": inner.eps,
        "hidden_act": activation_name(inner.activation),
        "attention_dropout": inner.attention_dropout,
        "rope_parameters": {"rope_type": "default", "rope_theta": sizes.rope_base},
        "vocab_size": sizes.vocabulary,
        "max_position_embeddings": sizes.max_tokens,
        "tie_word_embeddings": sizes.tied,
        "bos_token_id": None,
        "eos_token_id": sizes.end,
    }
    require_same(sizes, sizes_from(record), besides=("drop_path", "end"))
    return record


def to_ours(state: Mapping[str, Tensor], sizes: TextSizes, *, place: str = "") -> dict[str, Tensor]:
    """Weights of a file under our names.

    Raises:
        CheckpointError: Names have no place here.
    """
    tied = ("lm_head.weight",) if sizes.tied else ()
    return renamed(state, rules(sizes), ignored=(*tied, "model.layers.*.self_attn.rotary_emb.inv_freq"), place=place)


def to_official(state: Mapping[str, Tensor], sizes: TextSizes) -> dict[str, Tensor]:
    """Our weights under the names of a file.

    Raises:
        CheckpointError: Some have no name in this layout.
    """
    return to_theirs(state, rules(sizes), place="TextTransformer")
