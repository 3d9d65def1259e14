"""What a composition costs: weights, tokens and FLOPs of each part, before anything is trained."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from plait.assembly.audio_towers import AudioTower
from plait.assembly.language import language_of
from plait.assembly.media_towers import make_tower
from plait.assembly.towers import ImageTower, load_image_tower
from plait.assembly.video_towers import load_video_tower, scratch_video_tower
from plait.core.events import Events
from plait.core.protocols import Encoder
from plait.core.tensors import Patches
from plait.models import audio_specs, specs, video_specs
from plait.models.composition import Composition, NewDecoder
from plait.models.connectors.measure import connector_account
from plait.models.crossattend import layers_of
from plait.models.measure import media_account
from plait.models.towers.mel import SAMPLE_RATE

_TOKEN_S = 0.02
# Whisper's: a token of two frames of 10 ms.


@dataclass(frozen=True, slots=True, kw_only=True)
class PartAccount:
    """What one part costs for one item: a square picture of the tower's size, a sound, a video, a prompt.

    Attributes:
        part: Such as ``image encoder``.
        kind: As `plait list` calls it.
        parameters: Weights.
        trainable: Those of them that are drawn, and learn; of what is loaded 0.
        tokens: That come out; of a decoder, the positions of the prompt.
        slots: Places that they take in the text.
        flops: Operations of a forward pass: two for each multiply-add of products, convolutions and attention.
    """

    part: str
    kind: str
    parameters: int
    trainable: int
    tokens: int
    slots: int
    flops: int


def composition_account(
    spec: Composition, *, prompt: int = 32, seconds: float = 3.0, events: Events | None = None
) -> list[PartAccount]:
    """Count every part; scratch ones on the meta device, loaded ones by their files.

    Args:
        spec: What the model is made of.
        prompt: Tokens of text beside the media.
        seconds: Length of a sound, or what its encoder hears at once if that is less; a video has as many frames as its
            tower looks at.
        events: Where a one-time conversion of a package is said.

    Raises:
        ConfigError: A part is not there, or parts do not fit together.
        ResourceError: A package is not fetched.
        CheckpointError: A folder holds no usable weights.
    """
    language = language_of(spec.decoder, dtype="bfloat16", events=events)
    decoder, width = language.model, language.width
    layers = len(layers_of(decoder))
    found: list[PartAccount] = []
    chosen = spec.connectors.by_modality()
    slots = 0
    for modality, encoder in spec.encoders.by_modality().items():
        of = _encoder(encoder, heard(encoder, seconds), events)
        kind = str(getattr(encoder, "kind", ""))
        counts = {"parameters": of.parameters, "trainable": of.trainable, "tokens": of.tokens, "flops": of.flops}
        found.append(PartAccount(part=f"{modality} encoder", kind=kind, slots=0, **counts))
        connector = chosen[modality]
        cost = connector_account(connector, cells=of.cells, d_in=of.d_out, d_out=width, layers=layers)
        slots += cost.slots
        found.append(
            PartAccount(
                part=f"{modality} connector",
                kind=connector.kind,
                parameters=cost.parameters,
                trainable=cost.parameters,
                tokens=cost.tokens,
                slots=cost.slots,
                flops=cost.flops + 2 * cost.inside * prompt,
            )
        )
    weights = sum(weight.numel() for weight in decoder.parameters())
    learns = weights if isinstance(spec.decoder, NewDecoder) else 0
    positions = prompt + slots
    found.append(
        PartAccount(
            part="decoder",
            kind=decoder.config.model_type,
            parameters=weights,
            trainable=learns,
            tokens=positions,
            slots=positions,
            flops=_decoder_flops(decoder, width, positions),
        )
    )
    return found


def heard(spec: specs.Part, seconds: float) -> float:
    """How much of a sound of so many seconds an encoder takes at once."""
    match spec:
        case audio_specs.Whisper():
            return min(seconds, spec.tokens * _TOKEN_S)
        case audio_specs.PretrainedAudio(window_s=window) if window:
            return min(seconds, window)
        case _:
            return seconds


class _EncoderAccount(NamedTuple):
    parameters: int
    trainable: int
    tokens: int
    flops: int
    cells: tuple[int, ...]
    d_out: int


def _encoder(spec: specs.Part, seconds: float, events: Events | None) -> _EncoderAccount:
    """What an encoder costs: of a square picture of its size, a sound of so many seconds, a video of its frames."""
    match spec:
        case audio_specs.Whisper() | audio_specs.Wav2Vec2():
            return _counted(lambda: _drawn(spec), (1, 1, round(seconds * SAMPLE_RATE)), channels=1)
        case audio_specs.PretrainedAudio():
            return _heard(spec, seconds, events)
        case video_specs.PretrainedVideo():
            watches = load_video_tower(spec.name, dtype="float32", events=events)
            return _counted(lambda: _on_meta(watches.encoder), watches.shape)
        case video_specs.FramesThenTime(tower=specs.PretrainedImage() as named):
            tower = load_image_tower(named.name, size=named.size, layer=named.layer, dtype="float32", events=events)
            side = tower.contract.size

            def build() -> nn.Module:
                return _drawn(spec, frame_tower=replace(tower, encoder=_on_meta(tower.encoder)))

            return _counted(build, (spec.frames, side, side))
        case video_specs.FramesThenTime() | video_specs.SpaceTime():
            size = spec.size if isinstance(spec, video_specs.SpaceTime) else spec.tower.size
            return _counted(lambda: _drawn(spec), (spec.frames, size, size))
        case specs.PretrainedImage():
            sees = load_image_tower(spec.name, size=spec.size, layer=spec.layer, dtype="float32", events=events)
            return _counted(lambda: _on_meta(sees.encoder), (1, sees.contract.size, sees.contract.size))
        case _:
            size = spec.size  # pyright: ignore[reportAttributeAccessIssue]  every spec of a picture encoder has it
            return _counted(lambda: _drawn(spec), (1, size, size))


def _drawn(spec: specs.Part, *, frame_tower: ImageTower | None = None) -> nn.Module:
    """The very encoder that a model would have."""
    if frame_tower is not None:
        assert isinstance(spec, video_specs.FramesThenTime)
        found = scratch_video_tower(spec, frame_tower=frame_tower).encoder
    else:
        found = make_tower(spec).encoder
    assert isinstance(found, nn.Module)
    return found


def _on_meta(encoder: Encoder) -> nn.Module:
    """Already built: only its weights go to the meta device."""
    assert isinstance(encoder, nn.Module)
    return copy.deepcopy(encoder).to("meta")


def _counted(build: Callable[[], nn.Module], shape: tuple[int, int, int], *, channels: int = 3) -> _EncoderAccount:
    """Counted on the meta device: no weight is drawn and no product computed."""
    kept: list[Any] = []

    def built() -> nn.Module:
        kept.append(build())
        return kept[0]

    of = media_account(built, shape, channels=channels)
    cells = tuple(kept[0].grid_out(torch.tensor([shape]))[0].tolist())
    return _EncoderAccount(of.parameters, of.trainable, of.tokens, of.flops, cells, of.d_out)


def _heard(spec: audio_specs.PretrainedAudio, seconds: float, events: Events | None) -> _EncoderAccount:
    """Counted while it hears silence: feature extractors of transformers compute, whatever the device."""
    tower = make_tower(spec.model_copy(update={"dtype": "float32"}), events=events)
    assert isinstance(tower, AudioTower)
    assert isinstance(tower.encoder, nn.Module)
    samples = round(seconds * tower.rate)
    grid = torch.tensor([[1, 1, samples]])
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        tokens = len(tower.encoder(Patches(values=torch.zeros(samples, 1), grid=grid)).values)
    weights = sum(weight.numel() for weight in tower.encoder.parameters())
    cells = tuple(tower.encoder.grid_out(grid)[0].tolist())
    return _EncoderAccount(weights, 0, tokens, counter.get_total_flops(), cells, tower.encoder.d_out)


def _decoder_flops(decoder: Any, width: int, positions: int) -> int:
    empty = copy.deepcopy(decoder).to("meta")
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        hidden = empty.base_model(inputs_embeds=torch.zeros(1, positions, width, device="meta", dtype=decoder.dtype))
        empty.lm_head(hidden.last_hidden_state[:, -1])
    return counter.get_total_flops()
