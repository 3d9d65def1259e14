"""Bilinear pooling: every number of one modality times every number of the other; in full, and with few parameters.

Products of all orders need a 1 appended to each modality, as in tensor fusion (https://arxiv.org/abs/1707.07250); then
an absent one leaves the terms of the others, and does not turn the product to 0. In MLB and MFB its factor is 1.
"""

import math
from collections.abc import Mapping
from functools import reduce
from typing import Literal

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn
from torch.nn import functional

from plait.models.fusion.streams import Fused, Inputs, at_least, pooled


class BilinearFusion(nn.Module):
    """``y_o = x_1' A_o x_2 + b_o``: all products, ``d_1 d_2 d_out`` weights.

    Args:
        widths: Width of both modalities.
        d_out: Width of the result.
        one: Append 1 to both; without, an absent modality leaves only the bias.

    Raises:
        ConfigError: Not two modalities.

    Example:
        >>> sum(p.numel() for p in BilinearFusion({"image": 100, "text": 100}, 50, one=False).parameters())
        500050
    """

    def __init__(self, widths: Mapping[str, int], d_out: int, *, one: bool = True) -> None:
        super().__init__()
        names = at_least(2, list(widths), kind="full bilinear pooling", most=2)
        self.widths, self.d_out, self.one = dict(widths), d_out, one
        first, second = (widths[name] + int(one) for name in names)
        self.product = nn.Bilinear(first, second, d_out)

    def forward(self, inputs: Inputs, *, need_weights: bool = False) -> Fused:
        """Fuse."""
        means, there = pooled(inputs, self.widths)
        first, second = (with_one(x) if self.one else x for x in means.values())
        return Fused(values=self.product(first, second), present=there.any(1))


class LowRankBilinear(nn.Module):
    """MLB: ``y = P' (f(U x_1) * f(V x_2))``; with more modalities, the product of all.

    Kim et al., "Hadamard product for low-rank bilinear pooling", https://arxiv.org/abs/1610.04325, equation 10. The
    factor of an absent modality is 1.

    Args:
        widths: Width of each modality.
        d_out: Width of the result.
        rank: Width of the product.
        activation: ``f``.

    Raises:
        ConfigError: Fewer than two modalities.

    Example:
        >>> sum(p.numel() for p in LowRankBilinear({"image": 100, "text": 100}, 50, rank=20).parameters())
        5090
    """

    def __init__(
        self, widths: Mapping[str, int], d_out: int, *, rank: int, activation: Literal["tanh", "none"] = "tanh"
    ) -> None:
        super().__init__()
        at_least(2, list(widths), kind="low-rank bilinear pooling")
        self.widths, self.d_out = dict(widths), d_out
        self.activation: Literal["tanh", "none"] = activation
        self.factors = nn.ModuleDict({name: nn.Linear(width, rank) for name, width in widths.items()})
        self.out = nn.Linear(rank, d_out)

    def forward(self, inputs: Inputs, *, need_weights: bool = False) -> Fused:
        """Fuse."""
        means, there = pooled(inputs, self.widths)
        factors = {name: self.factors[name](x) for name, x in means.items()}
        if self.activation == "tanh":
            factors = {name: factor.tanh() for name, factor in factors.items()}
        return Fused(values=self.out(product_of(factors, there)), present=there.any(1))


class FactorizedBilinear(nn.Module):
    """MFB: ``z_o = sum of k values of (U x_1 * V x_2)``, then signed root and length 1.

    Yu et al., "Multi-modal factorized bilinear pooling", https://arxiv.org/abs/1708.01471, equations 3 to 5.
    It is a full bilinear form whose matrices have rank ``k``. The factor of an absent modality is 1.

    Args:
        widths: Width of each modality.
        d_out: Width of the result.
        k: Factors of each number of the result; 5 in the paper.
        dropout: Share of the product dropped while training.
        normalize: Signed square root and length 1 at the end.
        bias: Whether ``U`` and ``V`` have one; none in equation 3.

    Raises:
        ConfigError: Fewer than two modalities.

    Example:
        >>> sum(p.numel() for p in FactorizedBilinear({"image": 100, "text": 100}, 50, k=5).parameters())
        50500
    """

    def __init__(
        self,
        widths: Mapping[str, int],
        d_out: int,
        *,
        k: int = 5,
        dropout: float = 0.0,
        normalize: bool = True,
        bias: bool = True,
    ) -> None:
        super().__init__()
        at_least(2, list(widths), kind="factorized bilinear pooling")
        self.widths, self.d_out, self.k = dict(widths), d_out, k
        self.dropout, self.normalize = dropout, normalize
        self.factors = nn.ModuleDict({name: nn.Linear(width, k * d_out, bias=bias) for name, width in widths.items()})

    def forward(self, inputs: Inputs, *, need_weights: bool = False) -> Fused:
        """Fuse."""
        means, there = pooled(inputs, self.widths)
        product = product_of({name: self.factors[name](x) for name, x in means.items()}, there)
        product = functional.dropout(product, self.dropout, self.training)
        found = product.unflatten(1, (self.d_out, self.k)).sum(-1)
        return Fused(values=power_normalized(found) if self.normalize else found, present=there.any(1))


