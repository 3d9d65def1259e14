"""BERT's layout of Hugging Face (``BertModel``, ``BertForMaskedLM``; also ``LayoutLMModel``) and ours."""

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from torch import Tensor

from plait.models.hub.rename import Rule, to_theirs
from plait.models.hub.rename import to_ours as renamed
from plait.models.hub.settings import blocks_from, blocks_record, require, require_same, understood
from plait.models.towers.text_transformer import TextSizes

_LAYOUT = "layoutlm"
_LAYER, _BLOCK = "bert.encoder.layer.*", "transformer.blocks.*"
RULES = (
    Rule(ours="embedding", theirs=("bert.embeddings.word_embeddings",)),
    Rule(ours="position.table", theirs=("bert.embeddings.position_embeddings.weight",)),
    Rule(ours="types", theirs=("bert.embeddings.token_type_embeddings",)),
    *(
        Rule(ours=f"box.{ours}", theirs=(f"bert.embeddings.{theirs}_position_embeddings",))
        for ours, theirs in (("x", "x"), ("y", "y"), ("height", "h"), ("width", "w"))
    ),
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
"""With the prefix ``bert.`` that models with a head have (LayoutLM's: ``layoutlm.``); bare models are saved without."""
_REPEATED = ("cls.predictions.decoder.weight", "cls.predictions.decoder.bias", "bert.embeddings.position_ids")
"""Old files hold the tied output layer, and the numbers 0, 1, 2 .., too."""


@understood("BERT")
def sizes_from(config: Mapping[str, Any]) -> TextSizes:
    """Sizes of a ``config.json``.

    Raises:
        CheckpointError: It asks for something that ours has not.
    """
    layout = config["model_type"] == _LAYOUT
    wanted = {"pad_token_id": 0, "tie_word_embeddings": True}
    if not layout:
        wanted |= {"model_type": "bert", "is_decoder": False, "add_cross_attention": False}
        wanted |= {"position_embedding_type": "absolute"}
    require(config, wanted)
    masked = bool({"BertForMaskedLM", "LayoutLMForMaskedLM"} & set(config.get("architectures") or ()))
    return TextSizes(
        transformer=replace(blocks_from(config), norm_place="post"),
        vocabulary=config["vocab_size"],
        max_tokens=config["max_position_embeddings"],
        types=config["type_vocab_size"],
        page=config["max_2d_position_embeddings"] if layout else 0,
        norm_embedding=True,
        pooler=layout or not masked,
        masked_head=masked,
    )


def config_from(sizes: TextSizes) -> dict[str, Any]:
    """The ``config.json`` of sizes.

    Raises:
        CheckpointError: The layout has no place for what these sizes ask for.
    """
    inner = sizes.transformer
    family = "LayoutLM" if sizes.page else "Bert"
    record = {
        "architectures": [f"{family}ForMaskedLM" if sizes.masked_head else f"{family}Model"],
        "model_type": family.lower(),
        **blocks_record(inner),
        "vocab_size": sizes.vocabulary,
        "max_position_embeddings": sizes.max_tokens,
        "type_vocab_size": sizes.types,
        "pad_token_id": 0,
    } | ({"max_2d_position_embeddings": sizes.page} if sizes.page else {})
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
    prefix = next((p for p in ("bert.", f"{_LAYOUT}.") if any(name.startswith(p) for name in state)), "")
    named = {
        f"bert.{name.removeprefix(prefix)}" if name.startswith(prefix) else name: value for name, value in state.items()
    }
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
    prefix = "" if "cls.predictions.bias" not in named else f"{_LAYOUT}." if "box.x.weight" in state else "bert."
    return {
        prefix + name.removeprefix("bert.") if name.startswith("bert.") else name: value
        for name, value in named.items()
    }
