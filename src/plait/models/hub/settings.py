"""Settings of published configurations, taken or refused: a setting that is not understood is never passed over."""

import dataclasses
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

from plait.core.errors import CheckpointError
from plait.models.transformer import Activation, TransformerSizes

_ACTIVATIONS: dict[str, Activation] = {
    "gelu": "gelu",
    "gelu_new": "gelu_tanh",
    "gelu_pytorch_tanh": "gelu_tanh",
    "quick_gelu": "quick_gelu",
    "relu": "relu",
    "silu": "silu",
}


_READING = "load the model as a pretrained tower, which runs the library's own code"
_WRITING = "save the model in our own form: this layout has no place for it"


def require(given: Mapping[str, Any], wanted: Mapping[str, Any], *, place: str = "config.json") -> None:
    """Refuse settings that cannot be honored.

    Args:
        given: Of a published configuration, or our sizes.
        wanted: The only value of each that can be honored; also what a missing setting means.
        place: What they are of.

    Raises:
        CheckpointError: Names every setting that differs, what came and what was expected.
    """
    wrong = {name: value for name, value in wanted.items() if given.get(name, value) != value}
    if wrong:
        raise CheckpointError(
            "; ".join(f"{name} is {given[name]!r}, expected {value!r}" for name, value in wrong.items()),
            place=f"{place}: {next(iter(wrong))}",
            remedy=_WRITING if place.endswith("Sizes") else _READING,
        )


def activation_from(name: str, *, place: str = "config.json") -> Activation:
    """Our name of a published activation.

    Raises:
        CheckpointError: Ours has not got it.
    """
    if name not in _ACTIVATIONS:
        raise CheckpointError(
            f"the activation is {name!r}, expected one of {', '.join(_ACTIVATIONS)}",
            place=f"{place}: hidden_act",
            remedy=_READING,
        )
    return _ACTIVATIONS[name]


def activation_name(activation: Activation) -> str:
    """The published name of ours."""
    return next(name for name, ours in _ACTIVATIONS.items() if ours == activation)


def blocks_from(config: Mapping[str, Any]) -> TransformerSizes:
    """Blocks of a ``config.json`` that names their settings as BERT, ViT and VideoMAE do."""
    return TransformerSizes(
        d=config["hidden_size"],
        depth=config["num_hidden_layers"],
        heads=config["num_attention_heads"],
        d_ff=config["intermediate_size"],
        eps=config["layer_norm_eps"],
        activation=activation_from(config["hidden_act"]),
        dropout=config["hidden_dropout_prob"],
        attention_dropout=config["attention_probs_dropout_prob"],
    )


def blocks_record(blocks: TransformerSizes) -> dict[str, Any]:
    """What :func:`blocks_from` reads."""
    return {
        "hidden_size": blocks.d,
        "num_hidden_layers": blocks.depth,
        "num_attention_heads": blocks.heads,
        "intermediate_size": blocks.d_ff or 4 * blocks.d,
        "layer_norm_eps": blocks.eps,
        "hidden_act": activation_name(blocks.activation),
        "hidden_dropout_prob": blocks.dropout,
        "attention_probs_dropout_prob": blocks.attention_dropout,
    }


def require_same(sizes: Any, again: Any, *, besides: Sequence[str] = ()) -> None:
    """Refuse sizes that a layout does not give back: what it has no place for would be lost without a word.

    Args:
        sizes: What was to be written.
        again: What is read from what was written.
        besides: Fields that belong elsewhere, or only to training, and may be lost.

    Raises:
        CheckpointError: Names every field that differs.
    """
    differ = {
        name: (value, other)
        for (name, value), (_, other) in zip(_fields(sizes), _fields(again), strict=True)
        if value != other and name.rpartition(".")[2] not in besides
    }
    if differ:
        raise CheckpointError(
            "; ".join(f"{name} is {value!r}, this layout has {other!r}" for name, (value, other) in differ.items()),
            place=f"{type(sizes).__name__}: {next(iter(differ))}",
            remedy=_WRITING,
        )


def _fields(sizes: Any) -> Iterator[tuple[str, Any]]:
    """Every number of sizes by its path, with 0 and None as what they stand for."""
    for field in dataclasses.fields(sizes):
        value = getattr(sizes, field.name)
        if dataclasses.is_dataclass(value):
            yield from ((f"{field.name}.{name}", inner) for name, inner in _fields(value))
        elif isinstance(sizes, TransformerSizes):
            stands = {
                "d_ff": sizes.d_ff or 4 * sizes.d,
                "kv_heads": sizes.kv_heads or sizes.heads,
                "d_head": sizes.d_head or sizes.d // sizes.heads,
                "qkv_bias": sizes.bias if sizes.qkv_bias is None else sizes.qkv_bias,
                "inner_dropout": sizes.dropout_inside,
            }
            yield field.name, stands.get(field.name, value)
        elif field.name == "final_norm":
            yield field.name, sizes.transformer.norm_place == "pre" if value is None else value
        else:
            yield field.name, value


