"""Claims about encoders of pictures, tried on four towers of equal operations and on scenes whose truth is known.

Vision transformers are said to need much data and to be strong with it, to lack the locality of convolutions and to
cost more; Swin to keep their power for less; convolutions to suit details and to miss the whole; hybrids to join both.
What contradicts the claims is published like what supports them.
"""

from __future__ import annotations

from itertools import pairwise
from typing import Annotated, Any, Literal, get_args

from pydantic import Field, model_validator

from plait.core.events import Events
from plait.core.spec import Spec
from plait.studies.study import Study

EncoderName = Literal["cnn", "vit", "swin", "hybrid"]
ENCODERS: tuple[EncoderName, ...] = get_args(EncoderName)
"""All four are tried: most claims are about one beside another."""


class DataSizes(Spec):
    """ViT and CNN on few pictures, with as many updates as on many."""

    pictures: tuple[Annotated[int, Field(ge=1)], ...] = (500, 2000, 8000)
    """Different training pictures; the largest size is that of the main part, where every update has new ones."""


class Shift(Spec):
    """Trained with objects in one half of the picture, asked about objects in the other."""

    encoders: tuple[EncoderName, ...] = ("cnn", "vit")
    """Which; the claim is about these two."""

    steps: int = Field(default=500, ge=1)
    """Updates."""


class Alignment(Spec):
    """A tower of pictures and a Transformer of texts learn one space by contrast."""

    encoders: tuple[EncoderName, ...] = ("cnn", "vit")
    """Which; the claim is about these two."""

    steps: int = Field(default=400, ge=1)
    """Updates."""

    batch: int = Field(default=64, ge=2)
    """Pairs an update."""

    rows: int = Field(default=512, ge=8)
    """Test pairs for each seed, all beside each other."""


class Probes(Spec):
    """What a linear layer reads from each layer of the ViT."""

    rows: int = Field(default=3000, ge=30)
    """Pictures; two thirds to fit, the rest to ask."""


class Encoders(Study):
    """The study of encoders: all settings of it."""

    name: Literal["encoders"] = "encoders"
    """Which study."""

    seeds: int = Field(default=5, ge=3)
    """Independent weights and pictures, seeded 0, 1, ...; all encoders of a seed get the same pictures."""

    steps: int = Field(default=900, ge=1)
    """Updates of the main part and of the data sizes."""

    batch: int = Field(default=32, ge=2)
    """Pictures an update."""

    lrs: tuple[Annotated[float, Field(gt=0.0)], ...] = (7e-4, 1.5e-3, 3e-3)
    """Peak learning rates that every encoder may have: the best with a seed that does not count, of the main part and
    of the alignment each; data sizes and shift take that of the main part."""

    rows: int = Field(default=1000, ge=10)
    """Test pictures for each seed, which no training sees."""

    sizes: tuple[Annotated[int, Field(ge=28, multiple_of=28)], ...] = (112, 224, 448, 896)
    """Pixels a side at which operations of ViT and Swin are counted."""

    margin: float = Field(default=0.02, ge=0.0)
    """Swin keeps the power of ViT if its mean accuracy is not lower by more than this."""

    data: DataSizes = DataSizes()
    """Few and many pictures."""

    shift: Shift = Shift()
    """Where no object was in training."""

    align: Alignment = Alignment()
    """Pictures and texts in one space."""

    probes: Probes = Probes()
    """Layer by layer."""

    @model_validator(mode="after")
    def _compares(self) -> Encoders:
        for part, encoders in (("shift", self.shift.encoders), ("align", self.align.encoders)):
            if not {"cnn", "vit"} <= set(encoders):
                raise ValueError(f"{part}.encoders lacks cnn or vit, which the claim compares: name both")
        return self

    @model_validator(mode="after")
    def _grows(self) -> Encoders:
        sizes = (*self.data.pictures, self.steps * self.batch)
        if not self.data.pictures or any(a >= b for a, b in pairwise(sizes)):
            raise ValueError(
                f"data.pictures {self.data.pictures} have to grow, and to end below steps x batch = {sizes[-1]}: "
                "give other sizes, or more steps"
            )
        return self

    def collect(self, *, events: Events) -> dict[str, Any]:
        """Train and ask: see :meth:`Study.collect`."""
        from plait.studies.seeing.trials import collect

        return collect(self, events=events)

    @staticmethod
    def markdown(results: dict[str, Any]) -> str:
        """Tables of what ``collect`` returned."""
        from plait.studies.seeing.tables import markdown

        return markdown(results)
