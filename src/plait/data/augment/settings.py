"""How pictures are changed while training, as settings. Imports no torch and no Pillow."""

from __future__ import annotations

from typing import Annotated

from pydantic import Field, model_validator

from plait.core.spec import Spec

Chance = Annotated[float, Field(ge=0.0, le=1.0)]
"""How often something is done, from never (0) to always (1)."""


class Crop(Spec):
    """A part of the picture, scaled to the square that the tower takes (Inception's crop)."""

    area: tuple[float, float] = (0.2, 1.0)
    """Least and most share of the picture's area; SimCLR's least is 0.08, MoCo's 0.2."""
    ratio: tuple[float, float] = (3 / 4, 4 / 3)
    """Least and most width over height; drawn evenly on a logarithmic scale."""

    @model_validator(mode="after")
    def _ordered(self) -> Crop:
        if not 0 < self.area[0] <= self.area[1] <= 1:
            raise ValueError(f"area is {list(self.area)}: shares above 0 and up to 1, the smaller one first")
        if not 0 < self.ratio[0] <= self.ratio[1]:
            raise ValueError(f"ratio is {list(self.ratio)}: numbers above 0, the smaller one first")
        return self


class Color(Spec):
    """Brightness, contrast, saturation and hue, in random order; each factor is drawn from 1 - x to 1 + x.

    SimCLR's are 0.8, 0.8, 0.8 and 0.2, times a strength.
    """

    chance: Chance = 0.8
    """How often."""
    strength: float = Field(default=1.0, ge=0.0, le=2.0)
    """Factor of the four that follow; SimCLR tries 1/8 to 1."""
    brightness: float = Field(default=0.4, ge=0.0)
    """Black is factor 0."""
    contrast: float = Field(default=0.4, ge=0.0)
    """The picture's mean gray is factor 0."""
    saturation: float = Field(default=0.4, ge=0.0)
    """Gray is factor 0."""
    hue: float = Field(default=0.1, ge=0.0, le=0.5)
    """Most that hues are turned by, either way, in turns of the color circle."""

    @model_validator(mode="after")
    def _turns(self) -> Color:
        if self.strength * self.hue > 0.5:
            raise ValueError(f"hue is {self.hue:g} at strength {self.strength:g}: 0.5, half a turn, is the most")
        return self


class Blur(Spec):
    """Gaussian blur."""

    chance: Chance = 0.5
    """How often."""
    sigma: tuple[float, float] = (0.1, 2.0)
    """Least and most standard deviation, in pixels of a picture of 224 a side; it goes with the size."""

    @model_validator(mode="after")
    def _ordered(self) -> Blur:
        if not 0 <= self.sigma[0] <= self.sigma[1]:
            raise ValueError(f"sigma is {list(self.sigma)}: numbers from 0, the smaller one first")
        return self


class Solarize(Spec):
    """Levels from a threshold on are inverted."""

    chance: Chance = 0.0
    """How often; BYOL's is 0.2, of one of two views."""
    threshold: int = Field(default=128, ge=0, le=256)
    """Least level that is inverted."""


class Changes(Spec):
    """How a view of a picture comes about, in this order. It follows from seed, epoch, sample and number alone.

    For pictures without texts: a mirrored or recolored picture may not fit its caption any more.
    """

    outline: Chance = 0.0
    """How often black lines are drawn along edges, which drawings of one hand have and those of another lack."""
    crop: Crop | None = Crop()
    """A part of the picture; null takes the whole of it, fitted into the tower's square."""
    flip: Chance = 0.5
    """How often left and right are exchanged."""
    color: Color = Color()
    """Colors."""
    gray: Chance = 0.2
    """How often all color is taken out."""
    blur: Blur = Blur()
    """Blur."""
    solarize: Solarize = Solarize()
    """Inverted levels."""
