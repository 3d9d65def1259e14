"""Pictures as discrete codes and back: a convolutional encoder, a codebook, a convolutional decoder.

VQ-VAE: van den Oord et al., https://arxiv.org/abs/1711.00937; encoder and decoder are those of VQGAN, Esser et al.,
https://arxiv.org/abs/2012.09841, in the form of LlamaGen, https://arxiv.org/abs/2406.06525, which Janus and Chameleon
have too.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.nn import functional

from plait.core.errors import ConfigError, DataError
from plait.core.tensors import Patches
from plait.models.attention import attend
from plait.models.codebook import VectorQuantizer
from plait.models.towers.pixels import by_size


@dataclass(frozen=True, slots=True, kw_only=True)
class ImageTokenSizes:
    """Shape; the defaults are those of LlamaGen and Janus: 16,384 codes of 8 numbers, one for 16 x 16 pixels.

    Attributes:
        channels: Of the finest scale.
        multipliers: Channels of each scale are so many times that; every scale but the last halves the picture.
        blocks: Residual blocks of a scale; the decoder has one more.
        d_latent: Channels before and after the codes.
        codes: How many.
        d_code: Width of a code.
        groups: Of the group norms.
        attention: Whether cells of the coarsest scale look at each other after every block; in the middle they do.
        dropout: Inside residual blocks.
        normalize: Codes are unit vectors.
        decay: Of moving averages in place of gradients for codes; 0: gradients.
        restart: Use below which a code starts anew (:class:`~plait.models.codebook.VectorQuantizer`).
    """

    channels: int = 128
    multipliers: tuple[int, ...] = (1, 1, 2, 2, 4)
    blocks: int = 2
    d_latent: int = 256
    codes: int = 16_384
    d_code: int = 8
    groups: int = 32
    attention: bool = True
    dropout: float = 0.0
    normalize: bool = True
    decay: float = 0.0
    restart: float = 0.0

    def __post_init__(self) -> None:
        odd = [m for m in self.multipliers if m < 1 or self.channels * m % self.groups]
        if not self.multipliers or odd:
            raise ConfigError(
                f"{self.channels} channels times {list(self.multipliers)} do not divide into {self.groups} groups",
                place="ImageTokenSizes",
                remedy="choose channels that are a multiple of groups, and at least one multiplier",
            )

    @property
    def cell(self) -> int:
        """Pixels a side that one code stands for."""
        return 2 ** (len(self.multipliers) - 1)


class ResidualBlock(nn.Module):
    """``x + conv(silu(norm(conv(silu(norm(x))))))``; ``x`` through a linear map where the width changes."""

    def __init__(self, d_in: int, d_out: int, sizes: ImageTokenSizes) -> None:
        super().__init__()
        self.norm_in = nn.GroupNorm(sizes.groups, d_in, eps=1e-6)
        self.conv_in = nn.Conv2d(d_in, d_out, 3, padding=1)
        self.norm_out = nn.GroupNorm(sizes.groups, d_out, eps=1e-6)
        self.conv_out = nn.Conv2d(d_out, d_out, 3, padding=1)
        self.shortcut = nn.Conv2d(d_in, d_out, 1) if d_in != d_out else nn.Identity()
        self.dropout = sizes.dropout

    def forward(self, x: Float[Tensor, "b c h w"]) -> Float[Tensor, "b d h w"]:
        """Filter."""
        y = self.conv_in(functional.silu(self.norm_in(x)))
        y = functional.dropout(functional.silu(self.norm_out(y)), self.dropout, self.training)
        return self.shortcut(x) + self.conv_out(y)


class CellAttention(nn.Module):
    """Cells of a map look at each other: one head as wide as the map."""

    def __init__(self, d: int, sizes: ImageTokenSizes) -> None:
        super().__init__()
        self.norm = nn.GroupNorm(sizes.groups, d, eps=1e-6)
        self.qkv = nn.Conv2d(d, 3 * d, 1)
        self.out = nn.Conv2d(d, d, 1)

    def forward(self, x: Float[Tensor, "b d h w"]) -> Float[Tensor, "b d h w"]:
        """Look."""
        q, k, v = self.qkv(self.norm(x)).flatten(2).mT[:, None].chunk(3, dim=-1)
        seen = attend(q, k, v).values[:, 0].mT.unflatten(-1, x.shape[2:])
        return x + self.out(seen)


class Halve(nn.Module):
    """Half as many rows and columns; the border is filled below and to the right only."""

    def __init__(self, d: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(d, d, 3, stride=2)

    def forward(self, x: Float[Tensor, "b d h w"]) -> Float[Tensor, "b d h2 w2"]:
        """Halve."""
        return self.conv(functional.pad(x, (0, 1, 0, 1)))


class Double(nn.Module):
    """Twice as many rows and columns: every cell four times, then a filter."""

    def __init__(self, d: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(d, d, 3, padding=1)

    def forward(self, x: Float[Tensor, "b d h w"]) -> Float[Tensor, "b d h2 w2"]:
        """Double."""
        return self.conv(functional.interpolate(x, scale_factor=2.0, mode="nearest"))


class Scale(nn.Module):
    """The blocks of one scale and the way to the next."""

    def __init__(
        self, d_in: int, d_out: int, sizes: ImageTokenSizes, *, blocks: int, looks: bool, resize: nn.Module | None
    ) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(ResidualBlock(d_out if i else d_in, d_out, sizes) for i in range(blocks))
        self.attentions = nn.ModuleList(CellAttention(d_out, sizes) for _ in range(blocks if looks else 0))
        self.resize = resize or nn.Identity()

    def forward(self, x: Float[Tensor, "b c h w"]) -> Float[Tensor, "b d h2 w2"]:
        """Through all blocks."""
        for i, block in enumerate(self.blocks):
            x = block(x)
            if len(self.attentions):
                x = self.attentions[i](x)
        return self.resize(x)


class ConvStack(nn.Module):
    """Convolutions that make a map of codes of a picture (``down``), or a picture of such a map (``up``)."""

    def __init__(self, d_in: int, d_out: int, sizes: ImageTokenSizes, *, way: Literal["down", "up"]) -> None:
        super().__init__()
        widths = [sizes.channels * m for m in sizes.multipliers]
        down = way == "down"
        before = [sizes.channels, *widths[:-1]] if down else [widths[-1], *reversed(widths[1:])]
        after = widths if down else widths[::-1]
        last = len(widths) - 1
        coarsest = last if down else 0
        self.conv_in = nn.Conv2d(d_in, before[0], 3, padding=1)
        self.scales = nn.ModuleList(
            Scale(
                before[i],
                after[i],
                sizes,
                blocks=sizes.blocks + (0 if down else 1),
                looks=sizes.attention and i == coarsest,
                resize=None if i == last else (Halve if down else Double)(after[i]),
            )
            for i in range(len(widths))
        )
        wide = widths[-1]
        self.middle = nn.Sequential(
            ResidualBlock(wide, wide, sizes), CellAttention(wide, sizes), ResidualBlock(wide, wide, sizes)
        )
        self.norm = nn.GroupNorm(sizes.groups, after[-1], eps=1e-6)
        self.conv_out = nn.Conv2d(after[-1], d_out, 3, padding=1)
        self.down = down

    def forward(self, x: Float[Tensor, "b c h w"]) -> Float[Tensor, "b d h2 w2"]:
        """Through all scales; the middle is at the coarsest one."""
        x = self.conv_in(x)
        if not self.down:
            x = self.middle(x)
        for scale in self.scales:
            x = scale(x)
        if self.down:
            x = self.middle(x)
        return self.conv_out(functional.silu(self.norm(x)))


class Reconstruction(NamedTuple):
    """What came through the codes.

    Attributes:
        pixels: As the decoder gives them, in 0..1 where it is good; not clipped.
        ids: Codes in raster order.
        codebook: As in :class:`~plait.models.codebook.Coded`.
        commitment: Likewise.
    """

    pixels: Float[Tensor, "b 3 h w"]
    ids: Int[Tensor, "b rows columns"]
    codebook: Float[Tensor, ""]
    commitment: Float[Tensor, ""]


class Recoded(NamedTuple):
    """Ragged pictures that came through the codes; losses are sums over all of them."""

    media: Patches
    codebook: Float[Tensor, ""]
    commitment: Float[Tensor, ""]


class ImageTokenizer(nn.Module):
    """Pictures to codes and back.

    Args:
        sizes: Shape.
        batch_size: Pictures of one size computed together at most by :meth:`forward`; 0: all.

    Example:
        >>> tokenizer = ImageTokenizer(ImageTokenSizes(channels=8, multipliers=(1, 2), groups=4, codes=32, d_code=4))
        >>> ids = tokenizer.encode(torch.rand(2, 3, 16, 24))
        >>> ids.shape, tokenizer.decode(ids).shape
        (torch.Size([2, 8, 12]), torch.Size([2, 3, 16, 24]))
    """

    def __init__(self, sizes: ImageTokenSizes, *, batch_size: int = 0) -> None:
        super().__init__()
        self.sizes, self.batch_size = sizes, batch_size
        self.encoder = ConvStack(3, sizes.d_latent, sizes, way="down")
        self.to_codes = nn.Conv2d(sizes.d_latent, sizes.d_code, 1)
        self.quantizer = VectorQuantizer(
            sizes.codes, sizes.d_code, normalize=sizes.normalize, decay=sizes.decay, restart=sizes.restart
        )
        self.from_codes = nn.Conv2d(sizes.d_code, sizes.d_latent, 1)
        self.decoder = ConvStack(sizes.d_latent, 3, sizes, way="up")

    def forward(self, media: Patches) -> Recoded:
        """Send ragged pictures through the codes, those of one size together.

        Raises:
            DataError: Rows and grid disagree, or a side is no multiple of a cell.
        """
        sums: list[tuple[Tensor, Tensor]] = []

        def again(pixels: Float[Tensor, "b 3 h w"]) -> Float[Tensor, "b n 3"]:
            found = self.reconstruct(pixels)
            sums.append((found.codebook, found.commitment))
            return found.pixels.flatten(2).mT

        made = by_size(media, again, grid_out=media.grid, d_out=3, batch_size=self.batch_size, name=type(self).__name__)
        zero = self.quantizer.codes.new_zeros(())
        codebook, commitment = (
            torch.stack(parts).sum() for parts in (zip(*sums, strict=True) if sums else [[zero]] * 2)
        )
        return Recoded(made, codebook, commitment)

    def reconstruct(self, pixels: Float[Tensor, "b 3 h w"]) -> Reconstruction:
        """Through the codes and back, with gradients: pictures of one size, RGB in 0..1.

        Raises:
            DataError: A side is no multiple of a cell.
        """
        coded = self.quantizer(self.latents(pixels).permute(0, 2, 3, 1))
        made = self._drawn(coded.values)
        return Reconstruction(made, coded.ids, coded.codebook, coded.commitment)

    def latents(self, pixels: Float[Tensor, "b 3 h w"]) -> Float[Tensor, "b e rows columns"]:
        """What the encoder makes of pictures, before each cell becomes a code.

        Raises:
            DataError: A side is no multiple of a cell.
        """
        cell = self.sizes.cell
        if any(side % cell or not side for side in pixels.shape[2:]):
            raise DataError(
                f"a picture has {pixels.shape[2]} x {pixels.shape[3]} pixels, a code stands for {cell} x {cell}",
                place="ImageTokenizer input",
                remedy=f"scale pictures to multiples of {cell}",
            )
        return self.to_codes(self.encoder((pixels * 2 - 1).to(self.to_codes.weight.dtype)))

    @torch.no_grad()
    def encode(self, pixels: Float[Tensor, "b 3 h w"]) -> Int[Tensor, "b rows columns"]:
        """Codes of pictures, each a number below ``sizes.codes``.

        Raises:
            DataError: A side is no multiple of a cell.
        """
        return self.quantizer.nearest(self.quantizer.placed(self.latents(pixels).permute(0, 2, 3, 1)))

    @torch.no_grad()
    def decode(self, ids: Int[Tensor, "b rows columns"]) -> Float[Tensor, "b 3 h w"]:
        """Pictures of codes; what is below 0 or above 1 becomes 0 or 1.

        Raises:
            DataError: A code is not one of ours.
        """
        if ids.numel() and not 0 <= int(ids.min()) <= int(ids.max()) < self.sizes.codes:
            raise DataError(
                f"codes from {int(ids.min())} to {int(ids.max())} came, there are {self.sizes.codes}",
                place="ImageTokenizer.decode",
                remedy="give codes, counted from 0, and not token ids of a vocabulary",
            )
        return self._drawn(self.quantizer.lookup(ids)).clamp(0, 1)

    def _drawn(self, codes: Float[Tensor, "b rows columns e"]) -> Float[Tensor, "b 3 h w"]:
        return (self.decoder(self.from_codes(codes.permute(0, 3, 1, 2))) + 1) / 2


def peak_signal_to_noise(found: Float[Tensor, "b *n"], wanted: Float[Tensor, "b *n"]) -> Sequence[float]:
    """``-10 log10(mean squared error)`` of each picture with pixels in 0..1, in decibels; infinite where equal.

    Example:
        >>> peak_signal_to_noise(torch.full((1, 3, 2, 2), 0.6), torch.full((1, 3, 2, 2), 0.5))
        [20.0]
    """
    error = (found - wanted).flatten(1).to(torch.float64).square().mean(1)
    return [round(x, 4) for x in (-10 * error.log10()).tolist()]
