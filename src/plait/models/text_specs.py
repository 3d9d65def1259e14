"""Encoders of texts as settings; beside :mod:`plait.models.specs`. Loads no torch."""

from typing import Annotated, ClassVar, Literal

from pydantic import Field

from plait.models.specs import Part, Positive, Share


class PretrainedText(Part):
    """BERT-like sentence encoder of Hugging Face from a folder, or the packaged all-MiniLM-L6-v2."""

    source: ClassVar[str] = "https://arxiv.org/abs/1908.10084"
    kind: Literal["pretrained"] = "pretrained"
    """Which encoder this is."""
    name: str = "minilm"
    """`minilm`, or a local folder in Hugging Face's layout."""
    max_tokens: Positive = 128
    """Longest text."""
    dtype: Literal["auto", "bfloat16", "float32"] = "auto"
    """Number format of the frozen weights."""


class Bert(Part):
    """every token sees all others; norms come after (BERT). The defaults are base's."""

    source: ClassVar[str] = "https://arxiv.org/abs/1810.04805"
    kind: Literal["bert"] = "bert"
    """Which encoder this is."""
    vocabulary: Positive = 30_522
    """Token ids."""
    max_tokens: Positive = 512
    """Longest text; positions are learned."""
    d: Positive = 768
    """Width."""
    depth: Positive = 12
    """Blocks."""
    heads: Positive = 12
    """Heads of attention."""
    d_ff: int = Field(default=0, ge=0)
    """Width inside the feed-forward networks; 0 is four times the width."""
    types: int = Field(default=2, ge=0)
    """Kinds of tokens that have a learned vector (BERT's two sentences); 0: none."""
    page: int = Field(default=0, ge=0)
    """Columns and rows of a page on which each token has a box (LayoutLM: 1,024); 0: texts have no places."""
    pool: Literal["first", "mean"] = "first"
    """What a text's one vector is made of."""
    pooler: bool = True
    """A linear layer and tanh over it."""
    masked_head: bool = False
    """BERT's head for masked tokens."""
    dropout: Share = 0.1
    """Share of what each part adds that is dropped while training."""


class Gpt(Part):
    """a token sees those before it; norms come first (GPT-2). The defaults are its small size."""

    source: ClassVar[str] = "https://openai.com/index/better-language-models/"
    kind: Literal["gpt"] = "gpt"
    """Which encoder this is."""
    vocabulary: Positive = 50_257
    """Token ids."""
    max_tokens: Positive = 1024
    """Longest text; positions are learned."""
    d: Positive = 768
    """Width."""
    depth: Positive = 12
    """Blocks."""
    heads: Positive = 12
    """Heads of attention."""
    d_ff: int = Field(default=0, ge=0)
    """Width inside the feed-forward networks; 0 is four times the width."""
    pool: Literal["last", "mean"] = "last"
    """What a text's one vector is made of."""
    head: bool = True
    """An output layer, which is the embedding table."""
    dropout: Share = 0.1
    """Share of what each part adds that is dropped while training."""


class Llama(Part):
    """a token sees those before it; rotary positions, RMS norms, gated networks (LLaMA). A small size by default."""

    source: ClassVar[str] = "https://arxiv.org/abs/2302.13971"
    kind: Literal["llama"] = "llama"
    """Which encoder this is."""
    vocabulary: Positive = 32_000
    """Token ids."""
    d: Positive = 768
    """Width."""
    depth: Positive = 12
    """Blocks."""
    heads: Positive = 12
    """Heads of queries."""
    kv_heads: int = Field(default=0, ge=0)
    """Heads of keys and values; 0 is as many as of queries."""
    d_ff: Positive = 2048
    """Width inside the feed-forward networks."""
    rope_base: float = Field(default=10_000.0, gt=1)
    """Base of the rotation."""
    pool: Literal["last", "mean"] = "last"
    """What a text's one vector is made of."""
    head: bool = True
    """An output layer."""
    tied: bool = False
    """Whether that is the embedding table."""
    dropout: Share = 0.0
    """Share of what each part adds that is dropped while training."""


class T5(Part):
    """reads one text and writes another, with a relative bias (T5). The defaults are its small size."""

    source: ClassVar[str] = "https://arxiv.org/abs/1910.10683"
    kind: Literal["t5"] = "t5"
    """Which encoder this is."""
    vocabulary: Positive = 32_128
    """Token ids."""
    d: Positive = 512
    """Width."""
    depth: Positive = 6
    """Blocks of the encoder."""
    depth_decoder: int = Field(default=0, ge=0)
    """Blocks of the decoder; 0 is as many."""
    heads: Positive = 8
    """Heads of attention."""
    d_ff: Positive = 2048
    """Width inside the feed-forward networks."""
    tied: bool = True
    """Whether the output layer is the embedding table."""
    dropout: Share = 0.1
    """Share of what each part adds that is dropped while training."""


ScratchText = Annotated[Bert | Gpt | Llama | T5, Field(discriminator="kind")]
"""Encoders of texts from scratch."""

ScratchTextTower = Annotated[Bert | Gpt | Llama, Field(discriminator="kind")]
"""Those that give a text one vector."""

TextEncoder = Annotated[PretrainedText | Bert | Gpt | Llama | T5, Field(discriminator="kind")]
"""All encoders of texts."""
