"""Query connectors: a fixed number of learned queries draws what it needs from any number of tokens.

Q-Former: Li et al., BLIP-2, https://arxiv.org/abs/2301.12597. Perceiver resampler: Alayrac et al., Flamingo,
https://arxiv.org/abs/2204.14198, after Jaegle et al., Perceiver, https://arxiv.org/abs/2103.03206.
"""

from dataclasses import dataclass
from functools import partial
from typing import Literal

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from plait.core.errors import ConfigError
from plait.core.tensors import Patches
from plait.models.attention import Attention, AttentionSizes, Places, real_keys
from plait.models.position.absolute import LearnedSequence
from plait.models.ragged import rows_by
from plait.models.transformer import Activation, FeedForward, Part, TransformerSizes

TextTask = Literal["contrast", "match", "generate"]


@dataclass(frozen=True, slots=True, kw_only=True)
class QFormerSizes:
    """Shape of a Q-Former; the defaults are BLIP-2's.

    Attributes:
        d_source: Width of what is looked at.
        d: Width.
        depth: Blocks.
        heads: Of attention.
        d_ff: Width inside the feed-forward networks; 0: ``4 d``.
        queries: Learned queries, which is the number of tokens that come out.
        every: Every so many blocks, from the first on, look at the source.
        vocabulary: Token ids of text that stands beside the queries; 0: no text, and no weights for it.
        max_tokens: Longest text.
        dropout: Share dropped while training.
    """

    d_source: int = 1408
    d: int = 768
    depth: int = 12
    heads: int = 12
    d_ff: int = 0
    queries: int = 32
    every: int = 2
    vocabulary: int = 0
    max_tokens: int = 512
    dropout: float = 0.1


class QFormerBlock(nn.Module):
    """BERT's block, in which queries also look at the source and have a feed-forward network of their own."""

    def __init__(self, sizes: QFormerSizes, *, looks: bool) -> None:
        super().__init__()
        shape = TransformerSizes(
            d=sizes.d, depth=1, heads=sizes.heads, norm_place="post", eps=1e-12, dropout=sizes.dropout
        )
        d_ff = sizes.d_ff or 4 * sizes.d
        part = partial(Part, shape, drop_path=0.0)
        own = AttentionSizes(d=sizes.d, heads=sizes.heads, dropout=sizes.dropout)
        self.attention, self.attention_part = Attention(own), part()
        self.cross = None
        if looks:
            other = AttentionSizes(d=sizes.d, heads=sizes.heads, d_source=sizes.d_source, dropout=sizes.dropout)
            self.cross, self.cross_part = Attention(other), part()
        self.feed_forward, self.feed_forward_part = FeedForward(sizes.d, d_ff), part()
        self.text_feed_forward = FeedForward(sizes.d, d_ff) if sizes.vocabulary else None
        self.text_part = part() if sizes.vocabulary else None

    def forward(
        self,
        x: Float[Tensor, "b t d"],
        source: Float[Tensor, "b s d2"] | None,
        *,
        queries: int,
        mask: Bool[Tensor, "#b 1 #t t"] | None,
        source_mask: Bool[Tensor, "b 1 1 s"] | None,
        weights: list[Tensor] | None = None,
    ) -> Float[Tensor, "b t d"]:
        """One block; the first ``queries`` tokens are queries, the rest is text."""
        x = self.attention_part(x, lambda y: self.attention(y, Places(mask=mask)).values)
        asked, text = x[:, :queries], x[:, queries:]
        cross = self.cross
        if cross is not None and source is not None and queries:

            def look(y: Tensor) -> Tensor:
                seen = cross(y, Places(mask=source_mask), source=source, need_weights=weights is not None)
                if weights is not None:
                    weights.append(seen.weights)
                return seen.values

            asked = self.cross_part(asked, look)
        asked = self.feed_forward_part(asked, self.feed_forward)
        if text.shape[1] == 0:
            return asked
        assert self.text_part is not None
        assert self.text_feed_forward is not None
        return torch.cat([asked, self.text_part(text, self.text_feed_forward)], dim=1)


