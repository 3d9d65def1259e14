"""Claims about fusions of two modalities, tried on vectors whose truth is known.

Concatenation is said to miss interactions, to let a modality dominate by its scale and to fail where one is missing;
gates are said to mend the last; bilinear pooling is said to have many weights and to be hard to train; and the choice
of fusion is said to matter much. Every fusion gets as many weights and steps as the others, and what contradicts the
claims is published like what supports them.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal, get_args

from pydantic import Field, model_validator

from plait.core.events import Events
from plait.core.spec import Spec
from plait.studies.study import Study

FusionName = Literal[
    "concat-linear",
    "concat-flags",
    "concat-mlp",
    "features",
    "attention",
    "gated",
    "low-rank",
    "bilinear",
    "average",
    "product",
]
Norm = Literal["none", "rms"]
Share = Annotated[float, Field(ge=0.0, le=1.0)]


class Interaction(Spec):
    """Labels that add up over modalities, and labels that need both at once."""

    tasks: tuple[Literal["additive", "xor"], ...] = ("additive", "xor")
    """Which."""


class Scale(Spec):
    """A label in one modality, beside noise that is larger."""

    factor: float = Field(default=100.0, ge=1.0)
    """How much larger; tried as large, without `norms`, too."""

    norms: tuple[Norm, ...] = ("none", "rms")
    """Without, and with each modality brought to root mean square 1 on its own."""


class Missing(Spec):
    """Both modalities tell the label, one more surely; that one is lost at the test."""

    tasks: tuple[Literal["centered", "shifted"], ...] = ("centered", "shifted")
    """Whether the mean of what is lost is 0, which is what stands for it, or elsewhere."""

    drops: tuple[Share, ...] = (0.0, 0.25, 0.5, 0.75, 1.0)
    """Shares of test samples that lose it."""

    trained: tuple[Share, ...] = (0.0, 0.3)
    """Probabilities of dropping each modality of each sample in training; never both."""

    strengths: tuple[float, float] = (1.0, 1.5)
    """Half the distance of the two classes in each modality, in units of the noise; the second is lost."""

    offset: float = Field(default=3.0, ge=0.0)
    """How far the mean of what is lost is from 0 in `shifted`, in the direction that tells the label."""

    noise: float = Field(default=3.0, ge=0.0)
    """Asked once more with nothing lost and so much noise added to what else is lost, whose own noise is 1."""


class Rates(Spec):
    """Learning rates, on `xor`."""

    fusions: tuple[FusionName, ...] = ("concat-mlp", "attention", "gated", "low-rank", "bilinear")
    """Of which fusions."""

    lrs: tuple[Annotated[float, Field(gt=0.0)], ...] = (1e-3, 1e-2, 1e-1)
    """Peak learning rates."""


class FusionStudy(Study):
    """The study of fusions: all settings of it."""

    name: Literal["fusion"] = "fusion"
    """Which study."""

    fusions: tuple[FusionName, ...] = get_args(FusionName)
    """Fusions to try."""

    seeds: int = Field(default=5, ge=3)
    """Independent truths, with their samples and first weights, seeded 0, 1, ...; all fusions get the same."""

    d: int = Field(default=8, ge=2)
    """Width of each modality."""

    weights: int = Field(default=700, ge=1)
    """At most so many weights, head and all; every fusion is as wide as that allows."""

    steps: int = Field(default=200, ge=1)
    """Updates, each on samples never seen before."""

    batch: int = Field(default=64, ge=1)
    """Samples an update."""

    lr: float = Field(default=1e-2, gt=0.0)
    """Peak learning rate."""

    rows: int = Field(default=2000, ge=1)
    """Test samples for each seed, which no training sees."""

    wide: tuple[int, int] = (512, 256)
    """Widths of a modality and of the fused vector, for a table of costs at the size of real towers."""

    interaction: Interaction = Interaction()
    """What needs both modalities."""

    scale: Scale = Scale()
    """What is small."""

    missing: Missing = Missing()
    """What is lost."""

    rates: Rates = Rates()
    """How much the learning rate matters."""

    @model_validator(mode="after")
    def _known(self) -> FusionStudy:
        strange = [name for name in self.rates.fusions if name not in self.fusions]
        if strange:
            raise ValueError(
                f"rates of {', '.join(strange)}, which fusions does not name: add it there, or leave it out"
            )
        return self

    def collect(self, *, events: Events) -> dict[str, Any]:
        """Train and ask: see :meth:`Study.collect`."""
        from plait.studies.fusing.trials import collect

        return collect(self, events=events)

    @staticmethod
    def markdown(results: dict[str, Any]) -> str:
        """Tables of what ``collect`` returned."""
        from plait.studies.fusing.tables import markdown

        return markdown(results)
