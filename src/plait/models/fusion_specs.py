"""Fusions of any number of modalities as settings; beside :mod:`plait.models.specs`. Loads no torch.

Widths of the modalities are no settings: the towers before a fusion have them, and
:func:`plait.models.build_fusion.build_fusion` is told.
"""

from typing import Annotated, ClassVar, Literal

from pydantic import Field

from plait.models.specs import Part, Positive, Share

Weight = Annotated[float, Field(ge=0.0)]

# --- fusions that stand on their own ---------------------------------------------------------------------------------


class Concat(Part):
    """vectors of all modalities side by side: the baseline."""

    source: ClassVar[str] = "https://arxiv.org/abs/1705.09406"
    kind: Literal["concat"] = "concat"
    """Which fusion this is."""
    d_out: int = Field(default=256, ge=0)
    """Width of a linear layer after; 0: the concatenation as it is."""
    normalize: Literal["none", "layer", "unit", "rms"] = "layer"
    """Of each modality on its own, so that none dominates by its scale."""
    flags: bool = False
    """Append 1 or 0 for every modality that is present or not."""
    tokens: dict[str, Positive] = Field(default_factory=dict)
    """Tokens of each modality, which all count; a modality that is not named is averaged to one."""


class Early(Part):
    """tokens of all modalities are one sequence of a joint Transformer (ViLT)."""

    source: ClassVar[str] = "https://arxiv.org/abs/2102.03334"
    kind: Literal["early"] = "early"
    """Which fusion this is."""
    d: Positive = 256
    """Width of the joint Transformer, to which each modality is projected."""
    depth: Positive = 4
    """Its blocks."""
    heads: Positive = 4
    """Its heads."""
    sees: dict[str, tuple[str, ...]] = Field(default_factory=dict)
    """What each modality sees; one that is not named sees all."""
    dropout: Share = 0.0
    """Share of what each part adds that is dropped while training."""


class Decision(Part):
    """every modality decides among classes, then decisions are merged."""

    source: ClassVar[str] = "https://arxiv.org/abs/1706.04599"
    kind: Literal["decision"] = "decision"
    """Which fusion this is."""
    classes: Positive = 2
    """How many."""
    d_hidden: int = Field(default=0, ge=0)
    """Width of a hidden layer of each classifier; 0: a linear one."""
    rule: Literal["average", "product", "vote", "weighted", "stacking"] = "average"
    """Mean of probabilities, product of experts, majority, learned weights, or a linear model over decisions."""
    weights: dict[str, Weight] = Field(default_factory=dict)
    """Fixed weights of all modalities, for the first three rules; empty: all alike."""
    prior: tuple[Annotated[float, Field(gt=0.0)], ...] = ()
    """Probabilities of the classes, for `product`: then it is Bayes' rule for independent modalities."""


class CrossModal(Part):
    """one modality asks all others by cross-attention, word by word or as a sentence."""

    source: ClassVar[str] = "https://arxiv.org/abs/1706.03762"
    kind: Literal["cross-modal"] = "cross-modal"
    """Which fusion this is."""
    target: str = "text"
    """Modality that asks, whose tokens come out."""
    heads: Positive = 4
    """Heads of attention."""
    d_k: int = Field(default=0, ge=0)
    """Width of a head's queries and keys; 0 is the target's width by the heads."""
    d_v: int = Field(default=0, ge=0)
    """Width of a head's values; 0 is that of keys."""
    level: Literal["token", "sentence"] = "token"
    """Whether every token asks, or their mean."""
    source_level: Literal["token", "sentence"] = "token"
    """Whether tokens are looked at, or only their mean."""
    norm_place: Literal["pre", "post", "none"] = "pre"
    """Where the norm stands."""
    gated: bool = False
    """What is added passes a gate that is 0 at the start."""
    dropout: Share = 0.0
    """Share of what is added dropped while training."""


class ModalityAttention(Part):
    """a learned question weighs the modalities of each sample; the weights can be read."""

    source: ClassVar[str] = "https://arxiv.org/abs/1706.03762"
    kind: Literal["attention"] = "attention"
    """Which fusion this is."""
    d_out: Positive = 256
    """Width it works in, and of the result."""
    heads: Positive = 4
    """Each weighs the modalities on its own."""
    dropout: Share = 0.0
    """Share of weights dropped while training."""


