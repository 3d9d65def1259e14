"""Claims about training itself, tried through the one training loop on pictures whose truth is known.

Gradient accumulation is said to reduce memory, mixed precision to balance speed and accuracy, parameters, optimizer
states and activations to dominate memory; full fine-tuning to overfit on little data, layer-wise rates to help there;
and freezing, progressive training and a balance of modalities to help multimodal training. Every arm gets its best of
as many tries; what contradicts the claims is published like what supports them.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal, get_args

from pydantic import Field, model_validator

from plait.core.events import Events
from plait.core.spec import Spec
from plait.studies.study import Study

PartName = Literal["memory", "precision", "few", "layers", "mixing"]
Dtype = Literal["float32", "bfloat16", "float16"]
Method = Literal["full", "lora", "head"]
Order = Literal["freeze", "joint", "staged"]
Several = Annotated[int, Field(ge=1)]
Rates = Annotated[tuple[Annotated[float, Field(gt=0.0)], ...], Field(min_length=1)]
Seeds = Annotated[int, Field(ge=3)]


class Memory(Spec):
    """Steps of a ViT, each kind in processes of its own: what they hold, and how long they take."""

    d: int = Field(default=256, ge=8)
    """Width."""

    depth: int = Field(default=6, ge=1)
    """Blocks."""

    heads: int = Field(default=4, ge=1)
    """Heads of attention."""

    patch: int = Field(default=4, ge=1)
    """Pixels a side of a patch."""

    sizes: tuple[Several, ...] = (64, 16)
    """Pixels a side of pictures: activations above the gradients, and far below them."""

    batch: int = Field(default=8, ge=1)
    """Pictures an update."""

    micro: tuple[Several, ...] = (8, 2, 1)
    """Pictures that go through the model at once; the first is the whole batch."""

    dtypes: tuple[Dtype, ...] = get_args(Dtype)
    """Number formats, at the first size, the whole batch at once."""

    steps: int = Field(default=5, ge=4)
    """Updates; the first two are not counted."""

    repeats: Seeds = 3
    """Processes of each kind."""

    tolerance: float = Field(default=0.15, gt=0.0)
    """How far the sum of the counted parts may be from the measured peak, as a share of it."""

    @model_validator(mode="after")
    def _compares(self) -> Memory:
        if not self.micro or not self.sizes or self.micro[0] != self.batch or self.dtypes[:1] != ("float32",):
            raise ValueError(
                f"sizes {self.sizes}, micro {self.micro} with batch {self.batch}, dtypes {self.dtypes}: name a size, "
                "let micro begin with the whole batch, and dtypes with float32, which others are compared with"
            )
        if any(size % self.patch for size in self.sizes):
            raise ValueError(f"sizes {self.sizes} in patches of {self.patch}: choose multiples")
        return self


class Precision(Spec):
    """A tower learns what is in each cell, in each number format, and is asked before it knows all."""

    dtypes: tuple[Dtype, ...] = get_args(Dtype)
    """Number formats; the first one is what others are compared with."""

    steps: int = Field(default=150, ge=1)
    """Updates."""

    margin: float = Field(default=0.02, gt=0.0)
    """Accuracy is kept where the whole interval of what is lost is below this."""


class Few(Spec):
    """Fine-tuning a tower on few pictures to another question: the most frequent color."""

    methods: tuple[Method, ...] = get_args(Method)
    """`full`: all weights; `lora`: adapters in all linear layers, and a head; `head`: a linear layer alone."""

    pictures: tuple[Several, ...] = (16, 64, 250, 1000)
    """Training pictures."""

    lrs: Rates = (3e-4, 1e-3, 3e-3, 1e-2)
    """Peak learning rates to choose from, for every method and number of pictures."""

    rank: int = Field(default=4, ge=1)
    """Of the adapters."""


class Layers(Spec):
    """Full fine-tuning on few pictures with rates that fall from layer to layer, beside one rate for all."""

    pictures: tuple[Several, ...] = (64, 250)
    """Training pictures."""

    uniform: Rates = (3e-4, 1e-3, 2e-3, 3e-3, 5e-3, 1e-2)
    """Rates to choose from where all layers have the same."""

    lrs: Rates = (1e-3, 3e-3, 1e-2)
    """Rates of the last layer to choose from; times `decays` as many tries as `uniform`."""

    decays: Rates = (0.5, 0.75)
    """Rate of a layer over that of the one above it."""


class Mixing(Spec):
    """A picture that is hard to read and words that are easy and often wrong; both name one of six glyphs."""

    orders: tuple[Order, ...] = get_args(Order)
    """`joint`: all at once; `staged`: each modality alone, then all; `freeze`: each alone, then the head alone."""

    pictures: int = Field(default=2000, ge=1)
    """Training samples."""

    steps: int = Field(default=400, ge=4)
    """Updates of `joint`; the others get as many operations."""

    alone: float = Field(default=0.5, gt=0.0, lt=1.0)
    """Share of the operations for each modality alone, where they have such a time."""

    told: float = Field(default=0.7, gt=0.0, le=1.0)
    """Share of samples whose words name the right glyph."""

    noise: float = Field(default=0.1, ge=0.0)
    """Of the pixels."""

    dropped: float = Field(default=0.3, gt=0.0, lt=1.0)
    """Balanced: the probability that a sample is trained without the one or the other modality."""

    lrs: Rates = (1e-3, 3e-3)
    """Peak learning rates to choose from."""


class TrainingStudy(Study):
    """The study of training: all settings of it."""

    name: Literal["training"] = "training"
    """Which study."""

    parts: Annotated[tuple[PartName, ...], Field(min_length=1)] = get_args(PartName)
    """Which claims to try: `memory` (S2-C10, S4-C09, and speed and memory of S2-C11), `precision` (its accuracy), `few`
    (S0-C31), `layers` (S3-27), `mixing` (S4-C08)."""

    seeds: Seeds = 5
    """Trainings of every arm that count, seeded 0, 1, ...: pictures and first weights, the same for all arms."""

    d: int = Field(default=32, ge=8, multiple_of=8)
    """Width of the tower."""

    depth: int = Field(default=3, ge=2)
    """Its blocks."""

    heads: int = Field(default=4, ge=1)
    """Heads of attention."""

    batch: int = Field(default=16, ge=1)
    """Pictures an update."""

    before: int = Field(default=400, ge=1)
    """Updates of the tower before it is fine-tuned."""

    steps: int = Field(default=200, ge=1)
    """Updates of a fine-tuning, for any number of pictures."""

    lr: float = Field(default=3e-3, gt=0.0)
    """Peak learning rate of the tower before it is fine-tuned."""

    rows: int = Field(default=1000, ge=1)
    """Pictures that are asked about and that no training sees, and as many others that choose rates."""

    memory: Memory = Memory()
    """What a step holds."""

    precision: Precision = Precision()
    """Number formats."""

    few: Few = Few()
    """Full, adapters or a head on few pictures."""

    layers: Layers = Layers()
    """Rates by layer."""

    mixing: Mixing = Mixing()
    """Two modalities."""

    def collect(self, *, events: Events) -> dict[str, Any]:
        """Train and ask: see :meth:`Study.collect`."""
        from plait.studies.teaching.trials import collect

        return collect(self, events=events)

    @staticmethod
    def markdown(results: dict[str, Any]) -> str:
        """Tables of what ``collect`` returned."""
        from plait.studies.teaching.tables import markdown

        return markdown(results)
