"""Encoders of sounds as settings; beside :mod:`plait.models.specs`. Loads no torch."""

from typing import Annotated, ClassVar, Literal

from pydantic import Field

from plait.models.specs import Part, Positive, Share


class PretrainedAudio(Part):
    """audio tower of Hugging Face from a folder, or the packaged Whisper tiny.en; wav2vec 2.0, HuBERT, AST, CLAP .."""

    source: ClassVar[str] = "https://huggingface.co/docs/transformers"
    kind: Literal["pretrained"] = "pretrained"
    """Which encoder this is."""
    name: str = "whisper-tiny-en"
    """`whisper-tiny-en`, or a local folder in Hugging Face's layout."""
    window_s: float = Field(default=0.0, ge=0.0, le=30.0)
    """Of Whisper: seconds that it hears at once; 0 is the 30 s that it was trained on, less takes less time."""
    layer: int = Field(default=-1, le=-1)
    """Which hidden layer is taken, counted from the end."""
    keep: Literal["real", "all"] = "real"
    """Whether tokens of the silence behind short sounds are left out."""
    dtype: Literal["auto", "bfloat16", "float32"] = "auto"
    """Number format of the frozen weights."""


class Whisper(Part):
    """log-mel frames, two convolutions and a Transformer over windows of 30 s; the defaults are tiny's."""

    source: ClassVar[str] = "https://arxiv.org/abs/2212.04356"
    kind: Literal["whisper"] = "whisper"
    """Which encoder this is."""
    d: Annotated[int, Field(ge=4, multiple_of=2)] = 384
    """Width."""
    depth: Positive = 4
    """Blocks."""
    heads: Positive = 6
    """Heads of attention."""
    mels: Positive = 80
    """Mel filters of the front end; large-v3 has 128."""
    tokens: Positive = 1500
    """Tokens of a window, 20 ms each; sounds are filled up with silence to it."""
    keep: Literal["real", "all"] = "real"
    """Whether tokens of that silence are left out."""
    longer: Literal["error", "windows"] = "error"
    """Sounds longer than a window are refused, or cut into windows that are counted."""
    dropout: Share = 0.0
    """Share of what each part adds that is dropped while training."""


class Wav2Vec2(Part):
    """strided convolutions over samples, positions by convolution, a Transformer; the defaults are base's."""

    source: ClassVar[str] = "https://arxiv.org/abs/2006.11477"
    kind: Literal["wav2vec2"] = "wav2vec2"
    """Which encoder this is."""
    d: Positive = 768
    """Width."""
    depth: Positive = 12
    """Blocks."""
    heads: Positive = 12
    """Heads of attention."""
    form: Literal["base", "large"] = "base"
    """Norms after each block and a group norm in the first convolution, or norms before and in every convolution."""
    channels: Positive = 512
    """Channels of the seven convolutions, which make a token of every 20 ms."""
    position_kernel: Positive = 128
    """Tokens that the position code looks at."""
    position_groups: Positive = 16
    """Groups of its convolution; they divide the width."""
    vocabulary: int = Field(default=0, ge=0)
    """Symbols of an output layer for CTC; 0: none."""
    dropout: Share = 0.0
    """Share of what each part adds that is dropped while training."""


ScratchAudio = Annotated[Whisper | Wav2Vec2, Field(discriminator="kind")]
"""Encoders of sounds from scratch."""

AudioEncoder = Annotated[PretrainedAudio | Whisper | Wav2Vec2, Field(discriminator="kind")]
"""All encoders of sounds."""
