"""wav2vec 2.0's layout of Hugging Face (``Wav2Vec2Model``, ``Wav2Vec2ForCTC``) and ours.

Whether sounds are normalized stands in ``preprocessor_config.json``, and how many frames pretraining masks is the
recipe's: :class:`~plait.models.towers.wav2vec.Wav2Vec` masks what it is told to and nothing by itself. Files of
``Wav2Vec2ForPreTraining`` hold a quantizer too: :func:`split` takes it off, ``pretraining_`` functions keep it.
"""

from collections.abc import Mapping
from typing import Any, NamedTuple

from torch import Tensor

from plait.core.errors import CheckpointError
from plait.models.hub.rename import Rule, to_theirs
from plait.models.hub.rename import to_ours as renamed
from plait.models.hub.settings import activation_from, activation_name, one_of, require, require_plain_blocks
from plait.models.towers.wav2vec import Wav2VecSizes
from plait.models.towers.wav2vec_pretraining import SpeechTaskSizes
from plait.models.transformer import TransformerSizes

_LAYER, _BLOCK = "wav2vec2.encoder.layers.*", "transformer.blocks.*"
_CONV = "wav2vec2.encoder.pos_conv_embed.conv"
_COMMON = (
    Rule(ours="convs.*.conv", theirs=("wav2vec2.feature_extractor.conv_layers.*.conv",)),
    Rule(ours="convs.*.norm", theirs=("wav2vec2.feature_extractor.conv_layers.*.layer_norm",)),
    Rule(ours="norm_features", theirs=("wav2vec2.feature_projection.layer_norm",)),
    Rule(ours="project", theirs=("wav2vec2.feature_projection.projection",)),
    Rule(ours="mask_token", theirs=("wav2vec2.masked_spec_embed",)),
    Rule(ours="position.gain", theirs=(f"{_CONV}.parametrizations.weight.original0",)),
    Rule(ours="position.direction", theirs=(f"{_CONV}.parametrizations.weight.original1",)),
    Rule(ours="position.gain", theirs=(f"{_CONV}.weight_g",)),  # of files from before torch 2.1
    Rule(ours="position.direction", theirs=(f"{_CONV}.weight_v",)),
    Rule(ours="position.bias", theirs=(f"{_CONV}.bias",)),
    Rule(
        ours=f"{_BLOCK}.attention.qkv",
        theirs=tuple(f"{_LAYER}.attention.{part}_proj" for part in ("q", "k", "v")),
    ),
    Rule(ours=f"{_BLOCK}.attention.out", theirs=(f"{_LAYER}.attention.out_proj",)),
    Rule(ours=f"{_BLOCK}.attention_part.norm", theirs=(f"{_LAYER}.layer_norm",)),
    Rule(ours=f"{_BLOCK}.feed_forward.up", theirs=(f"{_LAYER}.feed_forward.intermediate_dense",)),
    Rule(ours=f"{_BLOCK}.feed_forward.down", theirs=(f"{_LAYER}.feed_forward.output_dense",)),
    Rule(ours=f"{_BLOCK}.feed_forward_part.norm", theirs=(f"{_LAYER}.final_layer_norm",)),
    Rule(ours="head", theirs=("lm_head",)),
)
_TASK = (
    Rule(ours="quantizer.codes", theirs=("quantizer.codevectors",), leading=1),
    Rule(ours="quantizer.score", theirs=("quantizer.weight_proj",)),
    Rule(ours="predict", theirs=("project_hid",)),
    Rule(ours="target", theirs=("project_q",)),
)
_PRETRAINING = ("quantizer.", "project_hid.", "project_q.")
_NORM = "wav2vec2.encoder.layer_norm"
"""One name for two places: before the first block where norms come after, after the last one where they come first."""


class Parts(NamedTuple):
    """A file's weights: those of the tower, and those of pretraining's quantizer, under their published names."""

    tower: dict[str, Tensor]
    quantizer: dict[str, Tensor]