@contextmanager
def understood(layout: str) -> Iterator[None]:
    """Let a configuration that lacks a setting, or has one of another type, be named as such; a decorator, too.

    Raises:
        CheckpointError: A setting is missing or of another type.
    """
    try:
        yield
    except (KeyError, TypeError) as error:
        what = f"{error} is missing" if isinstance(error, KeyError) else f"a setting is of another type: {error}"
        raise CheckpointError(what, place=f"config.json of {layout}", remedy="use an undamaged copy") from error


def require_plain_blocks(
    inner: TransformerSizes, *, norm_place: str = "pre", key_bias: bool = True, dropouts: bool = False
) -> None:
    """See that blocks are the plain ones of ViT, CLIP, BERT and GPT-2.

    Args:
        inner: The blocks.
        norm_place: Where the layout has its norms.
        key_bias: Whether the layout has a bias of keys.
        dropouts: Whether it has a dropout inside the feed-forward, and of whole layers, of its own.

    Raises:
        CheckpointError: They are not; names the first difference.
    """
    names = ("norm", "norm_place", "residual", "gated", "bias", "qk_norm", "layer_scale", "d_source", "scale")
    given = {name: getattr(inner, name) for name in names}
    given |= {"kv_heads": inner.kv_heads or inner.heads, "d_head": inner.d_head or inner.d // inner.heads}
    plain = {"norm": "layer", "residual": True, "gated": False, "bias": True, "qk_norm": False, "layer_scale": 0.0}
    require(
        given,
        {
            **plain,
            "norm_place": norm_place,
            "d_source": 0,
            "scale": 0.0,
            "kv_heads": inner.heads,
            "d_head": inner.d // inner.heads,
        },
        place="TransformerSizes",
    )
    given = {"qkv_bias": inner.qkv_bias is not False, "key_bias": inner.key_bias}
    require(given, {"qkv_bias": True, "key_bias": key_bias}, place="TransformerSizes")
    if not dropouts:
        given = {"inner_dropout": inner.inner_dropout, "layer_drop": inner.layer_drop}
        require(given, {"inner_dropout": None, "layer_drop": 0.0}, place="TransformerSizes")


def one_of(config: Mapping[str, Any], key: str, allowed: Sequence[Any], *, place: str) -> Any:
    """A setting that may have one of some values; the first one is what a missing setting means.

    Raises:
        CheckpointError: It has another value; says which there are.
    """
    value = config.get(key, allowed[0])
    if value not in allowed:
        raise CheckpointError(
            f"{key} is {value!r}, expected one of {', '.join(map(repr, allowed))}",
            place=f"{place}: {key}",
            remedy=_READING,
        )
    return value


def square(config: Mapping[str, Any], key: str, default: int, *, place: str) -> int:
    """A setting in pixels a side, which may be written as two equal numbers.

    Raises:
        CheckpointError: The two differ.
    """
    value = config.get(key, default)
    rows, columns = (value, value) if isinstance(value, int) else value
    if rows != columns:
        raise CheckpointError(
            f"{key} is {rows} x {columns}, expected a square",
            place=f"{place}: {key}",
            remedy=_READING,
        )
    return rows


def labels(config: Mapping[str, Any]) -> int:
    """Classes of the classifier: 0 unless the config is of a model with one.

    ``id2label`` counts them; transformers does not write it where there are two.
    """
    if not any("ForImageClassification" in name for name in config.get("architectures") or ()):
        return 0
    return len(config["id2label"]) if config.get("id2label") else int(config.get("num_labels", 2))


def labeled(name: str, num_classes: int) -> dict[str, Any]:
    """The part of a config that says which class of transformers has this form: bare model, or with a classifier.

    Args:
        name: Of the family, such as ``Swin``.
        num_classes: Of the classifier; 0: none.
    """
    if not num_classes:
        return {"architectures": [f"{name}Model"]}
    names = {str(i): f"LABEL_{i}" for i in range(num_classes)}
    return {
        "architectures": [f"{name}ForImageClassification"],
        "id2label": names,
        "label2id": {label: int(i) for i, label in names.items()},
    }
