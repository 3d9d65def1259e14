"""Small pictures of digits drawn with a pen, and the ways in which those of another domain differ."""

import math
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.nn import functional

from plait.studies.domains import Shift

CLASSES, SIDE = 10, 16
"""Digits, and pixels a side."""

_PEN: tuple[tuple[tuple[int, int], ...], ...] = (
    ((50, 10), (70, 25), (75, 50), (70, 75), (50, 90), (30, 75), (25, 50), (30, 25), (50, 10)),
    ((32, 28), (54, 10), (54, 90)),
    ((25, 30), (40, 11), (65, 13), (72, 35), (25, 90), (78, 90)),
    ((25, 12), (72, 12), (46, 44), (70, 60), (66, 86), (25, 87)),
    ((66, 90), (66, 10), (20, 66), (82, 66)),
    ((73, 10), (31, 10), (28, 46), (60, 42), (75, 64), (61, 89), (25, 87)),
    ((64, 10), (37, 38), (27, 68), (45, 90), (69, 80), (68, 59), (46, 51), (29, 66)),
    ((22, 10), (78, 10), (42, 90)),
    ((50, 48), (30, 30), (50, 10), (70, 30), (50, 48), (28, 70), (50, 90), (72, 70), (50, 48)),
    ((70, 38), (50, 49), (31, 35), (40, 12), (62, 11), (70, 30), (68, 60), (50, 90)),
)
"""Way of the pen for each digit, in hundredths of the picture: to the right, and down."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Digits:
    """Pictures and what they show.

    Attributes:
        pixels: 0 to 1; paper is 0 where nothing is shifted.
        classes: 0 to 9.
    """

    pixels: Float[Tensor, "b side side"]
    classes: Int[Tensor, " b"]

    def __len__(self) -> int:
        """Pictures."""
        return len(self.pixels)

    def take(self, rows: Int[Tensor, " a"]) -> "Digits":
        """Some of them."""
        return Digits(pixels=self.pixels[rows], classes=self.classes[rows])


@dataclass(frozen=True, slots=True, kw_only=True)
class Look:
    """How a domain looks.

    Attributes:
        turned: Mean angle in degrees, clockwise.
        thicker: Added to the half width of the pen, as a share of the side.
        noise: Deviation of Gaussian noise on each pixel.
        clouds: Height of a smooth background.
    """

    turned: float = 0.0
    thicker: float = 0.0
    noise: float = 0.0
    clouds: float = 0.0


LOOKS: Mapping[Shift, Look] = {
    "none": Look(),
    "noise": Look(noise=0.4),
    "background": Look(clouds=0.7),
    "rotation": Look(turned=25.0),
    "thickness": Look(thicker=0.07),
}
"""Of the target. The source looks as ``none``."""


def draw_digits(rows: int, generator: torch.Generator, *, look: Look, shares: Float[Tensor, " class"]) -> Digits:
    """Digits from a generator: each point of the pen's way, the slant, the size, the place and the pen vary.

    Args:
        rows: How many.
        generator: Where they come from.
        look: Of the domain.
        shares: How frequent each class is; any scale.
    """
    classes = torch.multinomial(shares, rows, replacement=True, generator=generator)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator)

    longest = max(map(len, _PEN))
    ways = torch.tensor([(*way, *[way[-1]] * (longest - len(way))) for way in _PEN]) / 100 - 0.5
    points = ways[classes] + 0.025 * normal(rows, longest, 2)
    angle = math.radians(look.turned) + 0.12 * normal(rows)
    turn = torch.stack([angle.cos(), -angle.sin(), angle.sin(), angle.cos()], dim=1).view(rows, 2, 2)
    size = 0.8 + 0.1 * normal(rows, 1, 1).clamp(-2, 2)
    points = size * points @ turn.mT + 0.04 * normal(rows, 1, 2)
    pen = 0.045 + look.thicker + 0.01 * normal(rows).clamp(-2, 2)
    pixels = (SIDE * (pen[:, None, None] - _from_way(points)) + 0.5).clamp(0, 1)
    if look.clouds:
        rough = torch.rand(rows, 1, 4, 4, generator=generator)
        smooth = functional.interpolate(rough, (SIDE, SIDE), mode="bilinear", align_corners=True)[:, 0]
        pixels = pixels.maximum(look.clouds * smooth)
    return Digits(pixels=(pixels + look.noise * normal(rows, SIDE, SIDE)).clamp(0, 1), classes=classes)


def class_shares(skewed: bool, generator: torch.Generator) -> Float[Tensor, " class"]:
    """Equal, or each class half as frequent as the one before, in an order that is drawn."""
    if not skewed:
        return torch.full((CLASSES,), 1 / CLASSES)
    halved = 0.5 ** torch.arange(CLASSES)
    return (halved / halved.sum())[torch.randperm(CLASSES, generator=generator)]


def _from_way(points: Float[Tensor, "b point 2"]) -> Float[Tensor, "b side side"]:
    """Distance of the middle of each pixel from the pen's way."""
    at = (torch.arange(SIDE) + 0.5) / SIDE - 0.5
    pixel = torch.stack(torch.meshgrid(at, at, indexing="xy"), dim=-1).view(1, -1, 1, 2)
    begin, along = points[:, None, :-1], (points[:, 1:] - points[:, :-1])[:, None]
    share = ((pixel - begin) * along).sum(-1) / along.square().sum(-1).clamp(min=1e-9)
    nearest = begin + share.clamp(0, 1)[..., None] * along
    return (pixel - nearest).norm(dim=-1).amin(-1).view(-1, SIDE, SIDE)
