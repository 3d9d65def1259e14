"""What a model may be made of, as settings: encoders, connectors, decoders. Loads no torch.

Every class is one entry of ``plait list``: its first line says what it is, ``source`` where it comes from.
"""

from typing import Annotated, ClassVar, Literal

from pydantic import Field, model_validator

from plait.core.spec import Spec

Positive = Annotated[int, Field(ge=1)]
Share = Annotated[float, Field(ge=0.0, lt=1.0)]


class Part(Spec):
    """Base of all parts of a model."""

    source: ClassVar[str] = ""
    """Paper or project."""


# --- sizes of pictures ---------------------------------------------------------------------------------------------


class Square(Part):
    """the whole picture fitted into one square, the rest filled."""

    source: ClassVar[str] = "https://arxiv.org/abs/2310.03744"
    kind: Literal["square"] = "square"
    """How pictures are fitted."""


class Native(Part):
    """the picture at its own resolution and shape, rounded to whole cells (Qwen2-VL)."""

    source: ClassVar[str] = "https://arxiv.org/abs/2409.12191"
    kind: Literal["native"] = "native"
    """How pictures are fitted."""
    max_pixels: int = Field(default=0, ge=0)
    """Larger pictures are scaled down to this many; 0 is as many as the tower's square has."""
    min_pixels: int = Field(default=0, ge=0)
    """Smaller pictures are scaled up to about this many; 0 scales none up, except to one cell."""
    join: Positive = 1
    """Sides are multiples of so many cells, for a connector that joins as many a side (`shuffle`)."""


class Tiles(Part):
    """an overview, and the picture cut into squares that the tower takes (LLaVA-NeXT, LLaVA-OneVision)."""

    source: ClassVar[str] = "https://arxiv.org/abs/2408.03326"
    kind: Literal["tiles"] = "tiles"
    """How pictures are fitted."""
    max_tiles: int = Field(default=9, ge=2)
    """Most squares of a picture, its overview not counted."""


Fit = Annotated[Square | Native | Tiles, Field(discriminator="kind")]
"""How pictures become items of pixels."""


# --- encoders ------------------------------------------------------------------------------------------------------


class PretrainedImage(Part):
    """picture tower of Hugging Face from a folder, or the packaged EfficientNet-Lite0."""

    source: ClassVar[str] = "https://huggingface.co/docs/transformers"
    kind: Literal["pretrained"] = "pretrained"
    """Which encoder this is."""
    name: str = "efficientnet-lite0"
    """`efficientnet-lite0`, or a local folder in Hugging Face's layout."""
    size: int = Field(default=0, ge=0)
    """Pixels a side that pictures are fitted into; 0 takes the tower's own."""
    fit: Fit = Square()
    """How pictures are fitted: into one square, at their own resolution, or in tiles with an overview."""
    layer: int = Field(default=-1, le=-1)
    """Which hidden layer is taken, counted from the end; LLaVA takes -2."""
    dtype: Literal["auto", "bfloat16", "float32"] = "auto"
    """Number format of the frozen weights."""


class ViT(Part):
    """vision transformer from scratch: absolute, relative or hybrid positions, pictures of any size."""

    source: ClassVar[str] = "https://arxiv.org/abs/2010.11929"
    kind: Literal["vit"] = "vit"
    """Which encoder this is."""
    size: Positive = 224
    """Pixels a side that pictures are fitted into; learned positions are made for it."""
    patch: Positive = 16
    """Pixels a side of a patch."""
    d: Positive = 384
    """Width."""
    depth: Positive = 12
    """Blocks."""
    heads: Positive = 6
    """Heads of attention."""
    d_ff: int = Field(default=0, ge=0)
    """Width inside the feed-forward networks; 0 is four times the width."""
    position: Literal["learned", "sincos", "row_column", "none"] = "learned"
    """Absolute position code."""
    relative: Literal["none", "grid_bias", "alibi", "rope", "rope_unit"] = "none"
    """Relative position code; with an absolute one it is a hybrid."""
    class_token: bool = True
    """Whether a learned token stands in front of the patches."""
    registers: int = Field(default=0, ge=0)
    """Further learned tokens in front."""
    norm: Literal["layer", "rms"] = "layer"
    """Kind of norms."""
    norm_place: Literal["pre", "post"] = "pre"
    """Where norms stand."""
    dropout: Share = 0.0
    """Share of what each part adds that is dropped while training."""
    drop_path: Share = 0.0
    """Share of pictures for which the last block is skipped while training; earlier ones less."""
    patch_dropout: Share = 0.0
    """Share of the patches of each picture that is left out while training (FLIP): blocks take about that much less
    time and memory. Not with relative positions."""


class ResNet(Part):
    """convolutional network with maps at four scales."""

    source: ClassVar[str] = "https://arxiv.org/abs/1512.03385"
    kind: Literal["resnet"] = "resnet"
    """Which encoder this is."""
    size: Positive = 224
    """Pixels a side that pictures are fitted into."""
    depth: Literal[18, 34, 50, 101, 152] = 18
    """Layers, as in the paper's table 1."""
    width: Annotated[int, Field(ge=8, multiple_of=8)] = 64
    """Channels of the stem; the paper's is 64, all others scale with it."""


