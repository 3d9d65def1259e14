"""Settings to a whole model: encoders × connectors × decoder, each loaded or drawn."""

from __future__ import annotations

from plait.assembly.audio_towers import load_audio_tower
from plait.assembly.language import language_of
from plait.assembly.multimodal import Multimodal, Tower, build_multimodal
from plait.assembly.towers import load_image_tower, scratch_tower
from plait.core.events import Events
from plait.core.types import Modality
from plait.models import specs
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
    towers: dict[Modality, Tower] = {}
    image = spec.encoders.image
    if isinstance(image, specs.PretrainedImage):
        towers["image"] = load_image_tower(image.name, size=image.size, fit=image.fit, dtype=image.dtype, events=events)
    elif image is not None:
        towers["image"] = scratch_tower(image)
    audio = spec.encoders.audio
    if audio is not None:
        towers["audio"] = load_audio_tower(
            audio.name, layer=audio.layer, keep=audio.keep, window_s=audio.window_s, dtype=audio.dtype, events=events
        )
    language = language_of(spec.decoder, dtype=dtype, events=events)
    whole = isinstance(spec.decoder, NewDecoder)
    built = build_multimodal(towers, language, spec.connectors, decoder=spec.decoder, whole=whole)
    if whole:
        language.model.requires_grad_(requires_grad=True)
    built.model.train()
    for tower in built.model.encoders.values():
        if not any(weight.requires_grad for weight in tower.parameters()):
            tower.eval()
    return built
