"""BERT's layout of Hugging Face (``BertModel``, ``BertForMaskedLM``) and ours."""

from collections.abc import Mapping
from typing import Any

from torch import Tensor

from plait.models.hub.rename import Rule, to_theirs
from plait.models.hub.rename import to_ours as renamed
from plait.models.hub.settings import activation_from, activation_name, require, require_same, understood
from plait.models.towers.text_transformer import TextSizes
from plait.models.transformer import TransformerSizes

_LAYER, _BLOCK = "bert.encoder.layer.*", "transformer.blocks.*"
RULES = (
    Rule(ours="embedding", theirs=("bert.embeddings.word_embeddings",)),
    Rule(ours="position.table", theirs=("bert.embeddings.position_embeddings.weight",)),
    Rule(ours="types", theirs=("bert.embeddings.token_type_embeddings",)),
    Rule(ours="norm_embedding", theirs=("bert.embeddings.LayerNorm",)),
    Rule(
        ours=f"{_BLOCK}.attention.qkv",
        theirs=tuple(f"{_LAYER}.attention.self.{part}" for part in ("query", "key", "value")),
    ),
    Rule(ours=f"{_BLOCK}.attention.out", theirs=(f"{_LAYER}.attention.output.dense",)),
    Rule(ours=f"{_BLOCK}.attention_part.norm", theirs=(f"{_LAYER}.attention.output.LayerNorm",)),
    Rule(ours=f"{_BLOCK}.feed_forward.up", theirs=(f"{_LAYER}.intermediate.dense",)),
    Rule(ours=f"{_BLOCK}.feed_forward.down", theirs=(f"{_LAYER}.output.dense",)),
    Rule(ours=f"{_BLOCK}.feed_forward_part.norm", theirs=(f"{_LAYER}.output.LayerNorm",)),
    Rule(ours="pooler.0", theirs=("bert.pooler.dense",)),
    Rule(ours="masked.dense", theirs=("cls.predictions.transform.dense",)),
    Rule(ours="masked.norm", theirs=("cls.predictions.transform.LayerNorm",)),
    Rule(ours="masked.bias", theirs=("cls.predictions.bias",)),
)
"""With the prefix ``bert.`` that models with a head have; a bare ``BertModel`` is saved without it."""
_REPEATED = ("cls.predictions.decoder.weight", "cls.predictions.decoder.bias", "bert.embeddings.position_ids")
"""Old files hold the tied output layer, and the numbers 0, 1, 2 .., too."""


@understood("BERT")
def sizes_from(config: Mapping[str, Any]) -> TextSizes:
    """Sizes of a ``config.json``.

    Raises:
        CheckpointError: It asks for something that ours has not.
    """
    require(
        config, {"model_type": "bert", "is_decoder": False, "add_cross_attention": False, "tie_word_embeddings": True}
    )
    require(config, {"position_embedding_type": "absolute", "pad_token_id": 0})
    masked = "BertForMaskedLM" in (config.get("architectures") or ())
    return TextSizes(
        transformer=TransformerSizes(
            d=config["hidden_size"],
            depth=config["num_hidden_layers"],
            heads=config["num_attention_heads"],
            d_ff=config["intermediate_size"],
            norm_place="post",
            eps=config["layer_norm_eps"],
            activation=activation_from(config["hidden_act"]),
            dropout=config["hidden_dropout_prob"],
            attention_dropout=config["attention_probs_dropout_prob"],
        ),
        vocabulary=config["vocab_size"],
        max_tokens=config["max_position_embeddings"],
        types=config["type_vocab_size"],
        norm_embedding=True,
        pooler=not masked,
        masked_head=masked,
    )


def config_from(sizes: TextSizes) -> dict[str, Any]:
    """The ``config.json`` of sizes.

    Raises:
        CheckpointError: The layout has no place for what these sizes ask for.
    """
    inner = sizes.transformer
    record = {
        "architectures": ["BertForMaskedLM" if sizes.masked_head else "BertModel"],
        "model_type": "bert",
        "hidden_size": inner.d,
        "num_hidden_layers": inner.depth,
        "num_attention_heads": inner.heads,
        "intermediate_size": inner.d_ff or 4 * inner.d,
        "layer_norm_eps": inner.eps,
        "hidden_act": activation_name(inner.activation),
        "hidden_dropout_prob": inner.dropout,
        "attention_probs_dropout_prob": inner.attention_dropout,
        "vocab_size": sizes.vocabulary,
        "max_position_embeddings": sizes.max_tokens,
        "type_vocab_size": sizes.types,
        "pad_token_id": 0,
    }
    require_same(sizes, sizes_from(record), besides=("drop_path",))
    return record


def to_ours(
    state: Mapping[str, Tensor], sizes: TextSizes | None = None, *, drop_heads: bool = False, place: str = ""
) -> dict[str, Tensor]:
    """Weights of a file under our names; norms may have their first names, ``gamma`` and ``beta``.

    Args:
        state: Of the file.
        sizes: What is to be filled, where heads are dropped.
        drop_heads: Leave out heads that the sizes have not: files of pretraining hold one for the next sentence, too.
        place: File or folder, for errors.

    Raises:
        CheckpointError: Names have no place here, such as those of a next-sentence head.
    """
    bare = not any(name.startswith("bert.") for name in state)
    named = {f"bert.{name}" if bare else name: value for name, value in state.items()}
    for old, new in ((".gamma", ".weight"), (".beta", ".bias")):
        named = {name.removesuffix(old) + new if name.endswith(old) else name: v for name, v in named.items()}
    if drop_heads:
        wanted = [] if sizes is None or sizes.masked_head else ["cls.predictions."]
        wanted += [] if sizes is None or sizes.pooler else ["bert.pooler."]
        named = {n: v for n, v in named.items() if not n.startswith(("cls.seq_relationship.", *wanted))}
    return renamed(named, RULES, ignored=_REPEATED, place=place)


def to_official(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Our weights under the names of a file.

    Raises:
        CheckpointError: Some have no name in this layout.
    """
    named = to_theirs(state, RULES, place="TextTransformer")
    if "cls.predictions.bias" in named:
        return named
    return {name.removeprefix("bert."): value for name, value in named.items()}
