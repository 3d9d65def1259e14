"""Claims about connectors between a frozen tower and a frozen decoder, tried on scenes whose truth is known.

Query connectors are said to compress a picture into few tokens; LLaVA to need no more than one or two layers; and
layers that read inside the frozen decoder to join language and vision better. All connectors get the same frozen
weights, samples and steps, and the best of the same learning rates; what contradicts the claims is published like what
supports them.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal, get_args

from pydantic import Field

from plait.core.events import Events
from plait.core.spec import Spec
from plait.studies.study import Study

Kind = Literal["count", "color", "right", "read"]
"""Of a question."""
Arm = Literal[
    "linear",
    "mlp",
    "mlp-4",
    "mlp-wide",
    "shuffle-4",
    "qformer-4",
    "qformer-16",
    "resampler-4",
    "gated",
]
"""A connector by name, with the tokens that come out of it where they are not one a cell."""


class Language(Spec):
    """The decoder, and how it learns to answer about scenes in words before it is frozen."""

    d: int = Field(default=64, ge=8)
    """Width."""

    depth: int = Field(default=3, ge=1)
    """Layers."""

    heads: int = Field(default=4, ge=1)
    """Heads of attention."""

    steps: int = Field(default=1000, ge=1)
    """Updates."""

    asked: int = Field(default=8, ge=4, multiple_of=4)
    """Questions about each scene of a batch, of each kind as many."""

    lr: float = Field(default=3e-3, gt=0.0)
    """Peak learning rate."""


class Sight(Spec):
    """The picture tower, and how it learns what is where, through a wide head, before it is frozen."""

    d: int = Field(default=64, ge=8)
    """Width."""

    depth: int = Field(default=2, ge=1)
    """Blocks."""

    heads: int = Field(default=4, ge=1)
    """Heads of attention."""

    steps: int = Field(default=300, ge=1)
    """Updates."""

    lr: float = Field(default=2e-3, gt=0.0)
    """Peak learning rate."""


class ConnectorStudy(Study):
    """The study of connectors: all settings of it."""

    name: Literal["connectors"] = "connectors"
    """Which study."""

    arms: Annotated[tuple[Arm, ...], Field(min_length=1)] = get_args(Arm)
    """Connectors to try."""

    seeds: int = Field(default=3, ge=3)
    """Independent decoders and towers, with their scenes, questions and first weights; all connectors get the same."""

    language: Language = Language()
    """The decoder."""

    sight: Sight = Sight()
    """The tower."""

    steps: int = Field(default=700, ge=1)
    """Updates of each connector."""

    batch: int = Field(default=16, ge=1)
    """Scenes an update."""

    asked: int = Field(default=8, ge=4, multiple_of=4)
    """Questions about each scene of a batch, of each kind as many."""

    pool: int = Field(default=4000, ge=1)
    """Training pictures of each seed, whose features are computed once; questions are drawn anew each time."""

    lrs: Annotated[tuple[Annotated[float, Field(gt=0.0)], ...], Field(min_length=1)] = (1e-3, 3e-3, 1e-2)
    """Peak learning rates; each connector gets the one that is best for it with the first seed, on other questions."""

    gates: float = Field(default=10.0, gt=0.0)
    """Gates of gated cross-attention learn so many times as fast as what is behind them: they begin closed, and Adam
    moves each by its rate a step."""

    rows: int = Field(default=400, ge=1)
    """Test questions of each kind for each seed, about scenes that no training sees."""

    margin: float = Field(default=0.02, gt=0.0)
    """What counts as no more than a little: a share of right answers."""

    def collect(self, *, events: Events) -> dict[str, Any]:
        """Train and ask: see :meth:`Study.collect`."""
        from plait.studies.connecting.trials import collect

        return collect(self, events=events)

    @staticmethod
    def markdown(results: dict[str, Any]) -> str:
        """Tables of what ``collect`` returned."""
        from plait.studies.connecting.tables import markdown

        return markdown(results)
