"""Specs to encoders of sounds, videos and texts from scratch; pictures: :mod:`plait.models.build`."""

from torch import nn

from plait.core.errors import ConfigError
from plait.core.protocols import Encoder
from plait.models import audio_specs, text_specs, video_specs
from plait.models.build import build_encoder
from plait.models.specs import Part, PretrainedImage
from plait.models.towers.seq2seq import EncoderDecoder, Seq2SeqSizes
from plait.models.towers.text_transformer import TextSizes, TextTransformer
from plait.models.towers.video import (
    FrameEncoder,
    FramePool,
    SpaceTimeTransformer,
    TemporalTransformer,
    TimePool,
    VideoSizes,
)
from plait.models.towers.wav2vec import Wav2Vec, Wav2VecSizes
from plait.models.towers.whisper import WhisperEncoder, WhisperSizes
from plait.models.transformer import TransformerSizes


def build_audio(spec: Part) -> WhisperEncoder | Wav2Vec:
    """An encoder of sounds from scratch, its weights drawn from torch's generator.

    Raises:
        ConfigError: The spec is of no such encoder, or its sizes do not fit together.

    Example:
        >>> tower = build_audio(audio_specs.Wav2Vec2(d=32, depth=1, heads=2, channels=16, position_groups=4))
        >>> tower.d_out
        32
    """
    match spec:
        case audio_specs.Whisper():
            inner = TransformerSizes(
                d=spec.d, depth=spec.depth, heads=spec.heads, eps=1e-5, key_bias=False, dropout=spec.dropout
            )
            sizes = WhisperSizes(transformer=inner, mels=spec.mels, tokens=spec.tokens)
            return WhisperEncoder(sizes, keep=spec.keep, longer=spec.longer)
        case audio_specs.Wav2Vec2():
            return _wav2vec(spec)
        case _:
            raise _not_built(spec, "load_audio_tower")


def build_video(spec: Part, *, tower: nn.Module | None = None) -> FrameEncoder | SpaceTimeTransformer:
    """An encoder of videos, its weights drawn from torch's generator.

    Args:
        spec: Of the encoder.
        tower: Of the frames, where the spec names a pretrained one, which is loaded before.

    Raises:
        ConfigError: The spec is of no such encoder, its sizes do not fit together, or the tower of frames is missing.
    """
    match spec:
        case video_specs.FramesThenTime():
            return _frames(spec, tower)
        case video_specs.SpaceTime():
            return SpaceTimeTransformer(_space_time(spec))
        case _:
            raise _not_built(spec, "load_video_tower")


def build_text(spec: Part) -> TextTransformer | EncoderDecoder:
    """An encoder of texts from scratch, its weights drawn from torch's generator.

    Raises:
        ConfigError: The spec is of no such encoder, or its sizes do not fit together.
    """
    match spec:
        case text_specs.Bert() | text_specs.Gpt() | text_specs.Llama():
            return TextTransformer(_text(spec))
        case text_specs.T5():
            inner = TransformerSizes(
                d=spec.d,
                depth=spec.depth,
                heads=spec.heads,
                d_ff=spec.d_ff,
                norm="rms",
                activation="relu",
                bias=False,
                scale=1.0,
                dropout=spec.dropout,
            )
            sizes = Seq2SeqSizes(
                transformer=inner,
                vocabulary=spec.vocabulary,
                depth_decoder=spec.depth_decoder,
                tied=spec.tied,
                scaled=spec.tied,  # as T5; version 1.1 unties both
            )
            return EncoderDecoder(sizes)
        case _:
            raise _not_built(spec, "load_text_tower")


def _wav2vec(spec: audio_specs.Wav2Vec2) -> Wav2Vec:
    if spec.d % spec.position_groups:
        raise ConfigError(
            f"{spec.position_groups} groups do not divide a width of {spec.d}",
            place="position_groups",
            remedy="choose groups that do",
        )
    large = spec.form == "large"
    inner = TransformerSizes(
        d=spec.d,
        depth=spec.depth,
        heads=spec.heads,
        norm_place="pre" if large else "post",
        eps=1e-5,
        dropout=spec.dropout,
    )
    return Wav2Vec(
        Wav2VecSizes(
            transformer=inner,
            widths=(spec.channels,) * 7,
            conv_norm="layer" if large else "group",
            conv_bias=large,
            position_kernel=spec.position_kernel,
            position_groups=spec.position_groups,
            vocabulary=spec.vocabulary,
        )
    )


def _frames(spec: video_specs.FramesThenTime, tower: nn.Module | None) -> FrameEncoder:
    if tower is None:
        if isinstance(spec.tower, PretrainedImage):
            raise ConfigError(
                f"the tower of frames is pretrained ({spec.tower.name})",
                place="tower",
                remedy="load it with load_image_tower and give it as tower",
            )
        tower = build_encoder(spec.tower)
    if not isinstance(tower, Encoder):
        raise ConfigError(f"{type(tower).__name__} is no encoder", place="tower", remedy="give a picture tower")
    modules: list[nn.Module] = [FramePool(tower.d_out)] if spec.cells == "pooled" else []
    if spec.over_time == "mean":
        modules.append(TimePool(tower.d_out))
    elif spec.over_time == "transformer":
        inner = TransformerSizes(d=tower.d_out, depth=spec.depth, heads=spec.heads, dropout=spec.dropout)
        modules.append(TemporalTransformer(inner, position=spec.position, frames=spec.frames))
    assert isinstance(tower, nn.Module)
    return FrameEncoder(tower, *modules)


def _space_time(spec: video_specs.SpaceTime) -> VideoSizes:
    inner = TransformerSizes(
        d=spec.d,
        depth=spec.depth,
        heads=spec.heads,
        eps=1e-12,
        key_bias=False,
        dropout=spec.dropout,
        drop_path=spec.drop_path,
    )
    side = -(-spec.size // spec.patch)
    grid = (-(-spec.frames // spec.tubelet), side, side)
    return VideoSizes(transformer=inner, tubelet=spec.tubelet, patch=spec.patch, grid=grid, position=spec.position)


def _text(spec: text_specs.Bert | text_specs.Gpt | text_specs.Llama) -> TextSizes:
    shape = {name: getattr(spec, name) for name in ("d", "depth", "heads", "d_ff", "dropout")}
    match spec:
        case text_specs.Bert():
            return TextSizes(
                transformer=TransformerSizes(**shape, norm_place="post", eps=1e-12),
                vocabulary=spec.vocabulary,
                max_tokens=spec.max_tokens,
                types=spec.types,
                page=spec.page,
                norm_embedding=True,
                pool=spec.pool,
                pooler=spec.pooler,
                masked_head=spec.masked_head,
            )
        case text_specs.Gpt():
            return TextSizes(
                transformer=TransformerSizes(**shape, eps=1e-5, activation="gelu_tanh"),
                vocabulary=spec.vocabulary,
                max_tokens=spec.max_tokens,
                causal=True,
                pool=spec.pool,
                head=spec.head,
            )
        case text_specs.Llama():
            inner = TransformerSizes(
                **shape, kv_heads=spec.kv_heads, norm="rms", activation="silu", gated=True, bias=False
            )
            return TextSizes(
                transformer=inner,
                vocabulary=spec.vocabulary,
                causal=True,
                position="rope",
                rope_base=spec.rope_base,
                pool=spec.pool,
                head=spec.head,
                tied=spec.tied,
            )


def _not_built(spec: Part, loader: str) -> ConfigError:
    return ConfigError(f"{type(spec).__name__} is not built from scratch here", remedy=f"load it with {loader}")
