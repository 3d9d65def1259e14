"""Audio towers of Hugging Face transformers behind the :class:`~plait.core.protocols.Encoder` face.

==========================================  ==============================  =====================================
wav2vec 2.0, HuBERT, WavLM, UniSpeech,      samples, any length             one token every 20 ms
UniSpeech-SAT, data2vec, Conformer
Whisper (its encoder)                       log-mel frames, up to 30 s      one token every 20 ms
Audio Spectrogram Transformer               fbank frames, up to about 10 s  rows: frequency bands; columns: time
CLAP (its audio tower, without fusion)      log-mel frames, up to 10 s      rows: frequency bands; columns: time
==========================================  ==============================  =====================================

A model whose ``model_type`` is not in :data:`FAMILIES` is refused: how many tokens a sound becomes cannot be told from
a configuration alone.
"""

import copy
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Literal

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from transformers import PreTrainedModel, SequenceFeatureExtractor

from plait.core.errors import CheckpointError, ConfigError, DataError
from plait.core.tensors import Patches
from plait.models.towers.pixels import by_shape
from plait.models.towers.whisper import check_sounds


@dataclass(frozen=True, slots=True, kw_only=True)
class AudioLayout:
    """How one backbone is called and what comes out.

    Attributes:
        d_out: Width of a token.
        shortest: Samples that a sound must have.
        longest: Samples that it may have; 0: any number.
        count: Samples to rows and columns of all tokens.
        real: Samples to columns that begin inside the sound; the others stand for the silence behind it.
        leading: Class and distillation tokens, which come first.
        num_layers: Layers that all work on one grid; 0 where the grid shrinks from stage to stage.
        extra: Further arguments of the backbone.
    """

    d_out: int
    shortest: int
    longest: int
    count: Callable[[int], tuple[int, int]]
    real: Callable[[int], int]
    leading: int = 0
    num_layers: int = 0
    extra: Callable[[int], dict[str, Any]] = lambda _: {}


