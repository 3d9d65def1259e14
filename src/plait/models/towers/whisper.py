"""The encoder of Whisper from scratch: log-mel frames, two convolutions, sines and cosines, the one Transformer.

Radford et al., "Robust speech recognition via large-scale weak supervision", https://arxiv.org/abs/2212.04356.
"""

import math
from dataclasses import dataclass
from typing import Literal

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.nn import functional

from plait.core.errors import DataError
from plait.core.tensors import Patches
from plait.models.position.absolute import sincos
from plait.models.towers.mel import SAMPLE_RATE, LogMel, filled
from plait.models.towers.pixels import by_shape
from plait.models.transformer import Transformer, TransformerSizes

Keep = Literal["real", "all"]
Longer = Literal["error", "windows"]
HOP, STRIDE = 160, 2
"""Samples between frames, and frames between tokens: a token stands for 20 ms."""


@dataclass(frozen=True, slots=True, kw_only=True)
class WhisperSizes:
    """Shape of the encoder.

    Attributes:
        transformer: Of the blocks.
        mels: Filters of the front end.
        tokens: Tokens of a window: its ``320 tokens`` samples are what the model always hears, silence included.
    """

    transformer: TransformerSizes
    mels: int = 80
    tokens: int = 1500

    @property
    def window(self) -> int:
        """Samples of a window: 30 s."""
        return self.tokens * STRIDE * HOP


def whisper(d: int, depth: int, heads: int, *, mels: int = 80) -> WhisperSizes:
    """Sizes of table 1 of the paper.

    Args:
        d: Width.
        depth: Blocks.
        heads: Of attention.
        mels: Filters; large-v3 has 128.
    """
    return WhisperSizes(
        transformer=TransformerSizes(d=d, depth=depth, heads=heads, eps=1e-5, key_bias=False), mels=mels
    )


WHISPER_TINY, WHISPER_BASE, WHISPER_SMALL = whisper(384, 4, 6), whisper(512, 6, 8), whisper(768, 12, 12)
WHISPER_MEDIUM, WHISPER_LARGE = whisper(1024, 24, 16), whisper(1280, 32, 20)
WHISPER_LARGE_V3 = whisper(1280, 32, 20, mels=128)


def sinusoids(length: int, d: int) -> Float[Tensor, "t d"]:
    """All sines, then all cosines, from period 2 pi to 2 pi 10 000, both ends included.

    Unlike :func:`~plait.models.position.absolute.frequencies`, whose last period is shorter than the base says.
    """
    half = d // 2
    frequency = torch.exp(-math.log(10_000) / (half - 1) * torch.arange(half, dtype=torch.float64))
    return sincos(torch.arange(length, dtype=torch.float64), frequency).float()


