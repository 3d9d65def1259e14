"""ResNet in Hugging Face's layout (``ResNetModel``, ``ResNetForImageClassification``), both ways."""

from collections.abc import Mapping
from typing import Any

from torch import Tensor

from plait.models.hub.rename import Rule
from plait.models.hub.rename import to_ours as renamed
from plait.models.hub.rename import to_theirs as renamed_back
from plait.models.hub.settings import labeled, labels, one_of, require
from plait.models.towers.resnet import ResNetSizes

_HEAD = "classifier.1"
_PREFIX = "resnet."
_FIXED = {
    "num_channels": 3,
    "hidden_act": "relu",
    "downsample_in_first_stage": False,
    "downsample_in_bottleneck": False,
}
_PARTS = {
    "stem": "embedder.embedder",
    "blocks.*.*.inner.*": "encoder.stages.*.layers.*.layer.*",
    "blocks.*.*.shortcut": "encoder.stages.*.layers.*.shortcut",
}
RULES = (
    *(Rule(ours=f"{ours}.conv", theirs=(f"{theirs}.convolution",)) for ours, theirs in _PARTS.items()),
    *(Rule(ours=f"{ours}.norm", theirs=(f"{theirs}.normalization",)) for ours, theirs in _PARTS.items()),
    Rule(ours="classifier", theirs=(_HEAD,)),
)


def sizes_from(config: Mapping[str, Any]) -> ResNetSizes:
    """Sizes of the tower that a ``config.json`` describes.

    Raises:
        CheckpointError: A setting has no place in :class:`~plait.models.towers.resnet.ResNet`.
    """
    require(config, _FIXED, place="config.json of ResNet")
    return ResNetSizes(
        depths=tuple(config.get("depths", (3, 4, 6, 3))),
        widths=tuple(config.get("hidden_sizes", (256, 512, 1024, 2048))),
        bottleneck=one_of(config, "layer_type", ("bottleneck", "basic"), place="config.json of ResNet") == "bottleneck",
        d_stem=config.get("embedding_size", 64),
        num_classes=labels(config),
    )


def config_from(sizes: ResNetSizes) -> dict[str, Any]:
    """A ``config.json`` that ``AutoConfig`` reads."""
    return {
        "model_type": "resnet",
        "depths": list(sizes.depths),
        "hidden_sizes": list(sizes.widths),
        "layer_type": "bottleneck" if sizes.bottleneck else "basic",
        "embedding_size": sizes.d_stem,
        **_FIXED,
        **labeled("ResNet", sizes.num_classes),
    }


def to_ours(state: Mapping[str, Tensor], *, place: str = "") -> dict[str, Tensor]:
    """Weights of a published file, of the bare model or of the one with a classifier, under our names.

    Raises:
        CheckpointError: Some names have no place here; lists them.
    """
    return renamed({name.removeprefix(_PREFIX): value for name, value in state.items()}, RULES, place=place)


def to_official(state: Mapping[str, Tensor], *, place: str = "") -> dict[str, Tensor]:
    """Our weights as ``save_pretrained`` names them: with the prefix of the model inside where there is a classifier.

    Raises:
        CheckpointError: Some of our names have none in this layout; lists them.
    """
    found = renamed_back(state, RULES, place=place)
    prefix = _PREFIX if f"{_HEAD}.weight" in found else ""
    return {name if name.startswith(_HEAD) else prefix + name: value for name, value in found.items()}