class PretrainedAudio(nn.Module):
    """An audio model of transformers, of any family in :data:`FAMILIES`.

    Takes mono samples, one row a sample, grid ``(1, 1, samples)``, at ``rate`` samples a second, and makes of each
    sound what the family's own feature extractor makes of it alone. Sounds of different lengths may be mixed; none is
    padded to another's length, so each comes out as it would alone.

    Longer sounds than the model hears are refused: extractors would cut them, at a random place in CLAP's case. Shorter
    ones they fill up with silence (Whisper, AST) or repetitions (CLAP); with ``keep="real"`` tokens of that silence are
    left out after the model has seen it.

    No gradient reaches the samples. In training mode wav2vec 2.0 and its kin mask frames as their configuration says;
    frozen towers are in eval mode, where nothing is masked.

    Args:
        backbone: The model; of Whisper its encoder, of CLAP its audio model.
        extractor: Of the same folder.
        layer: Which hidden layer is taken, counted from the end: -1 is the last, after its norm if it has one.
        keep: Which tokens are given.
        batch_size: Sounds of one length computed together at most.

    Raises:
        CheckpointError: The family is not known, or model and extractor do not belong together.
        ConfigError: It has no such layer.

    Example:
        >>> from transformers import HubertConfig, HubertModel, Wav2Vec2FeatureExtractor
        >>> sizes = {"hidden_size": 16, "intermediate_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2}
        >>> tower = PretrainedAudio(HubertModel(HubertConfig(**sizes)).eval(), Wav2Vec2FeatureExtractor())
        >>> tower(Patches(values=torch.randn(1000, 1), grid=torch.tensor([[1, 1, 1000]]))).grid.tolist()
        [[1, 1, 2]]
    """

    def __init__(
        self,
        backbone: PreTrainedModel,
        extractor: SequenceFeatureExtractor,
        *,
        layer: int = -1,
        keep: Literal["real", "all"] = "real",
        batch_size: int = 16,
    ) -> None:
        super().__init__()
        kind = backbone.config.model_type
        if kind not in FAMILIES:
            raise CheckpointError(
                f"the family {kind!r} of {type(backbone).__name__} is not known",
                place="config.json: model_type",
                remedy=f"use an audio tower of one of: {', '.join(FAMILIES)}",
            )
        self.layout = FAMILIES[kind](backbone.config, extractor)
        if not -1 - self.layout.num_layers <= layer <= -1:
            raise ConfigError(
                f"layer is {layer}, {type(backbone).__name__} has -1 to {-1 - self.layout.num_layers}",
                place="layer",
                remedy="count from the end: -1 is the last",
            )
        self.backbone = backbone
        self.extractor: Any = extractor
        self.layer, self.batch_size = layer, batch_size
        self.keep: Literal["real", "all"] = keep
        self.rate: int = _of(extractor, "sampling_rate")
        self.d_out: int = self.layout.d_out

    def forward(self, media: Patches) -> Patches:
        """Encode.

        Raises:
            DataError: Rows and grid disagree, or a sound is too short or too long.
        """
        name = type(self.backbone).__name__
        check_sounds(media, name=name, rate=self.rate)
        return by_shape(
            media,
            lambda sounds: self.features(sounds.flatten(1)),
            grid_out=self.grid_out(media.grid),
            d_out=self.d_out,
            batch_size=self.batch_size,
            name=name,
        )

    def grid_out(self, grid: Int[Tensor, "item 3"]) -> Int[Tensor, "item 3"]:
        """Rows and columns of tokens of each sound.

        Raises:
            DataError: A sound is too short or too long.
        """
        shortest, longest = self.layout.shortest, self.layout.longest
        out = torch.ones_like(grid)
        for item, length in enumerate(grid[:, 2].tolist()):
            if length < shortest or 0 < longest < length:
                raise DataError(
                    f"sound {item} has {length} samples, expected {shortest} "
                    + (f"to {longest} ({longest / self.rate:g} s)" if longest else "or more"),
                    place=f"{type(self.backbone).__name__} input",
                    remedy="cut long sounds into pieces, leave short ones out",
                )
            out[item, 1:] = torch.tensor(self._shape(length), dtype=grid.dtype)
        return out

    def features(self, samples: Float[Tensor, "b s"]) -> Float[Tensor, "b n d"]:
        """Tokens of sounds of one length, in raster order, in the dtype of the weights."""
        name = self.extractor.model_input_names[0]
        sounds = [sound.numpy() for sound in samples.detach().float().cpu()]
        found = [self.extractor(sound, sampling_rate=self.rate, return_tensors="pt")[name] for sound in sounds]
        x = torch.cat(found).to(samples.device, self.backbone.dtype)
        hidden = self._hidden({name: x} | self.layout.extra(len(x)))
        if hidden.ndim == 4:
            hidden = hidden.flatten(2).mT
        hidden = hidden[:, self.layout.leading :]
        rows, columns = self.layout.count(samples.shape[1])
        if hidden.shape[1] != rows * columns:
            raise DataError(
                f"{hidden.shape[1]} tokens came of {samples.shape[1]} samples, expected {rows} x {columns}",
                place=f"{type(self.backbone).__name__} output",
                remedy="this is a fault of the tower's layout in plait.models.towers.pretrained_audio",
            )
        kept = self._shape(samples.shape[1])[1]
        return hidden.unflatten(1, (rows, columns))[:, :, :kept].flatten(1, 2)

    def _shape(self, length: int) -> tuple[int, int]:
        rows, columns = self.layout.count(length)
        return rows, min(columns, self.layout.real(length)) if self.keep == "real" else columns

    def _hidden(self, inputs: dict[str, Any]) -> Tensor:
        if self.layer == -1:
            return self.backbone(**inputs).last_hidden_state
        return self.backbone(**inputs, output_hidden_states=True).hidden_states[self.layer]


