"""GPT-2's layout of Hugging Face (``GPT2LMHeadModel``) and ours; its matrices are stored as ``in out``."""

from collections.abc import Mapping
from typing import Any

from torch import Tensor

from plait.models.hub.rename import Rule, to_theirs
from plait.models.hub.rename import to_ours as renamed
from plait.models.hub.settings import activation_from, activation_name, require, require_same, understood
from plait.models.towers.text_transformer import TextSizes
from plait.models.transformer import TransformerSizes

_LAYER, _BLOCK = "transformer.h.*", "transformer.blocks.*"
RULES = (
    Rule(ours="embedding", theirs=("transformer.wte",)),
    Rule(ours="position.table", theirs=("transformer.wpe.weight",)),
    Rule(ours=f"{_BLOCK}.attention.qkv", theirs=(f"{_LAYER}.attn.c_attn",), transposed=True),
    Rule(ours=f"{_BLOCK}.attention.out", theirs=(f"{_LAYER}.attn.c_proj",), transposed=True),
    Rule(ours=f"{_BLOCK}.attention_part.norm", theirs=(f"{_LAYER}.ln_1",)),
    Rule(ours=f"{_BLOCK}.feed_forward.up", theirs=(f"{_LAYER}.mlp.c_fc",), transposed=True),
    Rule(ours=f"{_BLOCK}.feed_forward.down", theirs=(f"{_LAYER}.mlp.c_proj",), transposed=True),
    Rule(ours=f"{_BLOCK}.feed_forward_part.norm", theirs=(f"{_LAYER}.ln_2",)),
    Rule(ours="transformer.norm", theirs=("transformer.ln_f",)),
)
_REPEATED = ("lm_head.weight", "transformer.h.*.attn.bias", "transformer.h.*.attn.masked_bias")
"""Old files hold the tied output layer, and the causal mask of every layer, too."""


@understood("GPT-2")
def sizes_from(config: Mapping[str, Any]) -> TextSizes:
    """Sizes of a ``config.json``.

    Raises:
        CheckpointError: It asks for something that ours has not.
    """
    require(
        config,
        {"model_type": "gpt2", "add_cross_attention": False, "tie_word_embeddings": True, "scale_attn_weights": True},
    )
    require(config, {"scale_attn_by_inverse_layer_idx": False, "reorder_and_upcast_attn": False})
    dropout = config.get("resid_pdrop", 0.1)
    require(config, {"embd_pdrop": dropout})
    return TextSizes(
        transformer=TransformerSizes(
            d=config["n_embd"],
            depth=config["n_layer"],
            heads=config["n_head"],
            d_ff=config.get("n_inner") or 0,
            eps=config["layer_norm_epsilon"],
            activation=activation_from(config["activation_function"]),
            dropout=dropout,
            attention_dropout=config.get("attn_pdrop", 0.1),
        ),
        vocabulary=config["vocab_size"],
        causal=True,
        max_tokens=config["n_positions"],
        pool="last",
        head=True,
    )


def config_from(sizes: TextSizes) -> dict[str, Any]:
    """The ``config.json`` of sizes.

    Raises:
        CheckpointError: The layout has no place for what these sizes ask for.
    """
    inner = sizes.transformer
    record = {
        "architectures": ["GPT2LMHeadModel"],
        "model_type": "gpt2",
        "n_embd": inner.d,
        "n_layer": inner.depth,
        "n_head": inner.heads,
        "n_inner": inner.d_ff or None,
        "layer_norm_epsilon": inner.eps,
        "activation_function": "gelu_new" if inner.activation == "gelu_tanh" else activation_name(inner.activation),
        "resid_pdrop": inner.dropout,
        "embd_pdrop": inner.dropout,
        "attn_pdrop": inner.attention_dropout,
        "vocab_size": sizes.vocabulary,
        "n_positions": sizes.max_tokens,
        "bos_token_id": None,
        "eos_token_id": sizes.end,
    }
    require_same(sizes, sizes_from(record), besides=("drop_path", "end"))
    return record


def to_ours(state: Mapping[str, Tensor], *, place: str = "") -> dict[str, Tensor]:
    """Weights of a file under our names.

    Raises:
        CheckpointError: Names have no place here.
    """
    bare = not any(name.startswith("transformer.") for name in state)  # GPT2Model, and OpenAI's own file
    named = {f"transformer.{name}": value for name, value in state.items()} if bare else state
    return renamed(named, RULES, ignored=_REPEATED, place=place)


def to_official(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Our weights under the names of a file.

    Raises:
        CheckpointError: Some have no name in this layout.
    """
    return to_theirs(state, RULES, place="TextTransformer")