class EfficientNetLite(Part):
    """light convolutional network for real time, from scratch."""

    source: ClassVar[str] = "https://arxiv.org/abs/1905.11946"
    kind: Literal["efficientnet-lite"] = "efficientnet-lite"
    """Which encoder this is."""
    size: Positive = 224
    """Pixels a side that pictures are fitted into."""


class Swin(Part):
    """attention in windows that shift, on maps that get coarser; cost linear in the picture's area."""

    source: ClassVar[str] = "https://arxiv.org/abs/2103.14030"
    kind: Literal["swin"] = "swin"
    """Which encoder this is."""
    size: Positive = 224
    """Pixels a side that pictures are fitted into."""
    patch: Positive = 4
    """Pixels a side of a cell of the first stage."""
    d: Positive = 96
    """Width of the first stage; each later one has twice as much."""
    depths: tuple[Positive, ...] = (2, 2, 6, 2)
    """Blocks of each stage."""
    heads: tuple[Positive, ...] = (3, 6, 12, 24)
    """Heads of each stage."""
    window: Positive = 7
    """Cells a side of a window."""
    drop_path: Share = 0.1
    """Share of pictures for which the last block is skipped while training; earlier ones less."""


class Hybrid(Part):
    """early convolutions as patch embedding, then a Transformer."""

    source: ClassVar[str] = "https://arxiv.org/abs/2106.14881"
    kind: Literal["hybrid"] = "hybrid"
    """Which encoder this is."""
    size: Positive = 224
    """Pixels a side that pictures are fitted into."""
    widths: tuple[Positive, ...] = (48, 96, 192, 384)
    """Channels after each convolution of stride 2; four make cells of 16 pixels."""
    d: Positive = 384
    """Width of the Transformer."""
    depth: Positive = 11
    """Blocks."""
    heads: Positive = 6
    """Heads of attention."""
    relative: Literal["none", "grid_bias", "rope"] = "none"
    """Relative position code, beside 2-D sines and cosines."""


class CoAtNet(Part):
    """convolutional stages first, stages of attention with a relative bias last, in CoAtNet's form."""

    source: ClassVar[str] = "https://arxiv.org/abs/2106.04803"
    kind: Literal["coatnet"] = "coatnet"
    """Which encoder this is."""
    size: Positive = 224
    """Pixels a side that pictures are fitted into; relative biases are made for it."""
    widths: tuple[Positive, ...] = (64, 96, 192, 384, 768)
    """Channels of the stem and of each stage; every stage halves the map."""
    depths: tuple[Positive, ...] = (2, 2, 3, 5, 2)
    """Filters of the stem, blocks of each stage."""
    attention: Positive = 2
    """How many of the stages have attention, the last ones."""
    d_head: Positive = 32
    """Width of heads."""


ScratchImage = Annotated[ViT | ResNet | EfficientNetLite | Swin | Hybrid | CoAtNet, Field(discriminator="kind")]
"""Encoders of pictures from scratch: their weights are drawn, not loaded."""

ImageEncoder = Annotated[
    PretrainedImage | ViT | ResNet | EfficientNetLite | Swin | Hybrid | CoAtNet, Field(discriminator="kind")
]
"""All encoders of pictures."""


# --- connectors ----------------------------------------------------------------------------------------------------


class Linear(Part):
    """one linear layer, a token a cell (LLaVA)."""

    source: ClassVar[str] = "https://arxiv.org/abs/2304.08485"
    kind: Literal["linear"] = "linear"
    """Which connector this is."""
    shuffle: Positive = 1
    """So many cells a side are joined first (pixel shuffle)."""


class Mlp(Part):
    """two layers with GELU, a token a cell (LLaVA-1.5)."""

    source: ClassVar[str] = "https://arxiv.org/abs/2310.03744"
    kind: Literal["mlp"] = "mlp"
    """Which connector this is."""
    shuffle: Positive = 1
    """So many cells a side are joined first (pixel shuffle)."""
    d_hidden: int = Field(default=0, ge=0)
    """Width between the layers; 0 is the decoder's."""
    norm: bool = True
    """A norm in front; LLaVA-1.5 has none."""
    dropout: Share = 0.0
    """Share of inputs and hidden units dropped while training."""


class Words(Part):
    """two layers, then tokens that are mixtures of the decoder's word embeddings, beside some that are free."""

    source: ClassVar[str] = "https://arxiv.org/abs/2502.01341"
    kind: Literal["words"] = "words"
    """Which connector this is."""
    shuffle: Positive = 2
    """So many cells a side are joined first (pixel shuffle)."""
    d_hidden: Positive = 1024
    """Width between the two layers."""
    dropout: Share = 0.0
    """Share of inputs and hidden units dropped while training. The tune stage drops in its first phase only: a decoder
    learns to compare word and picture from clear tokens first (and then from others, see `adapt.drop`)."""
    tokens: Annotated[int, Field(ge=2)] = 6
    """Tokens that a joined cell becomes."""
    free: Positive = 2
    """How many of these may point anywhere; the others are mixtures of words."""

    @model_validator(mode="after")
    def _mixes(self) -> "Words":
        if self.free >= self.tokens:
            raise ValueError(f"{self.free} of {self.tokens} tokens are free: leave at least one that is a mixture")
        return self