def sizes_from(config: Mapping[str, Any], *, normalize: bool = True) -> Wav2VecSizes:
    """Sizes of a ``config.json``.

    Args:
        config: Its content.
        normalize: ``do_normalize`` of the folder's ``preprocessor_config.json``.

    Raises:
        CheckpointError: It asks for something that :class:`~plait.models.towers.wav2vec.Wav2Vec` has not.
    """
    require(config, {"model_type": "wav2vec2", "feat_extract_activation": "gelu", "add_adapter": False})
    require(config, {"adapter_attn_dim": None, "num_feat_extract_layers": len(config["conv_dim"])})
    kinds = ("Wav2Vec2Model", "Wav2Vec2ForCTC", "Wav2Vec2ForPreTraining")
    named = {"architectures": (config.get("architectures") or kinds)[0]}
    ctc = one_of(named, "architectures", kinds, place="config.json") == "Wav2Vec2ForCTC"
    return Wav2VecSizes(
        transformer=TransformerSizes(
            d=config["hidden_size"],
            depth=config["num_hidden_layers"],
            heads=config["num_attention_heads"],
            d_ff=config["intermediate_size"],
            norm_place="pre" if config["do_stable_layer_norm"] else "post",
            eps=config["layer_norm_eps"],
            activation=activation_from(config["hidden_act"]),
            dropout=config["hidden_dropout"],
            inner_dropout=config["activation_dropout"],
            attention_dropout=config["attention_dropout"],
            layer_drop=config["layerdrop"],
        ),
        widths=tuple(config["conv_dim"]),
        kernels=tuple(config["conv_kernel"]),
        strides=tuple(config["conv_stride"]),
        conv_bias=config["conv_bias"],
        conv_norm=one_of(config, "feat_extract_norm", ("group", "layer"), place="config.json"),
        position_kernel=config["num_conv_pos_embeddings"],
        position_groups=config["num_conv_pos_embedding_groups"],
        feature_dropout=config["feat_proj_dropout"],
        final_dropout=config.get("final_dropout", 0.1) if ctc else 0.0,
        mask_token=config.get("mask_time_prob", 0.05) > 0 or config.get("mask_feature_prob", 0.0) > 0,
        vocabulary=config["vocab_size"] if ctc else 0,
        normalize=normalize,
    )


def config_from(sizes: Wav2VecSizes) -> dict[str, Any]:
    """The ``config.json`` of sizes.

    Raises:
        CheckpointError: The layout has no place for what these sizes ask for.
    """
    inner = sizes.transformer
    stable = inner.norm_place == "pre"
    require_plain_blocks(inner, norm_place="pre" if stable else "post", dropouts=True)
    require({"drop_path": inner.drop_path}, {"drop_path": 0.0}, place="TransformerSizes")
    return {
        "architectures": ["Wav2Vec2ForCTC" if sizes.vocabulary else "Wav2Vec2Model"],
        "model_type": "wav2vec2",
        "hidden_size": inner.d,
        "num_hidden_layers": inner.depth,
        "num_attention_heads": inner.heads,
        "intermediate_size": inner.d_ff or 4 * inner.d,
        "do_stable_layer_norm": stable,
        "layer_norm_eps": inner.eps,
        "hidden_act": activation_name(inner.activation),
        "hidden_dropout": inner.dropout,
        "activation_dropout": inner.dropout_inside,
        "attention_dropout": inner.attention_dropout,
        "layerdrop": inner.layer_drop,
        "conv_dim": list(sizes.widths),
        "conv_kernel": list(sizes.kernels),
        "conv_stride": list(sizes.strides),
        "num_feat_extract_layers": len(sizes.widths),
        "conv_bias": sizes.conv_bias,
        "feat_extract_norm": sizes.conv_norm,
        "feat_extract_activation": "gelu",
        "num_conv_pos_embeddings": sizes.position_kernel,
        "num_conv_pos_embedding_groups": sizes.position_groups,
        "feat_proj_dropout": sizes.feature_dropout,
        "mask_time_prob": 0.05 if sizes.mask_token else 0.0,  # transformers makes the vector where this is not 0
        "mask_feature_prob": 0.0,
    } | ({"vocab_size": sizes.vocabulary, "final_dropout": sizes.final_dropout} if sizes.vocabulary else {})