class WhisperEncoder(nn.Module):
    """Sounds to tokens of 20 ms: an :class:`~plait.core.protocols.Encoder` for speech.

    Takes samples at 16 kHz, mono, one row a sample, grid ``(1, 1, samples)``, and makes log-mel frames of them itself.

    **Padding.** The model hears windows of 30 s, so shorter sounds get zeros behind them up to there, exactly as
    transformers' ``WhisperFeatureExtractor`` does it, and the blocks attend to that silence, as in training. With
    ``keep="real"`` only tokens that begin inside the sound are handed on; their values are the same as with ``all``.

    **Longer sounds** are refused, or with ``windows`` cut every 30 s into windows that know nothing of one another;
    :meth:`grid_out` counts the tokens of them all.

    Args:
        sizes: Shape.
        keep: Which tokens of a window are given: ``real`` is ``ceil(samples / 320)``, ``all`` is 1500.
        longer: What happens to sounds of more than one window.
        batch_size: Windows computed together at most.

    Example:
        >>> with torch.device("meta"):
        ...     tower = WhisperEncoder(WHISPER_TINY)
        >>> tower.grid_out(torch.tensor([[1, 1, 16_000], [1, 1, 480_000]])).tolist()
        [[1, 1, 50], [1, 1, 1500]]
        >>> sum(p.numel() for p in tower.parameters())
        7632384
    """

    position: Tensor

    def __init__(
        self, sizes: WhisperSizes, *, keep: Keep = "real", longer: Longer = "error", batch_size: int = 16
    ) -> None:
        super().__init__()
        self.sizes, self.batch_size = sizes, batch_size
        self.keep: Keep = keep
        self.longer: Longer = longer
        inner = sizes.transformer
        self.d_out = inner.d
        self.log_mel = LogMel(sizes.mels, hop=HOP)
        self.stem = nn.ModuleList(
            [nn.Conv1d(sizes.mels, inner.d, 3, padding=1), nn.Conv1d(inner.d, inner.d, 3, stride=STRIDE, padding=1)]
        )
        # Stored, because published files store it; never trained.
        self.register_buffer("position", sinusoids(sizes.tokens, inner.d))
        self.transformer = Transformer(inner)

    def forward(self, media: Patches) -> Patches:
        """Encode.

        Raises:
            DataError: Rows and grid disagree, or a sound is empty or too long.
        """
        check_sounds(media, name="WhisperEncoder")
        lengths = [length for item in media.grid[:, 2].tolist() for length in self._windows(item)]
        # As the grid: beside the media, also where those are counted on the meta device.
        windows = media.grid.new_ones(len(lengths), 3)
        windows[:, 2] = media.grid.new_tensor(lengths)
        kept = windows.clone()
        kept[:, 2] = media.grid.new_tensor([self._kept(length) for length in lengths])
        found = by_shape(
            Patches(values=media.values, grid=windows),
            lambda sounds: self.features(sounds.flatten(1)),
            grid_out=kept,
            d_out=self.d_out,
            batch_size=self.batch_size,
            name="WhisperEncoder",
        )
        return Patches(values=found.values, grid=self.grid_out(media.grid))

    def grid_out(self, grid: Int[Tensor, "item 3"]) -> Int[Tensor, "item 3"]:
        """Tokens of each sound.

        Raises:
            DataError: A sound is empty, or too long.
        """
        counts = [sum(map(self._kept, self._windows(length))) for length in grid[:, 2].tolist()]
        out = torch.ones_like(grid)
        out[:, 2] = torch.tensor(counts, dtype=grid.dtype, device=grid.device)
        return out

    def features(self, samples: Float[Tensor, "b s"]) -> Float[Tensor, "b n d"]:
        """Tokens of sounds of one length, up to 30 s."""
        mel = self.log_mel(filled(samples, self.sizes.window))
        return self.tokens(mel)[:, : self._kept(samples.shape[1])]

    def tokens(
        self,
        mel: Float[Tensor, "b mel frame"],
        *,
        weights: list[Tensor] | None = None,
        hidden: list[Tensor] | None = None,
    ) -> Float[Tensor, "b n d"]:
        """All tokens of whole windows of log-mel frames.

        Args:
            mel: Frames, two a token.
            weights: If given, attention weights of every block are appended.
            hidden: If given, what goes into every block is appended.

        Raises:
            DataError: It is not a whole window.
        """
        frames = self.sizes.tokens * STRIDE
        if mel.shape[1:] != (self.sizes.mels, frames):
            raise DataError(
                f"a window is {self.sizes.mels} mels x {frames} frames, came {mel.shape[1]} x {mel.shape[2]}",
                place="WhisperEncoder.tokens",
                remedy="fill the sound up to the window first (features does)",
            )
        x = mel.to(self.position.dtype)
        for conv in self.stem:
            x = functional.gelu(conv(x))
        x = x.transpose(1, 2) + self.position
        x = functional.dropout(x, self.sizes.transformer.dropout, self.training)
        return self.transformer(x, weights=weights, hidden=hidden)

    def _windows(self, length: int) -> list[int]:
        """Samples of each window of a sound."""
        window = self.sizes.window
        whole, rest = divmod(length, window)
        if length < 1 or (length > window and self.longer == "error"):
            raise DataError(
                f"a sound has {length} samples, expected 1 to {window} ({window / SAMPLE_RATE:g} s)",
                place="WhisperEncoder input",
                remedy="cut it, or build the tower with longer='windows'" if length else "leave empty sounds out",
            )
        return [window] * whole + [rest] * (rest > 0)

    def _kept(self, length: int) -> int:
        return self.sizes.tokens if self.keep == "all" else -(-length // (STRIDE * HOP))


def check_sounds(media: Patches, *, name: str, rate: int = SAMPLE_RATE) -> None:
    """See that media are samples of one channel, as audio towers take them.

    Raises:
        DataError: They are not.
    """
    lengths = media.grid[:, 2]
    if not bool((media.grid[:, :2] == 1).all()) or media.values.shape != (int(lengths.sum()), 1):
        raise DataError(
            f"the grid of {len(media.grid)} sounds counts {int(media.grid.prod(1).sum())} samples of one channel, came "
            f"{tuple(media.values.shape)} and a first grid of {media.grid[:1].tolist()}",
            place=f"{name} input",
            remedy=f"give mono samples at {rate} Hz, one row a sample, grid (1, 1, samples)",
        )