class QFormer(nn.Module):
    """``queries`` tokens for each item, however many it has; an :class:`~plait.core.protocols.Encoder`.

    All frames of an item are looked at together, unless ``per_frame``.

    Args:
        sizes: Shape.
        d_out: Width that comes out, through a linear layer (BLIP-2's language projection); 0: ``sizes.d`` as it is.
        per_frame: Ask each frame of an item on its own: ``frames * queries`` tokens.

    Example:
        >>> with torch.device("meta"):
        ...     blip2 = QFormer(QFormerSizes())
        >>> sum(p.numel() for p in blip2.parameters()) - 32 * 768  # without the queries, as Hugging Face counts
        105137664
    """

    def __init__(self, sizes: QFormerSizes, *, d_out: int = 0, per_frame: bool = False) -> None:
        super().__init__()
        self.sizes, self.per_frame = sizes, per_frame
        self.queries = nn.Parameter(torch.empty(sizes.queries, sizes.d))
        nn.init.normal_(self.queries, std=0.02)
        self.embedding = nn.Embedding(sizes.vocabulary, sizes.d) if sizes.vocabulary else None
        if self.embedding is not None:  # also the table that text is written with: longer rows would shout
            nn.init.normal_(self.embedding.weight, std=0.02)
        self.position = LearnedSequence(sizes.max_tokens, sizes.d) if sizes.vocabulary else None
        self.norm = nn.LayerNorm(sizes.d, eps=1e-12)
        self.dropout = nn.Dropout(sizes.dropout)
        self.blocks = nn.ModuleList(QFormerBlock(sizes, looks=i % sizes.every == 0) for i in range(sizes.depth))
        self.out = nn.Linear(sizes.d, d_out) if d_out else nn.Identity()
        self.d_in, self.d_out = sizes.d_source, d_out or sizes.d

    def grid_out(self, grid: Int[Tensor, "item 3"]) -> Int[Tensor, "item 3"]:
        """One row of ``queries`` for each item, or for each of its frames."""
        return _fixed(grid, self.sizes.queries, per_frame=self.per_frame)

    def forward(self, media: Patches) -> Patches:
        """Ask every item."""
        source = rows_by(media.values, _lengths(media.grid, per_frame=self.per_frame))
        found = self.out(self.attend(source.values, real=source.real))
        return Patches(values=found.flatten(0, 1), grid=self.grid_out(media.grid))

    def attend(
        self,
        source: Float[Tensor, "b s d2"] | None,
        *,
        real: Bool[Tensor, "b s"] | None = None,
        text: tuple[Int[Tensor, "b t"], Bool[Tensor, "b t"], TextTask] | None = None,
        weights: list[Tensor] | None = None,
    ) -> Float[Tensor, "b m d"]:
        """States of queries and text, before the projection.

        Args:
            source: What the queries look at; None: text alone, without queries (BLIP-2's text tower).
            real: Which of the source are tokens.
            text: Token ids, which of them are real, and what they may see (:func:`query_text_mask`).
            weights: If given, weights of the cross-attentions are appended.

        Raises:
            ConfigError: Text, but built without a vocabulary; or neither source nor text.
        """
        count = 0 if source is None else self.sizes.queries
        parts = [] if source is None else [self.queries.expand(len(source), -1, -1)]
        mask = None
        if text is not None:
            ids, present, task = text
            if self.embedding is None or self.position is None:
                raise ConfigError("this Q-Former knows no text", remedy="build it with the tokenizer's vocabulary")
            parts.append(self.embedding(ids) + self.position(ids.shape[1]))
            mask = query_text_mask(count, present, task)
        if not parts:
            raise ConfigError("nothing to attend: neither source nor text", remedy="give one of them")
        x = self.dropout(self.norm(torch.cat(parts, dim=1)))
        seen = None if real is None else real_keys(real)
        for block in self.blocks:
            x = block(x, source, queries=count, mask=mask, source_mask=seen, weights=weights)
        return x


def query_text_mask(queries: int, present: Bool[Tensor, "b t"], task: TextTask) -> Bool[Tensor, "b 1 m m"]:
    """Who sees whom in a Q-Former with text; figure 2 of https://arxiv.org/abs/2301.12597.

    ``contrast``: queries and text each see only their own kind. ``match``: all see all. ``generate``: queries see
    queries, text sees queries and the text before it. Padding is seen by none.

    Args:
        queries: How many stand in front.
        present: Which tokens of the text are no padding.
        task: What the text is for.
    """
    b, t = present.shape
    m = queries + t
    kind = torch.arange(m, device=present.device) >= queries  # True for text
    match task:
        case "contrast":
            seen = kind[:, None] == kind
        case "match":
            seen = torch.ones(m, m, dtype=torch.bool, device=present.device)
        case "generate":
            seen = torch.ones(m, m, dtype=torch.bool, device=present.device).tril() | (~kind[:, None] & ~kind)
    there = torch.cat([present.new_ones(b, queries), present], dim=1)
    return (seen & there[:, None, :])[:, None]


@dataclass(frozen=True, slots=True, kw_only=True)
class ResamplerSizes:
    """Shape of a Perceiver resampler; the defaults are Flamingo's.

    Attributes:
        d: Width of what is looked at, and of the latents.
        queries: Latents, which is the number of tokens that come out.
        depth: Blocks.
        heads: Of attention.
        d_head: Width of a head; 0: ``d / heads``.
        d_ff: Width inside the feed-forward networks; 0: ``4 d``.
        frames: Learned codes of frames; 0: none.
        activation: Inside the feed-forward networks.
    """

    d: int
    queries: int = 64
    depth: int = 6
    heads: int = 8
    d_head: int = 0
    d_ff: int = 0
    frames: int = 0
    activation: Activation = "gelu"