class Gated(Part):
    """learned gates say, number by number, how much of each modality passes (GMU)."""

    source: ClassVar[str] = "https://arxiv.org/abs/1702.01992"
    kind: Literal["gated"] = "gated"
    """Which fusion this is."""
    d_out: Positive = 256
    """Width of the result, and of each gate."""
    tied: bool = False
    """Two modalities share one gate."""
    sees: Literal["all", "own"] = "all"
    """Whether a gate looks at all modalities, or at its own."""
    bias: bool = True
    """Whether layers have one; the paper's equations have none."""


class Bilinear(Part):
    """every number of one modality times every number of the other, in full."""

    source: ClassVar[str] = "https://pytorch.org/docs/stable/generated/torch.nn.Bilinear.html"
    kind: Literal["bilinear"] = "bilinear"
    """Which fusion this is."""
    d_out: Positive = 256
    """Width of the result; weights are the product of all three widths."""
    one: bool = True
    """Append 1 to both, so that an absent one leaves the other."""


class Mlb(Part):
    """products of low rank of any number of modalities (MLB)."""

    source: ClassVar[str] = "https://arxiv.org/abs/1610.04325"
    kind: Literal["mlb"] = "mlb"
    """Which fusion this is."""
    d_out: Positive = 256
    """Width of the result."""
    rank: Positive = 512
    """Width of the product."""
    activation: Literal["tanh", "none"] = "tanh"
    """Of each factor."""


class Mfb(Part):
    """products summed in groups, signed root, length 1 (MFB)."""

    source: ClassVar[str] = "https://arxiv.org/abs/1708.01471"
    kind: Literal["mfb"] = "mfb"
    """Which fusion this is."""
    d_out: Positive = 256
    """Width of the result."""
    k: Positive = 5
    """Factors of each number of the result."""
    dropout: Share = 0.0
    """Share of the product dropped while training."""
    normalize: bool = True
    """Signed square root and length 1 at the end."""
    bias: bool = True
    """Whether layers have one; the paper's equation has none."""


class Mcb(Part):
    """products of all modalities hashed into few numbers (MCB)."""

    source: ClassVar[str] = "https://arxiv.org/abs/1606.01847"
    kind: Literal["mcb"] = "mcb"
    """Which fusion this is."""
    d_out: Positive = 256
    """Width of the result."""
    size: Positive = 16_000
    """Numbers of the sketch."""
    seed: int = Field(default=0, ge=0)
    """Draws which number goes where; kept with the weights."""
    one: bool = True
    """Append 1 to each modality, so that an absent one leaves the others."""


class Lmf(Part):
    """the outer product of all modalities, never made: a weight tensor of low rank (LMF)."""

    source: ClassVar[str] = "https://arxiv.org/abs/1806.00064"
    kind: Literal["lmf"] = "lmf"
    """Which fusion this is."""
    d_out: Positive = 256
    """Width of the result."""
    rank: Positive = 4
    """Of the weight tensor."""


class Graph(Part):
    """tokens of all modalities are nodes that hear their neighbors (GCN, GAT)."""

    source: ClassVar[str] = "https://arxiv.org/abs/1710.10903"
    kind: Literal["graph"] = "graph"
    """Which fusion this is."""
    layer: Literal["gat", "gcn"] = "gat"
    """Attention among neighbors (arXiv 1710.10903), or their mean by degree (arXiv 1609.02907)."""
    d: Positive = 256
    """Width of the nodes, to which each modality is projected."""
    d_out: Positive = 256
    """Width of the result."""
    depth: Positive = 2
    """Layers."""
    heads: Positive = 4
    """Heads of attention, where there is one."""
    neighbors: int = Field(default=0, ge=0)
    """Each node hears its so many nearest; 0: all hear all."""
    sparse: bool = False
    """Pass the graph on as a list of edges: less memory where there are few."""


class Temporal(Part):
    """gates that change from step to step with what was seen so far."""

    source: ClassVar[str] = "https://arxiv.org/abs/1406.1078"
    kind: Literal["temporal"] = "temporal"
    """Which fusion this is."""
    d_out: Positive = 256
    """Width of the result."""
    d_memory: Positive = 32
    """Width of the state that remembers."""