def shortened(
    backbone: PreTrainedModel, extractor: SequenceFeatureExtractor, seconds: float
) -> tuple[PreTrainedModel, SequenceFeatureExtractor]:
    """Whisper's encoder with a shorter window, for sounds that fit into it: its first positions, less silence behind.

    A window of 5 s has 250 tokens to compute in place of 1,500. What goes into the first block is the same for the
    real part of a sound (the frames' normalization looks at the loudest, which is not in the silence); from there on
    features differ, because real tokens of a 30 s window attend to the tokens of the silence, too.
    Measured with tiny.en on 24 spoken questions: features of the real part have a mean cosine of 0.986 with those of
    30 s in a window of 10 s, and 0.976 in one of 5 s; Whisper's own decoder gets 14 and 29 % of the words wrong there,
    17 % with 30 s.

    Args:
        backbone: Changed in place.
        extractor: Of the same folder.
        seconds: At least one token, at most the window that it was trained on.

    Raises:
        ConfigError: It is no Whisper, or ``seconds`` is out of range.
    """
    if backbone.config.model_type != "whisper":
        raise ConfigError(
            f"a window of {seconds:g} s is asked for, {type(backbone).__name__} has none that could be shorter",
            place="window_s",
            remedy="leave it out",
        )
    encoder: Any = backbone
    hop, rate, longest = (
        _of(extractor, "hop_length"),
        _of(extractor, "sampling_rate"),
        encoder.config.max_source_positions,
    )
    tokens = round(seconds * rate / (2 * hop))
    if not 1 <= tokens <= longest:
        raise ConfigError(
            f"the window is {seconds:g} s, this Whisper has {2 * hop / rate:g} to {longest * 2 * hop / rate:g}",
            place="window_s",
            remedy="as long as the longest sound, or 0 for its own",
        )
    table = encoder.embed_positions
    encoder.embed_positions = nn.Embedding.from_pretrained(table.weight[:tokens].clone())
    encoder.config = copy.deepcopy(encoder.config)
    encoder.config.max_source_positions = tokens
    own: Any = copy.deepcopy(extractor)
    own.nb_max_frames, own.n_samples = 2 * tokens, 2 * tokens * hop
    own.chunk_length = seconds
    return encoder, own


# --- the families --------------------------------------------------------------------------------------------------

Configuration = Any
Extractor = Any


def _samples(config: Configuration, extractor: Extractor) -> AudioLayout:
    """Convolutions over samples: nothing is padded, so all tokens are real."""
    _agree(extractor, {"feature_size": 1}, kind="Wav2Vec2FeatureExtractor")
    _refuse(config, {"add_adapter": False})

    def tokens(length: int) -> int:
        for kernel, stride in zip(config.conv_kernel, config.conv_stride, strict=True):
            length = (length - kernel) // stride + 1
        return length

    shortest = 1
    for kernel, stride in zip(reversed(config.conv_kernel), reversed(config.conv_stride), strict=True):
        shortest = (shortest - 1) * stride + kernel
    return AudioLayout(
        d_out=config.hidden_size,
        shortest=shortest,
        longest=0,
        count=lambda length: (1, tokens(length)),
        real=tokens,
        num_layers=config.num_hidden_layers,
    )


