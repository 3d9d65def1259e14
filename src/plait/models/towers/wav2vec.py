"""wav2vec 2.0 from scratch: strided convolutions over samples, positions by convolution, the one Transformer.

Baevski et al., https://arxiv.org/abs/2006.11477. HuBERT (https://arxiv.org/abs/2106.07447) has the same shape.
"""

from dataclasses import dataclass
from typing import Literal

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn
from torch.nn import functional

from plait.core.errors import ConfigError, DataError
from plait.core.tensors import Patches
from plait.models.towers.mel import SAMPLE_RATE
from plait.models.towers.pixels import by_shape
from plait.models.towers.whisper import check_sounds
from plait.models.transformer import Transformer, TransformerSizes, norm_of


@dataclass(frozen=True, slots=True, kw_only=True)
class Wav2VecSizes:
    """Shape and kind.

    Attributes:
        transformer: Of the blocks; norms come after (base) or before ("stable layer norm", large).
        widths: Channels of each convolution over samples.
        kernels: Their kernels.
        strides: Their strides.
        conv_bias: Whether they have a bias.
        conv_norm: ``group``: the first normalizes every channel over the whole sound (base); ``layer``: each normalizes
            every frame (large).
        position_kernel: Frames that the position code looks at.
        position_groups: Groups of its convolution.
        feature_dropout: Share dropped after the projection to the width of the blocks.
        final_dropout: Share dropped before the output layer.
        mask_token: Whether there is a learned vector for masked frames.
        vocabulary: Width of the output layer for CTC; 0: none.
        normalize: Give every sound mean 0 and variance 1 first.
    """

    transformer: TransformerSizes
    widths: tuple[int, ...] = (512,) * 7
    kernels: tuple[int, ...] = (10, 3, 3, 3, 3, 2, 2)
    strides: tuple[int, ...] = (5, 2, 2, 2, 2, 2, 2)
    conv_bias: bool = False
    conv_norm: Literal["group", "layer"] = "group"
    position_kernel: int = 128
    position_groups: int = 16
    feature_dropout: float = 0.0
    final_dropout: float = 0.0
    mask_token: bool = True
    vocabulary: int = 0
    normalize: bool = True

    def __post_init__(self) -> None:
        if not len(self.widths) == len(self.kernels) == len(self.strides) > 0:
            raise ConfigError(
                f"{len(self.widths)} widths, {len(self.kernels)} kernels and {len(self.strides)} strides",
                place="Wav2VecSizes",
                remedy="give one of each for every convolution",
            )

    def frames(self, samples: int) -> int:
        """Tokens of a sound; 0 where it is shorter than what one token hears."""
        for kernel, stride in zip(self.kernels, self.strides, strict=True):
            samples = max(0, (samples - kernel) // stride + 1)
        return samples

    @property
    def hears(self) -> int:
        """Samples that a token hears: 400 in the paper, 25 ms."""
        samples = 1
        for kernel, stride in zip(reversed(self.kernels), reversed(self.strides), strict=True):
            samples = (samples - 1) * stride + kernel
        return samples


WAV2VEC_BASE = Wav2VecSizes(
    transformer=TransformerSizes(d=768, depth=12, heads=12, norm_place="post", eps=1e-5),
)
WAV2VEC_LARGE = Wav2VecSizes(
    transformer=TransformerSizes(d=1024, depth=24, heads=16, norm_place="pre", eps=1e-5),
    conv_norm="layer",
    conv_bias=True,
)
"""Section 4.2 of the paper; large as it was published for LV-60k."""


class SampleConv(nn.Module):
    """One convolution over time, its norm, GELU."""

    def __init__(self, sizes: Wav2VecSizes, number: int) -> None:
        super().__init__()
        width = sizes.widths[number]
        before = sizes.widths[number - 1] if number else 1
        self.conv = nn.Conv1d(before, width, sizes.kernels[number], sizes.strides[number], bias=sizes.conv_bias)
        nn.init.kaiming_normal_(self.conv.weight)
        self.norm: nn.Module = nn.Identity()
        self.by_frame = sizes.conv_norm == "layer"
        if self.by_frame:
            self.norm = nn.LayerNorm(width)
        elif number == 0:
            self.norm = nn.GroupNorm(width, width)

    def forward(self, x: Float[Tensor, "b c s"]) -> Float[Tensor, "b d t"]:
        """Filter, normalize, activate."""
        x = self.conv(x)
        return functional.gelu(self.norm(x.mT).mT if self.by_frame else self.norm(x))


class ConvPosition(nn.Module):
    """Where a frame stands, told from its neighbors: a grouped convolution with weight norm, GELU.

    The kernel at offset ``i`` is ``gain[i] * direction[i] / |direction[i]|``: direction and length are learned apart
    (https://arxiv.org/abs/1602.07868). Of an even kernel the last output is dropped, so that frames stay as many.
    """

    def __init__(self, d: int, kernel: int, *, groups: int) -> None:
        super().__init__()
        self.kernel, self.groups = kernel, groups
        self.direction = nn.Parameter(torch.randn(d, d // groups, kernel) * 2 / (kernel * d) ** 0.5)
        self.gain = nn.Parameter(torch.linalg.vector_norm(self.direction.detach(), dim=(0, 1), keepdim=True))
        self.bias = nn.Parameter(torch.zeros(d))

    def forward(self, x: Float[Tensor, "b t d"]) -> Float[Tensor, "b t d"]:
        """Codes to add to the frames."""
        length = torch.linalg.vector_norm(self.direction, dim=(0, 1), keepdim=True)
        weight = self.direction * (self.gain / length)
        code = functional.conv1d(x.mT, weight, self.bias, padding=self.kernel // 2, groups=self.groups)
        return functional.gelu(code[..., : x.shape[1]]).mT


class Wav2Vec(nn.Module):
    """Sounds to tokens every 20 ms: an :class:`~plait.core.protocols.Encoder` for speech.

    Takes samples at 16 kHz, mono, one row a sample, grid ``(1, 1, samples)``, and normalizes each sound itself. Nothing
    is padded: samples behind the last whole stride (less than 20 ms) end in no token, as in published models, and
    sounds of different lengths are computed apart, because the group norm of base would hear silence behind a sound.

    Args:
        sizes: Shape and kind.
        batch_size: Sounds of one length computed together at most.

    Example:
        >>> with torch.device("meta"):
        ...     tower = Wav2Vec(WAV2VEC_BASE)
        >>> sum(p.numel() for p in tower.parameters())
        94371712
        >>> tower.grid_out(torch.tensor([[1, 1, 400], [1, 1, 16_000]])).tolist()
        [[1, 1, 1], [1, 1, 49]]
    """

    def __init__(self, sizes: Wav2VecSizes, *, batch_size: int = 16) -> None:
        super().__init__()
        self.sizes, self.batch_size = sizes, batch_size
        inner = sizes.transformer
        self.d_out = inner.d
        self.convs = nn.ModuleList(SampleConv(sizes, number) for number in range(len(sizes.widths)))
        self.norm_features = nn.LayerNorm(sizes.widths[-1], eps=inner.eps)
        self.project = nn.Linear(sizes.widths[-1], inner.d)
        self.mask_token = nn.Parameter(torch.rand(inner.d)) if sizes.mask_token else None
        self.position = ConvPosition(inner.d, sizes.position_kernel, groups=sizes.position_groups)
        # Where norms come after, the frames are normalized before the first block too.
        self.norm_first = norm_of(inner) if inner.norm_place == "post" else nn.Identity()
        self.transformer = Transformer(inner)
        self.head = nn.Linear(inner.d, sizes.vocabulary) if sizes.vocabulary else None

    def forward(self, media: Patches) -> Patches:
        """Encode.

        Raises:
            DataError: Rows and grid disagree, or a sound is shorter than what one token hears.
        """
        check_sounds(media, name="Wav2Vec")
        return by_shape(
            media,
            lambda sounds: self.features(sounds.flatten(1)),
            grid_out=self.grid_out(media.grid),
            d_out=self.d_out,
            batch_size=self.batch_size,
            name="Wav2Vec",
        )

    def grid_out(self, grid: Int[Tensor, "item 3"]) -> Int[Tensor, "item 3"]:
        """Tokens of each sound.

        Raises:
            DataError: A sound is too short.
        """
        lengths: list[int] = grid[:, 2].tolist()
        short = [length for length in lengths if length < self.sizes.hears]
        if short:
            raise DataError(
                f"a sound has {short[0]} samples, a token hears {self.sizes.hears} "
                f"({1000 * self.sizes.hears / SAMPLE_RATE:g} ms)",
                place="Wav2Vec input",
                remedy="leave such sounds out, or put silence behind them",
            )
        out = torch.ones_like(grid)
        out[:, 2] = torch.tensor([self.sizes.frames(n) for n in lengths], dtype=grid.dtype, device=grid.device)
        return out

    def features(
        self,
        samples: Float[Tensor, "b s"],
        *,
        masked: Bool[Tensor, "b n"] | None = None,
        weights: list[Tensor] | None = None,
        hidden: list[Tensor] | None = None,
    ) -> Float[Tensor, "b n d"]:
        """Tokens of sounds of one length.

        Args:
            samples: Raw.
            masked: True where the learned vector takes a frame's place (section 3.1 of the paper).
            weights: If given, attention weights of every block are appended.
            hidden: If given, what goes into every block is appended.

        Raises:
            ConfigError: Frames are masked, but there is no vector for that.
        """
        return self.in_context(self.frames(samples), masked=masked, weights=weights, hidden=hidden)

    def frames(self, samples: Float[Tensor, "b s"]) -> Float[Tensor, "b n e"]:
        """What the convolutions make of sounds, normalized: the frames that pretraining predicts."""
        return self.norm_features(self.heard(samples))

    def in_context(
        self,
        frames: Float[Tensor, "b n e"],
        *,
        masked: Bool[Tensor, "b n"] | None = None,
        weights: list[Tensor] | None = None,
        hidden: list[Tensor] | None = None,
    ) -> Float[Tensor, "b n d"]:
        """Tokens of frames that have heard each other; arguments and faults as of :meth:`features`."""
        x = self.project(frames)
        x = functional.dropout(x, self.sizes.feature_dropout, self.training)
        if masked is not None:
            if self.mask_token is None:
                raise ConfigError("this tower has no vector for masked frames", remedy="build it with mask_token")
            x = torch.where(masked[..., None], self.mask_token, x)
        x = self.norm_first(x + self.position(x))
        x = functional.dropout(x, self.sizes.transformer.dropout, self.training)
        return self.transformer(x, weights=weights, hidden=hidden)

    def heard(self, samples: Float[Tensor, "b s"]) -> Float[Tensor, "b n e"]:
        """What the convolutions make of sounds."""
        if self.sizes.normalize:
            # In float32 whatever the weights are: a mean over a minute of bfloat16 would be none.
            wide = samples.to(torch.promote_types(samples.dtype, torch.float))
            variance, mean = torch.var_mean(wide, dim=1, correction=0, keepdim=True)
            samples = (wide - mean) / (variance + 1e-7).sqrt()
        x = samples[:, None].to(self.project.weight.dtype)
        for conv in self.convs:
            x = conv(x)
        return x.mT

    def logits(self, samples: Float[Tensor, "b s"]) -> Float[Tensor, "b n v"]:
        """Scores of every token's symbol, for CTC.

        Raises:
            ConfigError: There is no output layer.
        """
        if self.head is None:
            raise ConfigError("this tower has no output layer", remedy="build it with a vocabulary")
        hidden = functional.dropout(self.features(samples), self.sizes.final_dropout, self.training)
        return self.head(hidden)
