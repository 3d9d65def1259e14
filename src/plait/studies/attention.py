"""Claims about attention as the way to fuse two modalities, tried on scenes of regions and questions of words.

Cross-modal attention is said to be the key mechanism of fusion and to find what belongs together, to cost more, and to
be interpretable; gates are said to lose detail, and graphs to need knowledge of the domain. Here it is known which
region a question asks about, so that a map can be held against it. Every fusion gets as many weights, steps and rates
to choose from as the others, and what contradicts the claims is published like what supports them.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal, get_args

from pydantic import Field, model_validator

from plait.core.events import Events
from plait.core.spec import Spec
from plait.studies.study import Study

ArmName = Literal[
    "early",
    "late",
    "late-tower",
    "gated",
    "low-rank",
    "cross-1",
    "cross-2",
    "cross-gated",
    "joint",
    "graph-true",
    "graph-random",
    "graph-full",
]


class Scenes(Spec):
    """What is seen and asked."""

    rows: int = Field(default=3, ge=2)
    """Rows of the grid."""

    columns: int = Field(default=3, ge=2)
    """Columns of the grid; every cell holds one region, and every shape is there once."""

    colours: int = Field(default=6, ge=2)
    """Colours; each region has one at random."""

    marks: int = Field(default=6, ge=2)
    """Kinds of the small mark that one region of each scene has."""

    loudness: float = Field(default=0.5, gt=0.0)
    """Length of the code of a mark; that of a shape, a colour, a size, a row and a column is 1."""

    noise: float = Field(default=0.1, ge=0.0)
    """Standard deviation of what is added to every number of a region."""

    d_region: int = Field(default=40, ge=2)
    """Width of a region's vector; it has to hold all codes at right angles."""

    d_word: int = Field(default=24, ge=2)
    """Width of a word's vector; likewise."""

    @model_validator(mode="after")
    def _fits(self) -> Scenes:
        cells = self.rows * self.columns
        regions, words = cells + self.colours + 2 + self.rows + self.columns + self.marks, cells + 8
        if regions > self.d_region or words > self.d_word:
            raise ValueError(
                f"codes of {regions} properties and {words} words do not stand at right angles in widths of "
                f"{self.d_region} and {self.d_word}: raise d_region and d_word"
            )
        return self


class AttentionStudy(Study):
    """The study of attention: all settings of it."""

    name: Literal["attention"] = "attention"
    """Which study."""

    arms: tuple[ArmName, ...] = get_args(ArmName)
    """Fusions to try."""

    seeds: int = Field(default=5, ge=3)
    """Independent codes, with their samples and first weights, seeded 0, 1, ...; all arms get the same."""

    weights: int = Field(default=16_000, ge=1)
    """At most so many weights, head and all; every arm is as wide as that allows."""

    steps: int = Field(default=1000, ge=1)
    """Updates, each on samples never seen before; all kinds of questions are asked as often."""

    batch: int = Field(default=128, ge=1)
    """Samples an update."""

    lrs: tuple[Annotated[float, Field(gt=0.0)], ...] = Field(default=(2e-3, 5e-3), min_length=1)
    """Peak learning rates; each arm takes the one that is best with a seed that is not counted."""

    rows: int = Field(default=1500, ge=1)
    """Test samples of each kind of question for each seed, which no training sees."""

    deleted: int = Field(default=2, ge=1)
    """Regions that are taken away to see whether a map is faithful."""

    scenes: Scenes = Scenes()
    """What is seen and asked."""

    wide: tuple[int, int, int] = (512, 196, 16)
    """Width, regions and words of a table of costs at the size of real towers."""

    @model_validator(mode="after")
    def _leaves(self) -> AttentionStudy:
        cells = self.scenes.rows * self.scenes.columns
        if self.deleted >= cells:
            raise ValueError(f"deleted is {self.deleted}, a scene has {cells} regions: fewer have to go")
        return self

    def collect(self, *, events: Events) -> dict[str, Any]:
        """Train and ask: see :meth:`Study.collect`."""
        from plait.studies.attending.trials import collect

        return collect(self, events=events)

    @staticmethod
    def markdown(results: dict[str, Any]) -> str:
        """Tables of what ``collect`` returned."""
        from plait.studies.attending.tables import markdown

        return markdown(results)