def split(state: Mapping[str, Tensor]) -> Parts:
    """The tower's weights of a file, and those of pretraining's quantizer."""
    quantizer = {name: value for name, value in state.items() if name.startswith(_PRETRAINING)}
    return Parts({name: value for name, value in state.items() if name not in quantizer}, quantizer)


def to_ours(state: Mapping[str, Tensor], sizes: Wav2VecSizes, *, place: str = "") -> dict[str, Tensor]:
    """Weights of the tower in a file under our names; a quantizer in it is :func:`split`'s.

    Raises:
        CheckpointError: Names have no place here, such as those of an adapter.
    """
    tower = split(state).tower
    bare = not any(name.startswith("wav2vec2.") for name in tower)
    named = {f"wav2vec2.{name}": value for name, value in tower.items()} if bare else tower
    return renamed(named, _rules(sizes), place=place)


def to_official(state: Mapping[str, Tensor], sizes: Wav2VecSizes) -> dict[str, Tensor]:
    """Our weights under the names of a file.

    Raises:
        CheckpointError: Some have no name in this layout.
    """
    named = to_theirs(state, _rules(sizes), place="Wav2Vec")
    if "lm_head.weight" in named:
        return named
    return {name.removeprefix("wav2vec2."): value for name, value in named.items()}


def pretraining_sizes_from(config: Mapping[str, Any]) -> SpeechTaskSizes:
    """Sizes of what pretraining adds, of a ``config.json``."""
    return SpeechTaskSizes(
        groups=config["num_codevector_groups"],
        codes=config["num_codevectors_per_group"],
        d_code=config["codevector_dim"],
        d_shared=config["proj_codevector_dim"],
        dropout=config["feat_quantizer_dropout"],
    )


def pretraining_config_from(sizes: Wav2VecSizes, task: SpeechTaskSizes) -> dict[str, Any]:
    """The ``config.json`` of a tower with what pretraining adds.

    Raises:
        CheckpointError: The layout has no place for what these sizes ask for.
    """
    require({"vocabulary": sizes.vocabulary}, {"vocabulary": 0}, place="Wav2VecSizes")
    return config_from(sizes) | {
        "architectures": ["Wav2Vec2ForPreTraining"],
        "num_codevector_groups": task.groups,
        "num_codevectors_per_group": task.codes,
        "codevector_dim": task.d_code,
        "proj_codevector_dim": task.d_shared,
        "feat_quantizer_dropout": task.dropout,
    }


def pretraining_to_ours(state: Mapping[str, Tensor], sizes: Wav2VecSizes, *, place: str = "") -> dict[str, Tensor]:
    """Weights of a file of ``Wav2Vec2ForPreTraining`` under our names, quantizer and all.

    Raises:
        CheckpointError: Names have no place here.
    """
    tower = {f"tower.{name}": value for name, value in to_ours(state, sizes, place=place).items()}
    return tower | renamed(split(state).quantizer, _TASK, place=place)


def pretraining_to_official(state: Mapping[str, Tensor], sizes: Wav2VecSizes) -> dict[str, Tensor]:
    """Our weights, tower and all, under the names of a file.

    Raises:
        CheckpointError: Some have no name in this layout.
    """
    own = {name.removeprefix("tower."): value for name, value in state.items() if name.startswith("tower.")}
    task = {name: value for name, value in state.items() if not name.startswith("tower.")}
    tower = {f"wav2vec2.{name}": value for name, value in to_official(own, sizes).items()}
    return tower | to_theirs(task, _TASK, place="Wav2VecPretraining")


def _rules(sizes: Wav2VecSizes) -> tuple[Rule, ...]:
    match sizes.transformer.norm_place:
        case "post":
            return (*_COMMON, Rule(ours="norm_first", theirs=(_NORM,)))
        case "pre":
            return (*_COMMON, Rule(ours="transformer.norm", theirs=(_NORM,)))
        case place:
            raise CheckpointError(
                f"norm_place is {place!r}, expected 'pre' or 'post'",
                place="TransformerSizes: norm_place",
                remedy="save the tower in our own form",
            )
