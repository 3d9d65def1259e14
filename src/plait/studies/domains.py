"""Claims about feature alignment, tried on digits whose look, or whose frequency, differs in the domain they are for.

Feature alignment is said to relieve the mismatch of domains. Covariances (CORAL), distributions (MMD), a judge of
domains (DANN) and a layer in closed form are tried beside nothing, where the look differs, where only the shares of
classes do, and where both do. Strengths are chosen without a label of the target, with as many candidates for all, and
what contradicts the claim is published like what supports it.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import Field

from plait.core.events import Events
from plait.core.spec import Spec
from plait.studies.study import Study

Shift = Literal["none", "noise", "background", "rotation", "thickness"]
Arm = Literal["none", "layer", "coral", "mmd", "dann"]
Positive = Annotated[float, Field(gt=0.0)]
Pair = tuple[Positive, Positive]


class Case(Spec):
    """How the target differs from the source."""

    shift: Shift
    """Its look."""

    skewed: bool = False
    """Whether its classes differ in frequency, each half as frequent as the next; those of the source are equal."""

    @property
    def title(self) -> str:
        """Name in tables."""
        return f"{self.shift} + labels" if self.skewed else self.shift


class Strengths(Spec):
    """Two candidates of what each way has to set, beside the learning rate."""

    none: tuple[float, float] = (0.0, 1e-3)
    """Weight decay, which the others leave at 0."""

    layer: Pair = (0.01, 0.1)
    """Ridge of the layer."""

    coral: Pair = (10.0, 100.0)
    """Weight of the distance of covariances."""

    mmd: Pair = (0.1, 0.3)
    """Weight of the distance of distributions."""

    dann: Pair = (0.3, 1.0)
    """Strength of the reversed gradient at the end."""


class DomainShift(Study):
    """The study of domain shifts: all settings of it."""

    name: Literal["domain-shift"] = "domain-shift"
    """Which study."""

    arms: tuple[Arm, ...] = ("none", "layer", "coral", "mmd", "dann")
    """Ways to align; `none` is always tried."""

    cases: tuple[Case, ...] = (
        Case(shift="none"),
        Case(shift="noise"),
        Case(shift="background"),
        Case(shift="rotation"),
        Case(shift="thickness"),
        Case(shift="none", skewed=True),
        Case(shift="background", skewed=True),
    )
    """Targets."""

    seeds: int = Field(default=5, ge=5)
    """Independent draws of pictures and first weights, seeded 1, 2, ...; all arms get the same. Seed 0 chooses."""

    steps: int = Field(default=300, ge=1)
    """Updates."""

    batch: int = Field(default=64, ge=2)
    """Pictures of each domain an update."""

    pool: int = Field(default=1000, ge=2)
    """Labeled pictures of the source, and as many of the target without labels."""

    held: int = Field(default=500, ge=1)
    """Further labeled pictures of the source, for choosing."""

    rows: int = Field(default=1000, ge=1)
    """Test pictures of each domain for each seed."""

    d_hidden: int = Field(default=128, ge=1)
    """Width of the hidden layer."""

    d: int = Field(default=32, ge=2)
    """Width of the features that are aligned."""

    lrs: Pair = (0.03, 0.1)
    """Peak learning rates that each way is tried with, at both of its strengths: four candidates."""

    strengths: Strengths = Strengths()
    """Strengths that each way is tried with."""

    def collect(self, *, events: Events) -> dict[str, Any]:
        """Train and ask: see :meth:`Study.collect`."""
        from plait.studies.shifting.trials import collect

        return collect(self, events=events)

    @staticmethod
    def markdown(results: dict[str, Any]) -> str:
        """Tables of what ``collect`` returned."""
        from plait.studies.shifting.tables import markdown

        return markdown(results)
