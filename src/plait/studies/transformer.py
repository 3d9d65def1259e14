"""Claims about Transformers, tried on sequences whose answers are known.

Self-attention is said to capture dependencies over long distances, layer normalization to speed up convergence,
residual connections to mitigate vanishing gradients, and several heads to capture different subspaces. Baselines have
as many weights; every arm gets its best of the same learning rates; and what contradicts the claims is published like
what supports them.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal, get_args

from pydantic import Field, model_validator

from plait.core.events import Events
from plait.core.spec import Spec
from plait.studies.study import Study

ReaderName = Literal["transformer", "gru", "cnn", "dilated"]
NormPlace = Literal["pre", "post", "none"]
CodeName = Literal["sincos", "learned", "rope", "t5", "shaw"]
Several = Annotated[int, Field(ge=1)]
Rates = tuple[Annotated[float, Field(gt=0.0)], ...]


class Distance(Spec):
    """A word so far back: by attention, by recurrence and by convolution."""

    readers: tuple[ReaderName, ...] = get_args(ReaderName)
    """Which; `cnn` has 4 layers of kernel 5, `dilated` 6 of kernel 3 that skip 1, 2, 4, ... words."""

    lags: tuple[Several, ...] = (2, 8, 16, 32)
    """Distances. `copy`: a training for each, which word stood so far back? `keep`: one, which word was marked?"""

    tuned: Several = 8
    """The distance at which learning rates of `copy` are chosen, for all distances."""

    length: int = Field(default=48, ge=4)
    """Words of a sequence."""

    words: int = Field(default=8, ge=2)
    """Different words."""

    weights: int = Field(default=18_000, ge=1)
    """At most so many weights, words and head too; every reader is as wide as that allows."""

    batch: int = Field(default=16, ge=1)
    """Sequences an update, none seen before."""

    steps: int = Field(default=300, ge=1)
    """Updates."""

    @model_validator(mode="after")
    def _inside(self) -> Distance:
        if not self.lags or max(*self.lags, self.tuned) >= self.length:
            raise ValueError(f"lags {self.lags} (tuned at {self.tuned}) of {self.length} words: give shorter ones")
        return self


class Ablation(Spec):
    """Norms and residuals, each with and without."""

    places: tuple[NormPlace, ...] = get_args(NormPlace)
    """Of the norms."""

    depths: tuple[Several, ...] = (2, 8)
    """Blocks of what is trained."""

    gradients: tuple[Several, ...] = (2, 8, 24)
    """Blocks of what is asked for its gradients at the start, untrained."""

    length: int = Field(default=16, ge=2)
    """Words of a sequence."""

    lag: int = Field(default=3, ge=1)
    """Which word stood so far back?"""

    words: int = Field(default=8, ge=2)
    """Different words."""

    loss: float = Field(default=0.5, gt=0.0)
    """Steps are counted until the mean loss of ten updates is no more."""

    steps: int = Field(default=250, ge=1)
    """At most so many; a training that does not get there counts with so many."""

    batch: int = Field(default=16, ge=1)
    """Sequences an update, none seen before."""

    @model_validator(mode="after")
    def _inside(self) -> Ablation:
        if self.lag >= self.length:
            raise ValueError(f"lag {self.lag} is outside of {self.length} words: give a longer length")
        return self


class Heads(Spec):
    """One block with more heads, each narrower."""

    heads: tuple[Several, ...] = (1, 2, 4, 8)
    """How many."""

    lags: tuple[Several, Several] = (1, 4)
    """Relations are two words so far back, and the marked one; the second alone is the control."""

    length: int = Field(default=16, ge=2)
    """Words of a sequence."""

    words: int = Field(default=8, ge=2)
    """Different words."""

    steps: int = Field(default=400, ge=1)
    """Updates."""

    batch: int = Field(default=32, ge=1)
    """Sequences an update, none seen before."""

    @model_validator(mode="after")
    def _inside(self) -> Heads:
        if max(self.lags) + 1 >= self.length:
            raise ValueError(f"lag {max(self.lags)} leaves nothing of {self.length} words: give a longer length")
        return self


class TransformerStudy(Study):
    """The study of Transformers: all settings of it."""

    name: Literal["transformer"] = "transformer"
    """Which study."""

    seeds: int = Field(default=5, ge=3)
    """Trainings of every arm that count, seeded 0, 1, ...: first weights and sequences."""

    tuning: int = Field(default=2, ge=1)
    """Further seeds, on which the learning rate is chosen and which do not count."""

    lrs: Rates = (1e-3, 4e-3, 1.6e-2)
    """Peak learning rates to choose from."""

    d: int = Field(default=32, ge=8, multiple_of=8)
    """Width of the Transformers of norms and of heads."""

    attention_heads: int = Field(default=4, ge=1)
    """Heads wherever they are not what is tried."""

    code: CodeName = "rope"
    """How all Transformers know positions."""

    rows: int = Field(default=512, ge=1)
    """Test sequences for each seed, which no training sees."""

    distance: Distance = Distance()
    """How far."""

    ablation: Ablation = Ablation()
    """Norms and residuals."""

    several: Heads = Heads()
    """Heads."""

    @model_validator(mode="after")
    def _splits(self) -> TransformerStudy:
        bad = [n for n in (*self.several.heads, self.attention_heads) if self.d % (2 * n)]
        if bad:
            raise ValueError(f"a width of {self.d} in {bad[0]} heads is no even number each: choose other heads")
        if not self.lrs:
            raise ValueError("no learning rate to choose from: give one or more in lrs")
        return self

    def collect(self, *, events: Events) -> dict[str, Any]:
        """Train and ask: see :meth:`Study.collect`."""
        from plait.studies.stacking.trials import collect

        return collect(self, events=events)

    @staticmethod
    def markdown(results: dict[str, Any]) -> str:
        """Tables of what ``collect`` returned."""
        from plait.studies.stacking.tables import markdown

        return markdown(results)
