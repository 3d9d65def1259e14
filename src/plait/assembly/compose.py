"""Settings to a whole model: encoders × connectors × decoder, each loaded or drawn."""

from __future__ import annotations

from plait.assembly.language import language_of
from plait.assembly.media_towers import Tower, make_tower
from plait.assembly.multimodal import Multimodal, build_multimodal
from plait.core.events import Events
from plait.core.types import Modality
from plait.models.composition import Composition, NewDecoder


def compose(spec: Composition, *, dtype: str = "float32", events: Events | None = None) -> Multimodal:
    """A model from its settings, in training mode; what is loaded is frozen, what is drawn may learn.

    Weights are drawn from torch's generator in this order: encoders, decoder, connectors.

    Args:
        spec: What it is made of.
        dtype: Of a pretrained decoder.
        events: Where a one-time conversion of a package is said.

    Raises:
        ConfigError: A part is not there, or parts do not fit together.
        ResourceError: A package is not fetched.
        CheckpointError: A folder holds no usable weights.

    Example:
        >>> from plait.core.spec import load  # model.yaml: see plait.models.composition
        >>> compose(load(Composition, Path("model.yaml")).spec).slots_per_picture  # doctest: +SKIP
        16
    """
    parts = spec.encoders.by_modality()
    towers: dict[Modality, Tower] = {modality: make_tower(part, events=events) for modality, part in parts.items()}
    language = language_of(spec.decoder, dtype=dtype, events=events)
    whole = isinstance(spec.decoder, NewDecoder)
    built = build_multimodal(towers, language, spec.connectors, decoder=spec.decoder, whole=whole)
    if whole:
        language.model.requires_grad_(requires_grad=True)
    built.model.train()
    for module in built.model.encoders.modules():  # a frozen tower may lie inside one that learns
        weights = list(module.parameters())
        if weights and not any(weight.requires_grad for weight in weights):
            module.eval()
    return built