class LowRankTensor(nn.Module):
    """LMF: ``h = (sum_r prod_m W_m^r [x_m; 1]) + b``: the outer product of all modalities, never made.

    Liu et al., "Efficient low-rank multimodal fusion with modality-specific factors",
    https://arxiv.org/abs/1806.00064, equations 6 to 8; ranks are weighted by learned numbers, as in its code.

    Args:
        widths: Width of each modality.
        d_out: Width of the result.
        rank: Of the weight tensor.

    Raises:
        ConfigError: Fewer than two modalities.

    Example:
        >>> fuse = LowRankTensor({"image": 30, "text": 20, "audio": 10}, 8, rank=4)
        >>> sum(p.numel() for p in fuse.parameters()), 31 * 21 * 11 * 8 + 8  # and of the whole tensor
        (2028, 57296)
    """

    def __init__(self, widths: Mapping[str, int], d_out: int, *, rank: int = 4) -> None:
        super().__init__()
        at_least(2, list(widths), kind="low-rank tensor fusion")
        self.widths, self.d_out = dict(widths), d_out
        self.factors = nn.ParameterDict()
        for name, width in widths.items():
            # Variance 1 of what comes out of each factor, so that a product of many neither vanishes nor explodes.
            self.factors[name] = nn.Parameter(torch.randn(rank, width + 1, d_out) / math.sqrt(width + 1))
        self.rank_weights = nn.Parameter(torch.randn(rank) / math.sqrt(rank))
        self.bias = nn.Parameter(torch.zeros(d_out))

    def forward(self, inputs: Inputs, *, need_weights: bool = False) -> Fused:
        """Fuse."""
        means, there = pooled(inputs, self.widths)
        parts = [torch.einsum("bd,rdo->bro", with_one(x), self.factors[name]) for name, x in means.items()]
        values = torch.einsum("r,bro->bo", self.rank_weights, reduce(torch.mul, parts)) + self.bias
        return Fused(values=values, present=there.any(1))

    def tensor(self) -> Tensor:
        """The weight tensor that the factors stand for, ``d_1 + 1 .. d_k + 1, d_out``; for looking at small ones."""
        whole = self.rank_weights[:, None]
        for factor in self.factors.values():
            whole = whole[..., None, :] * factor.view(len(factor), *[1] * (whole.ndim - 2), *factor.shape[1:])
        return whole.sum(0)


def with_one(x: Float[Tensor, "b d"]) -> Float[Tensor, "b d1"]:
    """A 1 appended."""
    return functional.pad(x, (0, 1), value=1.0)


def product_of(factors: Mapping[str, Float[Tensor, "b r"]], there: Bool[Tensor, "b m"]) -> Float[Tensor, "b r"]:
    """Product of all modalities' factors; 1 for those that are absent."""
    return reduce(torch.mul, [factor.where(there[:, i, None], 1.0) for i, factor in enumerate(factors.values())])


def power_normalized(x: Float[Tensor, "b d"], *, eps: float = 1e-6) -> Float[Tensor, "b d"]:
    """``sign(x) sqrt|x|``, then length 1.

    Computed as ``x / sqrt(|x| + eps)``: the root alone has an infinite slope at 0, where what is left of an FFT's
    rounding would become the largest gradient of all.
    """
    return functional.normalize(x / (x.abs() + eps).sqrt(), dim=-1)
