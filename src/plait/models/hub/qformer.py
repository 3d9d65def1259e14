"""The Q-Former of Hugging Face's BLIP-2 layout (``Blip2QFormerModel`` and the queries beside it) and ours."""

from collections.abc import Mapping
from typing import Any

from torch import Tensor

from plait.models.connectors.query import QFormerSizes
from plait.models.hub.rename import Rule, to_theirs
from plait.models.hub.rename import to_ours as renamed
from plait.models.hub.settings import require

_LAYER, _BLOCK = "qformer.encoder.layer.*", "blocks.*"
_CROSS = f"{_LAYER}.crossattention"
RULES = (
    Rule(ours="queries", theirs=("query_tokens",), leading=1),
    Rule(ours="embedding", theirs=("embeddings.word_embeddings",)),
    Rule(ours="position.table", theirs=("embeddings.position_embeddings.weight",)),
    Rule(ours="norm", theirs=("qformer.layernorm",)),
    Rule(
        ours=f"{_BLOCK}.attention.qkv",
        theirs=tuple(f"{_LAYER}.attention.attention.{part}" for part in ("query", "key", "value")),
    ),
    Rule(ours=f"{_BLOCK}.attention.out", theirs=(f"{_LAYER}.attention.output.dense",)),
    Rule(ours=f"{_BLOCK}.attention_part.norm", theirs=(f"{_LAYER}.attention.output.LayerNorm",)),
    Rule(ours=f"{_BLOCK}.cross.q", theirs=(f"{_CROSS}.attention.query",)),
    Rule(ours=f"{_BLOCK}.cross.kv", theirs=(f"{_CROSS}.attention.key", f"{_CROSS}.attention.value")),
    Rule(ours=f"{_BLOCK}.cross.out", theirs=(f"{_CROSS}.output.dense",)),
    Rule(ours=f"{_BLOCK}.cross_part.norm", theirs=(f"{_CROSS}.output.LayerNorm",)),
    Rule(ours=f"{_BLOCK}.feed_forward.up", theirs=(f"{_LAYER}.intermediate_query.dense",)),
    Rule(ours=f"{_BLOCK}.feed_forward.down", theirs=(f"{_LAYER}.output_query.dense",)),
    Rule(ours=f"{_BLOCK}.feed_forward_part.norm", theirs=(f"{_LAYER}.output_query.LayerNorm",)),
    Rule(ours=f"{_BLOCK}.text_feed_forward.up", theirs=(f"{_LAYER}.intermediate.dense",)),
    Rule(ours=f"{_BLOCK}.text_feed_forward.down", theirs=(f"{_LAYER}.output.dense",)),
    Rule(ours=f"{_BLOCK}.text_part.norm", theirs=(f"{_LAYER}.output.LayerNorm",)),
    Rule(ours="out", theirs=("language_projection",)),
)
"""With the prefix ``qformer.`` that whole models have."""


def sizes_from(config: Mapping[str, Any], *, queries: int) -> QFormerSizes:
    """Sizes of the ``qformer_config`` of a ``config.json``.

    Args:
        config: That part.
        queries: ``num_query_tokens`` of the whole.

    Raises:
        CheckpointError: It asks for something that ours has not.
    """
    require(config, {"model_type": "blip_2_qformer", "hidden_act": "gelu", "layer_norm_eps": 1e-12})
    require(config, {"attention_probs_dropout_prob": config["hidden_dropout_prob"]})
    return QFormerSizes(
        d_source=config["encoder_hidden_size"],
        d=config["hidden_size"],
        depth=config["num_hidden_layers"],
        heads=config["num_attention_heads"],
        d_ff=config["intermediate_size"],
        queries=queries,
        every=config["cross_attention_frequency"],
        vocabulary=config["vocab_size"] if config["use_qformer_text_input"] else 0,
        max_tokens=config["max_position_embeddings"],
        dropout=config["hidden_dropout_prob"],
    )


def to_ours(state: Mapping[str, Tensor], *, place: str = "") -> dict[str, Tensor]:
    """Weights under our names; only names of the Q-Former, its queries, its words and its projection may come.

    Raises:
        CheckpointError: Names have no place here.
    """
    return renamed(state, RULES, ignored=("embeddings.position_ids",), place=place)


def to_official(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Our weights under the names of a file.

    Raises:
        CheckpointError: Some have no name in this layout.
    """
    return to_theirs(state, RULES, place="QFormer")
