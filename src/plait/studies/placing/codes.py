"""Position codes by name, each made of the same pieces that towers use."""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from jaxtyping import Float, Num
from torch import Tensor, nn

from plait.core.errors import ConfigError
from plait.models.attention import Places
from plait.models.position.absolute import LearnedGrid, LearnedSequence, SinCosGrid, SinCosSequence
from plait.models.position.relative import BucketBias, GridBias, KeyOffsets, LinearBias, gaps
from plait.models.position.rotary import Rotary, unit_coordinates

Sides = tuple[int, ...]
"""``(length,)`` of a sequence, ``(rows, columns)`` of a grid."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Width:
    """What codes need to know of the model.

    Attributes:
        d: Width.
        heads: Heads.
    """

    d: int
    heads: int


class Code(nn.Module):
    """One way of telling a Transformer where its tokens stand: any of an absolute, a rotary and a relative code.

    Args:
        absolute: Called with the sides; added to the tokens.
        rotary: Turns queries and keys.
        relative: Makes the relative code of one block.
        unit: Coordinates of the rotary code run from -1 to 1 whatever the sides.
    """

    def __init__(
        self,
        *,
        absolute: nn.Module | None = None,
        rotary: Rotary | None = None,
        relative: Callable[[int], nn.Module] | None = None,
        unit: bool = False,
    ) -> None:
        super().__init__()
        self.absolute, self.rotary, self.relative, self.unit = absolute, rotary, relative, unit

    def added(self, sides: Sides) -> Float[Tensor, "n d"] | float:
        """What is added to the tokens, in raster order; 0 without an absolute code."""
        if self.absolute is None:
            return 0.0
        if isinstance(self.absolute, LearnedSequence):  # of a grid: its cells in raster order
            return self.absolute(torch.Size(sides).numel())
        return self.absolute(*sides)

    def places(self, sides: Sides, *, front: bool) -> Places:
        """Gaps and turns of the tokens.

        Args:
            sides: Of the sequence or grid.
            front: Whether a token that is no cell comes first; it stands at the origin.
        """
        at = coordinates(sides)
        turn = None
        if self.rotary is not None:
            turn = self.rotary(_with_front(unit_coordinates(*sides) if self.unit else at, front))
        at = _with_front(at, front)
        return Places(gap=gaps(at, at) if self.relative is not None else None, turn=turn)


def coordinates(sides: Sides) -> Num[Tensor, "n a"]:
    """Row and column (or position) of every token, in raster order."""
    return torch.cartesian_prod(*(torch.arange(side) for side in sides)).view(-1, len(sides))


def _with_front(at: Tensor, front: bool) -> Tensor:
    return torch.cat([torch.zeros_like(at[:1]), at]) if front else at


def fit(module: nn.Module, sides: Sides) -> nn.Module:
    """A learned code for other sides, interpolated where it has a table; others reach anywhere as they are."""
    if isinstance(module, LearnedSequence):
        return module.resized(torch.Size(sides).numel())
    if isinstance(module, GridBias):
        rows, columns = sides
        return module.resized(rows, columns)
    return module


# --- by name ---------------------------------------------------------------------------------------------------------


def sequence_code(name: str, width: Width, *, length: int) -> Code:
    """A code of causal sequences that are ``length`` long in training.

    Raises:
        ConfigError: There is no such code.
    """

    def buckets(block: int) -> nn.Module:
        return BucketBias(width.heads, buckets=16, furthest=2 * length, both_ways=False)

    d_head = width.d // width.heads
    made: dict[str, Callable[[], Code]] = {
        "none": Code,
        "sincos": lambda: Code(absolute=SinCosSequence(width.d)),
        "learned": lambda: Code(absolute=LearnedSequence(length, width.d)),
        "rope": lambda: Code(rotary=Rotary.sequence(d_head)),
        "alibi": lambda: Code(relative=lambda block: LinearBias(width.heads)),
        "t5": lambda: Code(relative=buckets),
        "shaw": lambda: Code(relative=lambda block: KeyOffsets(d_head, furthest=length // 2)),
        "sincos+t5": lambda: Code(absolute=SinCosSequence(width.d), relative=buckets),
    }
    return _named(made, name, setting="sequence.codes")


def grid_code(name: str, width: Width, *, side: int) -> Code:
    """A code of square grids with a question in front, ``side`` wide in training.

    Raises:
        ConfigError: There is no such code.
    """

    def bias(block: int) -> nn.Module:
        return GridBias(width.heads, side, side, class_token=True)

    d_head = width.d // width.heads
    made: dict[str, Callable[[], Code]] = {
        "none": Code,
        "learned-1d": lambda: Code(absolute=LearnedSequence(side * side, width.d)),
        "sincos-2d": lambda: Code(absolute=SinCosGrid(width.d)),
        "learned-2d": lambda: Code(absolute=LearnedGrid(side, side, width.d)),
        "bias": lambda: Code(relative=bias),
        "rope-2d": lambda: Code(rotary=Rotary.grid(d_head, base=100.0)),
        "rope-unit": lambda: Code(rotary=Rotary.unit_grid(d_head), unit=True),
        "sincos-2d+bias": lambda: Code(absolute=SinCosGrid(width.d), relative=bias),
    }
    return _named(made, name, setting="grid.codes")


def _named(made: dict[str, Callable[[], Code]], name: str, *, setting: str) -> Code:
    if name not in made:
        raise ConfigError(f"no position code {name!r}", place=setting, remedy=f"choose from: {', '.join(made)}")
    return made[name]()