class PerceiverBlock(nn.Module):
    """Latents look at the source and at themselves, then pass a feed-forward network; norms come first."""

    def __init__(self, sizes: ResamplerSizes) -> None:
        super().__init__()
        d = sizes.d
        self.source_norm, self.norm = nn.LayerNorm(d), nn.LayerNorm(d)
        shape = AttentionSizes(d=d, heads=sizes.heads, d_head=sizes.d_head, d_source=d, bias=False, out_bias=False)
        self.attention = Attention(shape)
        self.feed_forward_norm = nn.LayerNorm(d)
        self.feed_forward = FeedForward(d, sizes.d_ff or 4 * d, activation=sizes.activation, bias=False)

    def forward(
        self, latents: Float[Tensor, "b k d"], source: Float[Tensor, "b s d"], mask: Bool[Tensor, "b 1 1 m"] | None
    ) -> Float[Tensor, "b k d"]:
        """One block; the mask is over source and latents."""
        asking = self.norm(latents)
        seen = torch.cat([self.source_norm(source), asking], dim=1)
        latents = latents + self.attention(asking, Places(mask=mask), source=seen).values
        return latents + self.feed_forward(self.feed_forward_norm(latents))


class PerceiverResampler(nn.Module):
    """``queries`` latents for each item, however many tokens it has; an :class:`~plait.core.protocols.Encoder`.

    Differs from a Q-Former in that latents look at source and latents in one softmax, and norms come first. Flamingo
    adds a learned code of the frame to the tokens of each frame: ``frames`` of them.

    Args:
        sizes: Shape.
        d_out: Width that comes out, through a linear layer; 0: ``sizes.d`` as it is.

    Raises:
        DataError: An item has more frames than there are codes.

    Example:
        >>> resampler = PerceiverResampler(ResamplerSizes(d=64, queries=8, depth=2, heads=4))
        >>> resampler(Patches(values=torch.rand(50, 64), grid=torch.tensor([[1, 5, 10]]))).values.shape
        torch.Size([8, 64])
    """

    def __init__(self, sizes: ResamplerSizes, *, d_out: int = 0) -> None:
        super().__init__()
        d = sizes.d
        self.sizes = sizes
        self.latents = nn.Parameter(torch.randn(sizes.queries, d))
        self.frames = LearnedSequence(sizes.frames, d) if sizes.frames else None
        self.blocks = nn.ModuleList(PerceiverBlock(sizes) for _ in range(sizes.depth))
        self.norm = nn.LayerNorm(d)
        self.out = nn.Linear(d, d_out) if d_out else nn.Identity()
        self.d_in, self.d_out = d, d_out or d

    def grid_out(self, grid: Int[Tensor, "item 3"]) -> Int[Tensor, "item 3"]:
        """One row of latents for each item."""
        return _fixed(grid, len(self.latents), per_frame=False)

    def forward(self, media: Patches) -> Patches:
        """Resample every item, all of its frames together."""
        values = media.values if self.frames is None else media.values + self._frame_codes(media.grid)
        source, real = rows_by(values, media.grid.prod(1))
        latents = self.latents.expand(len(source), -1, -1)
        mask = None
        if real is not None:
            mask = torch.cat([real, real.new_ones(len(real), len(self.latents))], dim=1)[:, None, None]
        for block in self.blocks:
            latents = block(latents, source, mask)
        return Patches(values=self.out(self.norm(latents)).flatten(0, 1), grid=self.grid_out(media.grid))

    def _frame_codes(self, grid: Int[Tensor, "item 3"]) -> Float[Tensor, "n d"]:
        assert self.frames is not None
        codes = self.frames(int(grid[:, 0].max()) if len(grid) else 0)
        return torch.cat(
            [codes[:f].repeat_interleave(h * w, dim=0) for f, h, w in grid.tolist()] or [codes.new_zeros(0, self.d_in)]
        )


def _lengths(grid: Int[Tensor, "item 3"], *, per_frame: bool) -> Int[Tensor, " row"]:
    """Tokens of each item, or of each frame of each item."""
    return grid[:, 1:].prod(1).repeat_interleave(grid[:, 0]) if per_frame else grid.prod(1)


def _fixed(grid: Int[Tensor, "item 3"], queries: int, *, per_frame: bool) -> Int[Tensor, "item 3"]:
    frames = grid[:, 0] if per_frame else torch.ones_like(grid[:, 0])
    return torch.stack([frames, torch.ones_like(frames), torch.full_like(frames, queries)], dim=1)
