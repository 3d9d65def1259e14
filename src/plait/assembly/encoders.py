"""Spec → encoder of any modality: built from scratch, or loaded where the spec names pretrained weights."""

from __future__ import annotations

from torch import nn

from plait.assembly.media_towers import make_tower
from plait.assembly.towers import load_text_tower
from plait.core.events import Events
from plait.models import audio_specs, specs, text_specs, video_specs
from plait.models.build import build_encoder
from plait.models.build_media import build_audio, build_text, build_video


def load_encoder(spec: specs.Part, *, events: Events | None = None) -> nn.Module:
    """The encoder that a spec describes; pretrained ones are frozen and in eval mode.

    Encoders of pictures, sounds and videos are :class:`~plait.core.protocols.Encoder`; those of texts take token ids,
    or texts where they are pretrained.

    Args:
        spec: Of any modality.
        events: Where conversions and what is left out are said.

    Raises:
        ConfigError: It is of no encoder, its sizes do not fit together, or a folder is missing.
        ResourceError: A package is not fetched, or damaged.
        CheckpointError: A folder holds no usable weights.
    """
    match spec:
        case specs.PretrainedImage() | audio_specs.PretrainedAudio() | video_specs.PretrainedVideo():
            found = make_tower(spec, events=events).encoder
            assert isinstance(found, nn.Module)
            return found
        case text_specs.PretrainedText():
            encoder = load_text_tower(spec.name, max_tokens=spec.max_tokens, dtype=spec.dtype).encoder
            assert isinstance(encoder, nn.Module)
            return encoder
        case video_specs.FramesThenTime():
            pretrained = isinstance(spec.tower, specs.PretrainedImage)
            return build_video(spec, tower=load_encoder(spec.tower, events=events) if pretrained else None)
        case video_specs.SpaceTime():
            return build_video(spec)
        case audio_specs.Whisper() | audio_specs.Wav2Vec2():
            return build_audio(spec)
        case text_specs.Bert() | text_specs.Gpt() | text_specs.Llama() | text_specs.T5():
            return build_text(spec)
        case _:
            return build_encoder(spec)