def _whisper(config: Configuration, extractor: Extractor) -> AudioLayout:
    """A window of log-mel frames, filled up with silence; two frames a token."""
    frames = 2 * config.max_source_positions
    hop = _of(extractor, "hop_length")
    _agree(
        extractor,
        {"feature_size": config.num_mel_bins, "nb_max_frames": frames, "dither": 0.0},
        kind="WhisperFeatureExtractor",
    )
    return AudioLayout(
        d_out=config.d_model,
        shortest=1,
        longest=frames * hop,
        count=lambda _: (1, frames // 2),
        real=lambda length: -(-length // (2 * hop)),
        num_layers=config.encoder_layers,
    )


def _spectrogram(config: Configuration, extractor: Extractor) -> AudioLayout:
    """Overlapping patches of 25 ms frames every 10 ms, filled up with zeros."""
    _agree(
        extractor,
        {"num_mel_bins": config.num_mel_bins, "max_length": config.max_length, "sampling_rate": 16_000},
        kind="ASTFeatureExtractor",
    )
    rows = (config.num_mel_bins - config.patch_size) // config.frequency_stride + 1
    columns = (config.max_length - config.patch_size) // config.time_stride + 1
    window, hop = 400, 160  # of the extractor, which writes them into its code
    return AudioLayout(
        d_out=config.hidden_size,
        shortest=window,
        longest=(config.max_length - 1) * hop + window + hop - 1,
        count=lambda _: (rows, columns),
        real=lambda length: -(-((length - window) // hop + 1) // config.time_stride),
        leading=2,
        num_layers=config.num_hidden_layers,
    )


def _clap(config: Configuration, extractor: Extractor) -> AudioLayout:
    """Log-mel frames of the sound, repeated up to 10 s, folded into a square for Swin."""
    _refuse(config, {"enable_fusion": False})
    _agree(extractor, {"feature_size": config.num_mel_bins, "truncation": "rand_trunc"}, kind="ClapFeatureExtractor")
    folds = config.spec_size // config.num_mel_bins
    stride = config.patch_stride if isinstance(config.patch_stride, int) else config.patch_stride[0]
    side = config.spec_size // stride // 2 ** (len(config.depths) - 1)
    rows, columns = side // folds, side * folds
    return AudioLayout(
        d_out=config.hidden_size,
        shortest=1,
        longest=_of(extractor, "nb_max_samples"),
        count=lambda _: (rows, columns),
        real=lambda _: columns,  # what is behind the sound is the sound again
        extra=lambda count: {"is_longer": torch.zeros(count, 1, dtype=torch.bool)},
    )


def _of(extractor: Extractor, field: str) -> Any:
    return getattr(extractor, field, None)


def _agree(extractor: Extractor, wanted: Mapping[str, Any], *, kind: str) -> None:
    """See that the extractor is the family's, with the model's numbers."""
    if type(extractor).__name__ != kind:
        raise CheckpointError(
            f"the feature extractor is {type(extractor).__name__}, expected {kind}",
            place="preprocessor_config.json: feature_extractor_type",
            remedy="use the preprocessor_config.json that was published with the weights",
        )
    for field, value in wanted.items():
        if _of(extractor, field) != value:
            raise CheckpointError(
                f"{field} of the feature extractor is {_of(extractor, field)!r}, expected {value!r} as in the model",
                place=f"preprocessor_config.json: {field}",
                remedy="config.json and preprocessor_config.json must come from one checkpoint",
            )


def _refuse(config: Configuration, wanted: Mapping[str, Any]) -> None:
    for field, value in wanted.items():
        if getattr(config, field, value) != value:
            raise CheckpointError(
                f"{field} is {getattr(config, field)!r}, expected {value!r}",
                place=f"config.json: {field}",
                remedy="use a checkpoint without it: how many tokens it makes is not known here",
            )


FAMILIES: Mapping[str, Callable[[Configuration, Extractor], AudioLayout]] = {
    "wav2vec2": _samples,
    "wav2vec2-conformer": _samples,
    "hubert": _samples,
    "wavlm": _samples,
    "unispeech": _samples,
    "unispeech-sat": _samples,
    "data2vec-audio": _samples,
    "whisper": _whisper,
    "audio-spectrogram-transformer": _spectrogram,
    "clap_audio_model": _clap,
}
"""``model_type`` of an audio configuration to its layout."""

PARTS: Mapping[str, str] = {"whisper": "encoder", "clap": "audio_model"}
"""``model_type`` of folders that hold more than an audio tower, and the part that is one."""
