"""Compact bilinear pooling: the outer product hashed into few numbers, without making it.

Gao et al., https://arxiv.org/abs/1511.06062; Fukui et al., MCB, https://arxiv.org/abs/1606.01847, section 3.1 and
algorithm 1; count sketch of a product as a convolution: Pham and Pagh, 2013.
"""

from collections.abc import Mapping
from functools import reduce

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from plait.models.fusion.bilinear import power_normalized, with_one
from plait.models.fusion.streams import Fused, Inputs, at_least, pooled


class CountSketch(nn.Module):
    """``y[h_i] += s_i x_i``: every number goes to one of ``size`` places with a sign; nothing is learned.

    Args:
        places: Place ``h_i`` of each number.
        signs: Sign ``s_i`` of each number.
        size: How many places there are.

    Example:
        >>> sketch = CountSketch(torch.tensor([0, 2, 0]), torch.tensor([1, -1, -1]), size=3)
        >>> sketch(torch.tensor([[5.0, 3.0, 1.0]])).tolist()
        [[4.0, 0.0, -3.0]]
    """

    places: Tensor
    signs: Tensor

    def __init__(self, places: Int[Tensor, " d"], signs: Int[Tensor, " d"], *, size: int) -> None:
        super().__init__()
        self.size = size
        self.register_buffer("places", places)  # part of the checkpoint: what is learned after depends on them
        self.register_buffer("signs", signs)

    def forward(self, x: Float[Tensor, "b d"]) -> Float[Tensor, "b size"]:
        """Sketch."""
        return x.new_zeros(len(x), self.size).index_add(1, self.places, x * self.signs)


def random_sketch(d: int, size: int, generator: torch.Generator) -> CountSketch:
    """Places and signs drawn evenly, on the generator's device whatever the default device is."""
    places, signs = (torch.randint(count, (d,), generator=generator, device=generator.device) for count in (size, 2))
    return CountSketch(places, 2 * signs - 1, size=size)


def product_sketch(sketches: list[Float[Tensor, "b size"]]) -> Float[Tensor, "b size"]:
    """Sketch of the outer product: the circular convolution of the sketches, by FFT in float32 at least.

    ``<product_sketch(x, y), product_sketch(u, v)>`` is, on average over places and signs, ``<x, u> <y, v>``.
    """
    wide = torch.promote_types(sketches[0].dtype, torch.float)
    spectra = [torch.fft.rfft(sketch.to(wide), dim=-1) for sketch in sketches]
    return torch.fft.irfft(reduce(torch.mul, spectra), n=sketches[0].shape[-1], dim=-1).to(sketches[0].dtype)


class CompactBilinear(nn.Module):
    """MCB: sketch of the outer product of all modalities, signed root, length 1, linear layer.

    Args:
        widths: Width of each modality.
        d_out: Width of the result.
        size: Numbers of the sketch; 16,000 in the paper. ``size d_out`` weights instead of ``d_1 d_2 d_out``.
        generator: Draws places and signs.
        one: Append 1 to each modality, so that an absent one leaves the others.

    Raises:
        ConfigError: Fewer than two modalities.

    Example:
        >>> drawn = torch.Generator().manual_seed(0)
        >>> fuse = CompactBilinear({"image": 2048, "text": 2048}, 10, size=1000, generator=drawn)
        >>> sum(p.numel() for p in fuse.parameters())
        10010
    """

    def __init__(
        self,
        widths: Mapping[str, int],
        d_out: int,
        *,
        size: int,
        generator: torch.Generator,
        one: bool = True,
    ) -> None:
        super().__init__()
        at_least(2, list(widths), kind="compact bilinear pooling")
        self.widths, self.d_out, self.one = dict(widths), d_out, one
        self.sketches = nn.ModuleDict(
            {name: random_sketch(width + int(one), size, generator) for name, width in widths.items()}
        )
        self.out = nn.Linear(size, d_out)

    def forward(self, inputs: Inputs, *, need_weights: bool = False) -> Fused:
        """Fuse."""
        means, there = pooled(inputs, self.widths)
        sketched = [self.sketches[name](with_one(x) if self.one else x) for name, x in means.items()]
        values = self.out(power_normalized(product_sketch(sketched)))
        return Fused(values=values, present=there.any(1))
