"""Settings of published configurations, taken or refused: a setting that is not understood is never passed over."""

from collections.abc import Mapping, Sequence
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
