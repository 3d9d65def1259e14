"""What a composition costs: weights, tokens and FLOPs of each part, before anything is trained."""

from __future__ import annotations

import copy
import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from plait.assembly.audio_towers import load_audio_tower
from plait.assembly.language import language_of
from plait.assembly.scratch import build_tower
from plait.assembly.towers import load_image_tower
from plait.core.events import Events
from plait.core.tensors import Patches
from plait.models import specs
from plait.models.audio_specs import PretrainedAudio
from plait.models.composition import Composition, NewDecoder
from plait.models.connectors.measure import connector_account
from plait.models.crossattend import layers_of
from plait.models.measure import account


@dataclass(frozen=True, slots=True, kw_only=True)
class PartAccount:
    """What one part costs for one item: a square picture of the tower's size, a sound, a prompt.

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
        seconds: Length of a sound.
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
    image, audio = spec.encoders.image, spec.encoders.audio
    towers = [] if image is None else [("image", image.kind, *_image(image, events))]
    towers += [] if audio is None else [("audio", audio.kind, *_audio(audio, seconds, events))]
    slots = 0
    for modality, kind, of, cells, d_in in towers:
        found.append(PartAccount(part=f"{modality} encoder", kind=kind, slots=0, **of))
        connector = chosen[modality]  # pyright: ignore[reportArgumentType] (both are in one order)
        cost = connector_account(connector, cells=cells, d_in=d_in, d_out=width, layers=layers)
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


def _image(spec: specs.Part, events: Events | None) -> tuple[dict[str, int], tuple[int, int], int]:
    if isinstance(spec, specs.PretrainedImage):
        tower = load_image_tower(spec.name, size=spec.size, dtype="float32", events=events)
        assert isinstance(tower.encoder, nn.Module)
        loaded = tower.encoder
        # Already built: only its weights go to the meta device.
        of, size, trainable = account(lambda: copy.deepcopy(loaded).to("meta"), tower.contract.size), 0, 0
    else:
        size: int = spec.size  # pyright: ignore[reportAttributeAccessIssue] (every spec of a picture encoder has it)
        of = account(lambda: build_tower(spec), size)  # pyright: ignore[reportArgumentType]
        trainable = of.trainable
    side = math.isqrt(of.tokens)
    cells = (side, side) if side * side == of.tokens else (1, of.tokens)
    counts = {"parameters": of.parameters, "trainable": trainable, "tokens": of.tokens, "flops": of.flops}
    return counts, cells, of.d_out


def _audio(spec: PretrainedAudio, seconds: float, events: Events | None) -> tuple[dict[str, int], tuple[int, int], int]:
    tower = load_audio_tower(
        spec.name, layer=spec.layer, keep=spec.keep, window_s=spec.window_s, dtype="float32", events=events
    )
    samples = round(seconds * tower.rate)
    silence = Patches(values=torch.zeros(samples, 1), grid=torch.tensor([[1, 1, samples]]))
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        tokens = len(tower.encoder(silence).values)
    weights = sum(weight.numel() for weight in tower.encoder.parameters())
    counts = {"parameters": weights, "trainable": 0, "tokens": tokens, "flops": counter.get_total_flops()}
    return counts, (1, tokens), tower.encoder.d_out


def _decoder_flops(decoder: Any, width: int, positions: int) -> int:
    empty = copy.deepcopy(decoder).to("meta")
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        hidden = empty.base_model(inputs_embeds=torch.zeros(1, positions, width, device="meta", dtype=decoder.dtype))
        empty.lm_head(hidden.last_hidden_state[:, -1])
    return counter.get_total_flops()
