"""Settings of published configurations, taken or refused: a setting that is not understood is never passed over."""

from collections.abc import Mapping
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


def expect(given: Mapping[str, Any], *, place: str = "config.json", **wanted: object) -> None:
    """See that settings have the one value that can be honored; one that is missing has the default, which is it.

    Raises:
        CheckpointError: One has not; names it, what came and what was expected.
    """
    for name, value in wanted.items():
        if name in given and given[name] != value:
            raise CheckpointError(
                f"{name} is {given[name]!r}, expected {value!r}",
                place=f"{place}: {name}",
                remedy=_READING if place.startswith("config.json") else _WRITING,
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


def expect_plain_blocks(inner: TransformerSizes, *, norm_place: str = "pre") -> None:
    """See that blocks are the plain ones of ViT, CLIP, BERT and GPT-2.

    Raises:
        CheckpointError: They are not; names the first difference.
    """
    names = ("norm", "norm_place", "residual", "gated", "bias", "qk_norm", "layer_scale", "d_source", "scale")
    given = {name: getattr(inner, name) for name in names}
    given |= {"kv_heads": inner.kv_heads or inner.heads, "d_head": inner.d_head or inner.d // inner.heads}
    plain = {"norm": "layer", "residual": True, "gated": False, "bias": True, "qk_norm": False, "layer_scale": 0.0}
    expect(
        given,
        place="TransformerSizes",
        **plain,
        norm_place=norm_place,
        d_source=0,
        scale=0.0,
        kv_heads=inner.heads,
        d_head=inner.d // inner.heads,
    )
    expect({"qkv_bias": inner.qkv_bias is not False}, place="TransformerSizes", qkv_bias=True)