class QFormerShape(Part):
    """sizes of a Q-Former; the defaults are BLIP-2's."""

    source: ClassVar[str] = "https://arxiv.org/abs/2301.12597"
    queries: Positive = 32
    """Tokens that come out, whatever the size of the picture."""
    d: Positive = 768
    """Width."""
    depth: Positive = 12
    """Blocks."""
    heads: Positive = 12
    """Heads of attention."""
    every: Positive = 2
    """Every so many blocks look at the picture."""
    dropout: Share = 0.1
    """Share dropped while training."""

    @model_validator(mode="after")
    def _divides(self) -> "QFormerShape":
        if self.d % self.heads:
            raise ValueError(f"{self.heads} heads do not divide a width of {self.d}")
        return self


class QFormer(QFormerShape):
    """learned queries that look at all tokens every other block (BLIP-2)."""

    kind: Literal["qformer"] = "qformer"
    """Which connector this is."""
    start: Literal["drawn", "pretrain"] = "drawn"
    """Weights at the start: drawn, or those of the Q-Former that this run's pretrain stage trained (BLIP-2's first
    stage, `stages.pretrain.qformer`), which must have the same sizes."""


class Resampler(Part):
    """learned latents that look at all tokens and at themselves (Flamingo's Perceiver resampler)."""

    source: ClassVar[str] = "https://arxiv.org/abs/2204.14198"
    kind: Literal["resampler"] = "resampler"
    """Which connector this is."""
    queries: Positive = 64
    """Tokens that come out, whatever the size of the picture."""
    depth: Positive = 6
    """Blocks."""
    heads: Positive = 8
    """Heads of attention."""


class GatedCrossAttention(Part):
    """layers inside the frozen decoder that read the picture through a gate that starts at 0 (Flamingo)."""

    source: ClassVar[str] = "https://arxiv.org/abs/2204.14198"
    kind: Literal["gated-cross-attention"] = "gated-cross-attention"
    """Which connector this is."""
    every: Positive = 4
    """Before every so many layers of the decoder, from the first on."""
    heads: Positive = 8
    """Heads of attention."""
    resampler: Resampler | None = Resampler()
    """What makes a fixed number of tokens of the picture first; null lets the layers look at all of its tokens."""


Connector = Annotated[Linear | Mlp | Words | QFormer | Resampler | GatedCrossAttention, Field(discriminator="kind")]
"""All connectors."""


# --- positions -----------------------------------------------------------------------------------------------------

_ABSOLUTE, _RELATIVE, _ROTARY = (f"plait.models.position.{name}" for name in ("absolute", "relative", "rotary"))
POSITIONS: dict[str, tuple[str, str, str]] = {
    "learned": (
        "a learned vector a place, interpolated to other sizes",
        "https://arxiv.org/abs/2010.11929",
        f"{_ABSOLUTE}.LearnedGrid",
    ),
    "sincos": ("sines and cosines of any size", "https://arxiv.org/abs/1706.03762", f"{_ABSOLUTE}.SinCosGrid"),
    "row_column": (
        "a learned vector a row plus one a column",
        "https://arxiv.org/abs/2307.06304",
        f"{_ABSOLUTE}.LearnedRowColumn",
    ),
    "box": (
        "learned vectors for edges, width and height of a token's box on a page (LayoutLM)",
        "https://arxiv.org/abs/1912.13318",
        f"{_ABSOLUTE}.LearnedBox",
    ),
    "grid_bias": (
        "a learned number a head and offset on the scores (Swin, BEiT)",
        "https://arxiv.org/abs/2103.14030",
        f"{_RELATIVE}.GridBias",
    ),
    "buckets": (
        "a learned number a head and bucket of distances (T5)",
        "https://arxiv.org/abs/1910.10683",
        f"{_RELATIVE}.BucketBias",
    ),
    "alibi": (
        "scores fall with the distance, at fixed rates",
        "https://arxiv.org/abs/2108.12409",
        f"{_RELATIVE}.LinearBias",
    ),
    "shaw": (
        "a learned vector a clipped offset, against the query",
        "https://arxiv.org/abs/1803.02155",
        f"{_RELATIVE}.KeyOffsets",
    ),
    "rope": (
        "queries and keys turned by their place, in 1-D and 2-D",
        "https://arxiv.org/abs/2104.09864",
        f"{_ROTARY}.Rotary.grid",
    ),
    "rope_unit": (
        "2-D rotation over the unit square (DINOv3)",
        "https://arxiv.org/abs/2508.10104",
        f"{_ROTARY}.Rotary.unit_grid",
    ),
    "m_rope": (
        "rotation by time, row and column (Qwen2-VL)",
        "https://arxiv.org/abs/2409.12191",
        f"{_ROTARY}.Rotary.multimodal",
    ),
}
"""Name → what it is, its source, and what makes it. An absolute and a relative one together are a hybrid."""
