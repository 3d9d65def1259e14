"""Text transformers from scratch: BERT-, GPT- and LLaMA-like are the same class with other sizes.

BERT: https://arxiv.org/abs/1810.04805; GPT-2: Radford et al. 2019; LLaMA: https://arxiv.org/abs/2302.13971; CLIP's text
tower: https://arxiv.org/abs/2103.00020.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn
from torch.nn import functional

from plait.core.errors import ConfigError, DataError
from plait.models.attention import Places, causal, real_keys, same_segment
from plait.models.attention import positions as positions_in
from plait.models.heads import MaskedHead
from plait.models.position.absolute import LearnedBox, LearnedSequence, SinCosSequence
from plait.models.position.relative import BucketBias, LinearBias, gaps
from plait.models.position.rotary import Rotary
from plait.models.transformer import Transformer, TransformerSizes, norm_of

Position = Literal["learned", "sincos", "rope", "buckets", "alibi", "none"]
Pool = Literal["first", "last", "mean", "end"]


@dataclass(frozen=True, slots=True, kw_only=True)
class TextSizes:
    """Shape and kind of a text transformer.

    Attributes:
        transformer: Of the blocks.
        vocabulary: Token ids.
        causal: Whether a token sees only those before it.
        position: Position code. ``learned`` and ``sincos`` are added to the tokens; ``rope`` turns queries and keys;
            ``buckets`` (T5) and ``alibi`` are added to the scores.
        max_tokens: Learned positions; of the other codes no limit.
        rope_base: Of the rotation.
        types: Learned vectors for the kind of a token (BERT's two sentences); 0: none.
        page: Columns and rows of a page on which each token has a box (LayoutLM); 0: texts have no places.
        norm_embedding: A norm over the sum of embeddings (BERT).
        final_norm: A norm after the last block; None: where norms come first.
        pool: What :meth:`TextTransformer.pooled` gives: the first or last token, the mean, or the first ``end``.
        end: Id of the token that ends a text, for ``pool: end``.
        pooler: A linear layer and tanh over what is pooled (BERT's, trained on its next-sentence task).
        tied: Whether the output layer is the embedding table.
        head: Whether there is an output layer.
        masked_head: Whether there is BERT's head for masked tokens (:class:`plait.models.heads.MaskedHead`).
    """

    transformer: TransformerSizes
    vocabulary: int
    causal: bool = False
    position: Position = "learned"
    max_tokens: int = 512
    rope_base: float = 10_000.0
    types: int = 0
    page: int = 0
    norm_embedding: bool = False
    final_norm: bool | None = None
    pool: Pool = "first"
    end: int | None = None
    pooler: bool = False
    tied: bool = True
    head: bool = False
    masked_head: bool = False


BERT_BASE = TextSizes(
    transformer=TransformerSizes(d=768, depth=12, heads=12, norm_place="post", eps=1e-12, dropout=0.1),
    vocabulary=30_522,
    types=2,
    norm_embedding=True,
    pooler=True,
)
GPT2 = TextSizes(
    transformer=TransformerSizes(d=768, depth=12, heads=12, eps=1e-5, activation="gelu_tanh", dropout=0.1),
    vocabulary=50_257,
    causal=True,
    max_tokens=1024,
    pool="last",
    head=True,
)
LLAMA_7B = TextSizes(
    transformer=TransformerSizes(
        d=4096, depth=32, heads=32, d_ff=11_008, norm="rms", activation="silu", gated=True, bias=False
    ),
    vocabulary=32_000,
    causal=True,
    position="rope",
    pool="last",
    tied=False,
    head=True,
)


class TextTransformer(nn.Module):
    """Token ids to hidden states, a pooled vector, or scores of the next token.

    Args:
        sizes: Shape and kind.

    Example:
        >>> with torch.device("meta"):
        ...     models = [TextTransformer(sizes) for sizes in (BERT_BASE, GPT2, LLAMA_7B)]
        >>> [sum(p.numel() for p in model.parameters()) for model in models]
        [109482240, 124439808, 6738415616]
    """

    def __init__(self, sizes: TextSizes) -> None:
        super().__init__()
        inner = sizes.transformer
        self.sizes = sizes
        self.d_out = inner.d
        self.embedding = nn.Embedding(sizes.vocabulary, inner.d)
        nn.init.normal_(self.embedding.weight, std=0.02)
        self.types = nn.Embedding(sizes.types, inner.d) if sizes.types else None
        self.box = LearnedBox(sizes.page, inner.d) if sizes.page else None
        self.position: nn.Module | None = None
        self.rotary: Rotary | None = None
        self.bias: BucketBias | None = None
        relative: Callable[[int], nn.Module] | None = None
        match sizes.position:
            case "learned":
                self.position = LearnedSequence(sizes.max_tokens, inner.d)
            case "sincos":
                self.position = SinCosSequence(inner.d)
            case "rope":
                self.rotary = Rotary.sequence(inner.d_head or inner.d // inner.heads, base=sizes.rope_base)
            case "buckets":
                self.bias = BucketBias(inner.heads, both_ways=not sizes.causal)
            case "alibi":
                relative = lambda _: LinearBias(inner.heads)  # noqa: E731  one of several ways to the same argument
            case "none":
                pass
        self.norm_embedding = norm_of(inner) if sizes.norm_embedding else nn.Identity()
        self.transformer = Transformer(inner, relative=relative, final_norm=sizes.final_norm)
        self.pooler = nn.Sequential(nn.Linear(inner.d, inner.d), nn.Tanh()) if sizes.pooler else nn.Identity()
        self.masked = MaskedHead(inner.d, sizes.vocabulary, eps=inner.eps) if sizes.masked_head else None
        own = sizes.head and not sizes.tied
        self.head = nn.Linear(inner.d, sizes.vocabulary, bias=False) if own else None

    def forward(
        self,
        token_ids: Int[Tensor, "b t"],
        *,
        segment_ids: Int[Tensor, "b t"] | None = None,
        types: Int[Tensor, "b t"] | None = None,
        boxes: Int[Tensor, "b t 4"] | None = None,
        weights: list[Tensor] | None = None,
        hidden: list[Tensor] | None = None,
    ) -> Float[Tensor, "b t d"]:
        """Hidden states after the last norm.

        Args:
            token_ids: Texts.
            segment_ids: 0 is padding; tokens see only those of their own segment, and positions restart in each.
            types: Kind of each token; 0 unless given.
            boxes: Where each token stands on its page: left, upper, right, lower; given exactly where there are pages.
            weights: If given, attention weights of every block are appended.
            hidden: If given, what goes into every block is appended.

        Raises:
            DataError: A text is longer than the learned positions; boxes are missing, not wanted, or off the page.
        """
        at = None if segment_ids is None else positions_in(segment_ids)
        x = self.embedding(token_ids)
        if self.position is not None:
            code = self.position(token_ids.shape[1] if at is None else int(at.max()) + 1).to(x)
            x = x + (code if at is None else code[at])
        if self.types is not None:
            x = x + (self.types.weight[0] if types is None else self.types(types))
        if (self.box is None) != (boxes is None):
            raise DataError(
                "boxes came, but this text transformer knows no pages" if self.box is None else "there are no boxes",
                place="TextTransformer",
                remedy="give boxes exactly to text transformers that were built with a page",
            )
        if self.box is not None and boxes is not None:
            x = x + self.box(boxes)
        x = functional.dropout(self.norm_embedding(x), self.sizes.transformer.dropout, self.training)
        return self.transformer(x, self._places(token_ids, segment_ids, at), weights=weights, hidden=hidden)

    def logits(self, hidden: Float[Tensor, "*b d"]) -> Float[Tensor, "*b v"]:
        """Scores of the next token, or with a head for masked tokens, of the token itself.

        Raises:
            ConfigError: There is no output layer.
        """
        if self.masked is not None:
            return self.masked(hidden, self.embedding.weight)
        if not self.sizes.head:
            raise ConfigError("this text transformer has no output layer", remedy="build it with head or masked_head")
        weight = self.embedding.weight if self.head is None else self.head.weight
        return functional.linear(hidden, weight)

    def pooled(
        self, token_ids: Int[Tensor, "b t"], *, segment_ids: Int[Tensor, "b t"] | None = None
    ) -> Float[Tensor, "b d"]:
        """One vector a row, by the rule of the sizes; padding (segment 0) does not count.

        Raises:
            DataError: A row is all padding, lacks the token that ends a text, or holds several texts.
        """
        if segment_ids is not None:
            _complain((segment_ids > 1).any(1), "holds several texts, and would become one vector")
        hidden = self(token_ids, segment_ids=segment_ids)
        real = torch.ones_like(token_ids, dtype=torch.bool) if segment_ids is None else segment_ids != 0
        if self.sizes.pool == "mean":
            _complain(~real.any(1), "is all padding")
            return self.pooler((hidden * real[..., None]).sum(1) / real.sum(1, keepdim=True))
        match self.sizes.pool:
            case "first":
                wanted = real
            case "last":
                wanted = real & (real.cumsum(1) == real.sum(1, keepdim=True))
            case _:
                wanted = real & (token_ids == self.sizes.end)
        _complain(~wanted.any(1), f"has no token to pool ({self.sizes.pool})")
        return self.pooler(hidden[torch.arange(len(hidden), device=hidden.device), wanted.int().argmax(1)])

    def _places(self, token_ids: Tensor, segment_ids: Tensor | None, at: Tensor | None) -> Places:
        t = token_ids.shape[1]
        mask: Bool[Tensor, "#b 1 #t t"] | None = None
        if segment_ids is not None:
            one = bool((segment_ids <= 1).all())
            mask = real_keys(segment_ids != 0) if one else same_segment(segment_ids)
        if self.sizes.causal:
            before = causal(t, device=token_ids.device)
            mask = before if mask is None else mask & before
        index = torch.arange(t, device=token_ids.device)[:, None]
        turn = None if self.rotary is None else self.rotary(index if at is None else at[..., None])
        gap = gaps(index, index) if self.sizes.position in ("buckets", "alibi") else None
        bias = None if self.bias is None or gap is None else self.bias(gap)
        return Places(mask=mask, gap=gap, turn=turn, bias=bias)


def _complain(bad: Bool[Tensor, " b"], what: str) -> None:
    if not bad.is_meta and bool(bad.any()):
        row = int(bad.int().argmax())
        raise DataError(f"row {row} {what}", place="TextTransformer.pooled", remedy="give every row its own text")