class Hierarchical(Part):
    """words with regions, phrases with objects, sentence with picture; a score at each level."""

    source: ClassVar[str] = "https://arxiv.org/abs/1606.00061"
    kind: Literal["hierarchical"] = "hierarchical"
    """Which fusion this is."""
    d: Positive = 256
    """Width of the shared space."""
    d_out: Positive = 256
    """Width of the result."""
    heads: Positive = 4
    """Heads of each level's attention."""
    levels: Annotated[tuple[Literal["word", "phrase", "sentence"], ...], Field(min_length=1)] = (
        "word",
        "phrase",
        "sentence",
    )
    """Which levels there are."""
    window: Literal[1, 3, 5, 7, 9] = 3
    """Tokens of a phrase where none are known."""


SingleFusion = Annotated[
    Concat
    | Early
    | Decision
    | CrossModal
    | ModalityAttention
    | Gated
    | Bilinear
    | Mlb
    | Mfb
    | Mcb
    | Lmf
    | Graph
    | Temporal
    | Hierarchical,
    Field(discriminator="kind"),
]
"""Fusions that stand on their own."""

# --- fusions made of others ------------------------------------------------------------------------------------------


class Late(Part):
    """each modality is encoded on its own, then any fusion, then a head."""

    source: ClassVar[str] = "https://arxiv.org/abs/1705.09406"
    kind: Literal["late"] = "late"
    """Which fusion this is."""
    d: Positive = 256
    """Width that each modality is encoded to."""
    depth: int = Field(default=0, ge=0)
    """Blocks of each encoder; 0: one linear layer, which is fusion of features."""
    heads: Positive = 4
    """Heads of those blocks."""
    fusion: SingleFusion = Gated()
    """What merges."""
    d_out: int = Field(default=0, ge=0)
    """Width of a linear head; 0: none."""


class Intermediate(Part):
    """one tower a modality, which exchange after chosen blocks (ViLBERT), then any fusion."""

    source: ClassVar[str] = "https://arxiv.org/abs/1908.02265"
    kind: Literal["intermediate"] = "intermediate"
    """Which fusion this is."""
    d: Positive = 256
    """Width of the towers, to which each modality is projected."""
    depth: Positive = 4
    """Blocks of each tower."""
    heads: Positive = 4
    """Heads of towers and exchanges."""
    after: Annotated[tuple[Annotated[int, Field(ge=0)], ...], Field(min_length=1)] = (1, 3)
    """Blocks after which they exchange, counted from 0."""
    exchange: Literal["reads", "broadcast"] = "reads"
    """By cross-attention, or by a fused vector that goes back into every token; both change nothing at the start."""
    reads: dict[str, tuple[str, ...]] = Field(default_factory=dict)
    """Whom each modality reads; empty: all read all others."""
    through: SingleFusion = Gated()
    """What makes the vector that is broadcast."""
    merge: SingleFusion = Gated()
    """What merges at the end."""


Candidate = Annotated[
    Concat
    | Early
    | Decision
    | CrossModal
    | ModalityAttention
    | Gated
    | Bilinear
    | Mlb
    | Mfb
    | Mcb
    | Lmf
    | Graph
    | Temporal
    | Hierarchical
    | Late
    | Intermediate,
    Field(discriminator="kind"),
]
"""What a search chooses among."""


class Searched(Part):
    """several fusions mixed by learned shares, of which the largest is chosen (DARTS)."""

    source: ClassVar[str] = "https://arxiv.org/abs/1806.09055"
    kind: Literal["searched"] = "searched"
    """Which fusion this is."""
    candidates: dict[str, Candidate] = Field(
        default_factory=lambda: {"concat": Concat(), "gated": Gated()}, min_length=2
    )
    """Fusions by a name of yours; their results have one width."""


Fusion = Annotated[
    Concat
    | Early
    | Late
    | Decision
    | Intermediate
    | CrossModal
    | ModalityAttention
    | Gated
    | Bilinear
    | Mlb
    | Mfb
    | Mcb
    | Lmf
    | Graph
    | Temporal
    | Hierarchical
    | Searched,
    Field(discriminator="kind"),
]
"""All fusions."""
