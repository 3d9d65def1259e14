"""Claims about position codes, tried on small Transformers: longer sequences, larger grids, places and relations.

Relative codes are said to suit variable lengths and large pictures, hybrids to join the strengths of absolute and
relative codes. Every code is trained at one size with several seeds and asked at that size and at larger ones; what
contradicts the claims is published like what supports them.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import Field, model_validator

from plait.core.events import Events
from plait.core.spec import Spec
from plait.studies.study import Study

SequenceCode = Literal["none", "sincos", "learned", "rope", "alibi", "t5", "shaw", "sincos+t5"]
GridCode = Literal["none", "learned-1d", "sincos-2d", "learned-2d", "bias", "rope-2d", "rope-unit", "sincos-2d+bias"]
Times = tuple[Annotated[int, Field(ge=1)], ...]


class Sequences(Spec):
    """Causal sequences of random words with a marker."""

    codes: tuple[SequenceCode, ...] = ("none", "sincos", "learned", "rope", "alibi", "t5", "shaw", "sincos+t5")
    """Codes to try."""

    length: int = Field(default=16, ge=4)
    """Words in training."""

    times: Times = (1, 2, 4)
    """Lengths of the tests, as multiples of that in training."""

    words: int = Field(default=12, ge=2)
    """Different words."""

    offset: int = Field(default=3, ge=1)
    """The question `near`: which word stood so many places before?"""

    steps: int = Field(default=400, ge=1)
    """Updates."""

    @model_validator(mode="after")
    def _inside(self) -> Sequences:
        if self.offset > self.length // 2:
            raise ValueError(f"offset {self.offset} is more than half of length {self.length}: give a longer length")
        return self


class Grids(Spec):
    """Square grids with two marks, and a question in front."""

    codes: tuple[GridCode, ...] = (
        "none",
        "learned-1d",
        "sincos-2d",
        "learned-2d",
        "bias",
        "rope-2d",
        "rope-unit",
        "sincos-2d+bias",
    )
    """Codes to try."""

    side: int = Field(default=6, ge=2, multiple_of=2)
    """Rows and columns in training."""

    times: Times = (1, 2)
    """Sides of the tests, as multiples of that in training."""

    steps: int = Field(default=400, ge=1)
    """Updates."""


class Positions(Study):
    """The study of position codes: all settings of it."""

    name: Literal["positions"] = "positions"
    """Which study."""

    seeds: int = Field(default=3, ge=2)
    """Independent trainings of every code, seeded 0, 1, ..."""

    d: int = Field(default=32, ge=8, multiple_of=8)
    """Width of the Transformer."""

    heads: int = Field(default=4, ge=1)
    """Heads; each needs a width that 4 divides."""

    depth: int = Field(default=2, ge=1)
    """Blocks."""

    batch: int = Field(default=32, ge=1)
    """Sequences or grids an update."""

    lr: float = Field(default=5e-3, gt=0.0)
    """Peak learning rate."""

    rows: int = Field(default=256, ge=1)
    """Test sequences, and grids a question, for each seed."""

    sequence: Sequences = Sequences()
    """The sequences."""

    grid: Grids = Grids()
    """The grids."""

    @model_validator(mode="after")
    def _splits(self) -> Positions:
        if self.d % (4 * self.heads):
            raise ValueError(f"a width of {self.d} in {self.heads} heads is no multiple of 4 each")
        return self

    def collect(self, *, events: Events) -> dict[str, Any]:
        """Train and ask: see :meth:`Study.collect`."""
        from plait.studies.placing.trials import collect

        return collect(self, events=events)

    @staticmethod
    def markdown(results: dict[str, Any]) -> str:
        """Tables of what ``collect`` returned."""
        from plait.studies.placing.tables import markdown

        return markdown(results)
