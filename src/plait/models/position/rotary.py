"""Rotary position codes: queries and keys are turned by angles, so that scores see only differences of places.

Su et al., RoFormer, https://arxiv.org/abs/2104.09864. Every variant here is one class: each pair of dimensions has an
axis it reads and a frequency, and the variants differ in how they choose them.
"""

from typing import NamedTuple

import torch
from jaxtyping import Float, Int, Num
from torch import Tensor, nn

from plait.core.errors import ConfigError
from plait.models.fixed import Fixed


class Turn(NamedTuple):
    """Angles of every token as cosine and sine, of each dimension of a head; a leading axis for rows of a batch."""

    cos: Float[Tensor, "*b t e"]
    sin: Float[Tensor, "*b t e"]


def turned(x: Float[Tensor, "b h t e"], turn: Turn) -> Float[Tensor, "b h t e"]:
    """Turn each pair ``(x[i], x[i + e/2])``; of heads wider than the turn, the first dimensions."""
    cos, sin = (part.unsqueeze(-3).to(x.dtype) for part in turn)
    width = cos.shape[-1]
    head, rest = x[..., :width], x[..., width:]
    low, high = head.chunk(2, dim=-1)
    out = head * cos + torch.cat([-high, low], dim=-1) * sin
    return torch.cat([out, rest], dim=-1) if rest.shape[-1] else out


class Rotary(nn.Module):
    """Angle of pair i of a token at ``at`` = ``at[axis[i]] * frequency[i]``.

    Pairs are ``(i, i + e/2)`` (the order of Hugging Face's LLaMA, not the neighbors of RoFormer); weights of one order
    become those of the other by permuting rows of W_Q and W_K.

    Args:
        axis: Which coordinate each pair reads.
        frequency: Radians a step.

    Example:
        >>> Rotary.sequence(4, base=100.0).frequency.tolist()  # a head of 4 dimensions, 2 pairs
        [1.0, 0.10000000149011612]
    """

    def __init__(self, axis: Int[Tensor, " pair"], frequency: Float[Tensor, " pair"]) -> None:
        super().__init__()
        self._axis, self._frequency = Fixed(axis), Fixed(frequency.float())

    @property
    def axis(self) -> Int[Tensor, " pair"]:
        """Which coordinate each pair reads."""
        return self._axis.values

    @property
    def frequency(self) -> Float[Tensor, " pair"]:
        """Radians a step of each pair."""
        return self._frequency.values

    def forward(self, at: Num[Tensor, "*b t a"]) -> Turn:
        """Cosines and sines of tokens at these coordinates, in float32 whatever the weights of the model are."""
        angles = at.float()[..., self._axis.on(at.device)] * self._frequency.on(at.device)
        angles = torch.cat([angles, angles], dim=-1)
        return Turn(angles.cos(), angles.sin())

    @classmethod
    def sequence(cls, d_head: int, *, base: float = 10_000.0) -> "Rotary":
        """1-D, as in LLaMA: pair i turns by ``base ** (-2i / d_head)`` a position."""
        _divides(d_head, 2)
        pair = torch.arange(0, d_head, 2, dtype=torch.float64, device="cpu")
        return cls(torch.zeros(len(pair), dtype=torch.long, device="cpu"), base ** (-pair / d_head))

    @classmethod
    def grid(cls, d_head: int, *, base: float = 10_000.0) -> "Rotary":
        """2-D, as in Qwen2-VL's tower: the first half of the pairs reads rows, the second columns, same frequencies."""
        _divides(d_head, 4)
        pair = torch.arange(0, d_head // 2, 2, dtype=torch.float64, device="cpu")
        frequency = base ** (-pair / (d_head // 2))
        return cls(torch.tensor([0, 1], device="cpu").repeat_interleave(len(pair)), frequency.repeat(2))

    @classmethod
    def grid_alternating(cls, d_head: int, *, base: float = 10_000.0) -> "Rotary":
        """2-D, as in Pixtral (https://arxiv.org/abs/2410.07073): rows take every other frequency, columns the rest."""
        _divides(d_head, 4)
        frequency = base ** (-torch.arange(0, d_head, 2, dtype=torch.float64, device="cpu") / d_head)
        axis = torch.tensor([0, 1], device="cpu").repeat_interleave(d_head // 4)
        return cls(axis, torch.cat([frequency[::2], frequency[1::2]]))

    @classmethod
    def unit_grid(cls, d_head: int, *, base: float = 100.0) -> "Rotary":
        """2-D over coordinates in -1..1 (:func:`unit_coordinates`), as in DINOv3 (https://arxiv.org/abs/2508.10104).

        The longest period is ``base`` times the shortest, which is half a side of the picture; a picture of any
        resolution has the same range of angles.
        """
        _divides(d_head, 4)
        pair = torch.arange(0, d_head // 2, 2, dtype=torch.float64, device="cpu")
        frequency = 2 * torch.pi * base ** (-pair / (d_head // 2))
        return cls(torch.tensor([0, 1], device="cpu").repeat_interleave(len(pair)), frequency.repeat(2))

    @classmethod
    def multimodal(
        cls, d_head: int, sections: tuple[int, int, int], *, base: float = 1_000_000.0, interleaved: bool = False
    ) -> "Rotary":
        """M-RoPE: pairs read time, row or column (Qwen2-VL, https://arxiv.org/abs/2409.12191).

        Args:
            d_head: Width of a head.
            sections: How many pairs read each.
            base: Of the frequencies, which run over all pairs as in 1-D.
            interleaved: Take turns (t, h, w, t, h, w, ..) instead of blocks, and give time what is left (Qwen3-VL).

        Raises:
            ConfigError: The sections are not the pairs of a head.
        """
        _divides(d_head, 2)
        pairs = d_head // 2
        if sum(sections) != pairs:
            raise ConfigError(
                f"sections {sections} have {sum(sections)} pairs, a head of {d_head} dimensions has {pairs}",
                remedy="give three numbers that add up to half the width of a head",
            )
        axis = torch.arange(3, device="cpu").repeat_interleave(torch.tensor(sections, device="cpu"))
        if interleaved:
            axis = torch.zeros(pairs, dtype=torch.long, device="cpu")
            for which in (1, 2):
                axis[which : 3 * sections[which] : 3] = which
        pair = torch.arange(0, d_head, 2, dtype=torch.float64, device="cpu")
        return cls(axis, base ** (-pair / d_head))


def unit_coordinates(rows: int, columns: int) -> Float[Tensor, "n 2"]:
    """Centers of a grid's cells with every side from -1 to 1, in raster order.

    Example:
        >>> unit_coordinates(1, 2).tolist()
        [[0.0, -0.5], [0.0, 0.5]]
    """
    down, right = ((torch.arange(n) + 0.5) / n * 2 - 1 for n in (rows, columns))
    return torch.cartesian_prod(down, right)


def _divides(d_head: int, parts: int) -> None:
    if d_head % parts:
        raise ConfigError(
            f"a head of {d_head} dimensions cannot be turned in {parts} equal parts",
            remedy=f"choose a width of heads that {parts} divides",
        )
