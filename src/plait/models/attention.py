"""Scaled dot-product attention three ways, multi-head attention over any source, and masks from segment ids.

Vaswani et al., "Attention is all you need", https://arxiv.org/abs/1706.03762.
"""

import math
from dataclasses import dataclass
from functools import partial
from typing import Literal, NamedTuple, Protocol

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn
from torch.nn import functional

from plait.core.errors import ConfigError
from plait.models.position.rotary import Turn, turned

Backend = Literal["sdpa", "reference", "chunked"]
"""``sdpa`` is torch's fused one; ``reference`` keeps the whole matrix and can return it; ``chunked`` goes over the keys
in pieces with a running softmax (https://arxiv.org/abs/1805.02867), without gradients in memory linear in the keys."""


class Attended(NamedTuple):
    """What attention gives: the values, and the weights where they were asked for."""

    values: Tensor
    weights: Float[Tensor, "b h q k"] | None


def attend(
    q: Float[Tensor, "b h q e"],
    k: Float[Tensor, "b g k e"],
    v: Float[Tensor, "b g k f"],
    *,
    mask: Bool[Tensor, "#b #h #q k"] | None = None,
    bias: Float[Tensor, "#b #h #q k"] | None = None,
    scale: float | None = None,
    dropout: float = 0.0,
    backend: Backend = "sdpa",
) -> Attended:
    """``softmax(scale * q @ k.T + bias) @ v`` over the keys that the mask allows; equation 1 of arXiv 1706.03762.

    A query that may see no key gets zeros, and gives no gradient: not the mean of all values, and not NaN.

    Args:
        q: Queries.
        k: Keys; each of the ``g`` heads serves ``h / g`` heads of queries (grouped queries, arXiv 2305.13245).
        v: Values.
        mask: True where a query may look.
        bias: Added to the scores, after scaling.
        scale: ``1 / sqrt(e)`` unless given: scores of independent q and k of variance 1 then have variance 1.
        dropout: Share of weights dropped.
        backend: How it is computed; all three give the same values. Only ``reference`` gives weights.

    Raises:
        ConfigError: ``chunked`` with dropout: it never holds the weights.
    """
    if k.shape[1] != q.shape[1]:
        k, v = (x.repeat_interleave(q.shape[1] // k.shape[1], dim=1) for x in (k, v))
    scale = 1 / math.sqrt(q.shape[-1]) if scale is None else scale
    blind = None
    if mask is not None:
        blind = ~mask.any(-1, keepdim=True)
        mask = mask | blind  # a softmax over nothing is NaN, so the blind look everywhere and what they see is dropped
    weights = None
    if backend == "sdpa":
        added = mask if bias is None else _added(mask, bias, q.dtype)
        values = functional.scaled_dot_product_attention(q, k, v, attn_mask=added, dropout_p=dropout, scale=scale)
    elif backend == "reference":
        values, weights = _reference(q * scale, k, v, added=_added(mask, bias, q.dtype), dropout=dropout)
    elif dropout:
        raise ConfigError("chunked attention has no dropout of weights", remedy="use sdpa, or a dropout of 0")
    else:
        values = _chunked(q * scale, k, v, added=_added(mask, bias, q.dtype))
    if blind is not None:
        values = values.masked_fill(blind, 0.0)
        weights = None if weights is None else weights.masked_fill(blind, 0.0)
    return Attended(values, weights)


def _added(mask: Tensor | None, bias: Tensor | None, dtype: torch.dtype) -> Tensor | None:
    """Mask and bias as one term of the scores."""
    if mask is None:
        return None if bias is None else bias.to(dtype)
    zero = torch.zeros((), dtype=dtype, device=mask.device) if bias is None else bias.to(dtype)
    return torch.where(mask, zero, float("-inf"))


def _reference(q: Tensor, k: Tensor, v: Tensor, *, added: Tensor | None, dropout: float) -> Attended:
    scores = q @ k.mT
    weights = (scores if added is None else scores + added).softmax(-1, dtype=torch.promote_types(q.dtype, torch.float))
    weights = weights.to(v.dtype)
    return Attended(functional.dropout(weights, dropout) @ v, weights)


def _chunked(q: Tensor, k: Tensor, v: Tensor, *, added: Tensor | None, size: int = 256) -> Tensor:
    wide = torch.promote_types(q.dtype, torch.float)
    most = q.new_full((*q.shape[:-1], 1), float("-inf"), dtype=wide)
    total = torch.zeros_like(most)
    out = torch.zeros(*q.shape[:-1], v.shape[-1], device=q.device, dtype=wide)
    for at in range(0, k.shape[-2], size):
        scores = (q @ k[..., at : at + size, :].mT).to(wide)
        if added is not None:
            scores = scores + added[..., at : at + size]
        peak = torch.maximum(most, scores.detach().amax(-1, keepdim=True))
        safe = peak.masked_fill(peak == float("-inf"), 0.0)  # so far only keys that are hidden from this query
        shrink, weights = (most - safe).exp(), (scores - safe).exp()
        total = total * shrink + weights.sum(-1, keepdim=True)
        out = out * shrink + weights @ v[..., at : at + size, :].to(wide)
        most = peak
    return (out / total.clamp(min=torch.finfo(wide).tiny)).to(v.dtype)  # 0 where there are no keys


class Bias(Protocol):
    """A relative position code: what is added to the scores of a query at one place and a key at another."""

    def __call__(
        self, gap: Int[Tensor, "q k a"], queries: Float[Tensor, "b h q e"], *, grid: tuple[int, int] | None
    ) -> Float[Tensor, "#b h q k"]:
        """Bias of each head; ``gap`` is query minus key on each of ``a`` axes, ``grid`` what the tokens make up."""
        ...


@dataclass(frozen=True, slots=True, kw_only=True)
class Places:
    """Where tokens are and what they may see: what a tower says once and every layer uses.

    Attributes:
        mask: True where a query may look; None: everywhere.
        gap: How far each query is beyond each key on each axis, for relative codes
            (:func:`plait.models.position.relative.gaps`).
        grid: Rows and columns of the cells, for codes that are learned on one grid.
        turn: By how much queries and keys are turned (RoPE).
        bias: Added to the scores of all layers (T5 shares one table).
        lengths: Tokens of items that stand one after the other in every row, each of which sees only itself: what
            :func:`same_segment` says with a mask, computed item by item, so that nothing is computed and dropped.
    """

    mask: Bool[Tensor, "#b #h #q k"] | None = None
    gap: Int[Tensor, "q k a"] | None = None
    grid: tuple[int, int] | None = None
    turn: Turn | None = None
    bias: Float[Tensor, "#b h q k"] | None = None
    lengths: tuple[int, ...] | None = None


ANYWHERE = Places()
"""No positions, no mask."""


@dataclass(frozen=True, slots=True, kw_only=True)
class AttentionSizes:
    """Shape of a multi-head attention.

    Attributes:
        d: Width of what asks, and of the result.
        heads: Heads of queries.
        kv_heads: Heads of keys and values; 0: as many.
        d_head: Width of a head; 0: ``d / heads``.
        d_value: Width of a head's values; 0: ``d_head``.
        d_source: Width of what is looked at in cross-attention; 0: self-attention.
        bias: Whether q, k and v have one.
        out_bias: Whether the output projection has one.
        scale: Factor on the scores; 0: ``1 / sqrt(d_head)``.
        dropout: Share of weights dropped while training.
        qk_norm: RMS-normalize each head's queries and keys first, as Qwen3 does (https://arxiv.org/abs/2505.09388).
        key_bias: Whether k has one where q and v have (Whisper, BEiT and VideoMAE leave it out). It adds the same to
            all scores of a query, so that the softmax forgets it.
    """

    d: int
    heads: int
    kv_heads: int = 0
    d_head: int = 0
    d_value: int = 0
    d_source: int = 0
    bias: bool = True
    out_bias: bool = True
    scale: float = 0.0
    dropout: float = 0.0
    qk_norm: bool = False
    key_bias: bool = True


class Attention(nn.Module):
    """``Concat(head_1 .. head_h) W_O`` with ``head_i = attend(x W_Q, s W_K, s W_V)``; s is x, or another modality.

    All projections of self-attention are one matrix (``qkv``: queries, then keys, then values, each head after head),
    and so are those of the source in cross-attention (``kv``): one product instead of three.

    Args:
        sizes: Shape.
        relative: Relative position code of this layer, added to the scores.
        backend: How the scores are computed.

    Raises:
        ConfigError: The width cannot be split so.

    Example:
        >>> sum(p.numel() for p in Attention(AttentionSizes(d=768, heads=12)).parameters())
        2362368
    """

    def __init__(self, sizes: AttentionSizes, *, relative: nn.Module | None = None, backend: Backend = "sdpa") -> None:
        super().__init__()
        self.sizes, self.relative = sizes, relative
        self.backend: Backend = backend
        self.heads, self.kv_heads = sizes.heads, sizes.kv_heads or sizes.heads
        if self.heads % self.kv_heads or (not sizes.d_head and sizes.d % sizes.heads):
            raise ConfigError(
                f"{sizes.heads} heads and {self.kv_heads} key heads do not divide a width of {sizes.d}",
                remedy="choose heads that divide the width, and key heads that divide the heads; or give d_head",
            )
        self.d_head = sizes.d_head or sizes.d // sizes.heads
        self.d_value = sizes.d_value or self.d_head
        q, k, v = self.heads * self.d_head, self.kv_heads * self.d_head, self.kv_heads * self.d_value
        whole = sizes.bias and sizes.key_bias
        if sizes.d_source:
            self.q = nn.Linear(sizes.d, q, bias=sizes.bias)
            self.kv = nn.Linear(sizes.d_source, k + v, bias=whole)
        else:
            self.qkv = nn.Linear(sizes.d, q + k + v, bias=whole)
        # A bias of keys held at zero would drift: rounding gives it gradients that are not quite nothing, and Adam
        # scales them up. So there is none.
        self.qv_bias: nn.Parameter | None = None
        if sizes.bias and not sizes.key_bias:
            self.qv_bias = nn.Parameter(torch.zeros(v if sizes.d_source else q + v))
        self.out = nn.Linear(self.heads * self.d_value, sizes.d, bias=sizes.out_bias)
        self.q_norm = nn.RMSNorm(self.d_head, eps=1e-6) if sizes.qk_norm else nn.Identity()
        self.k_norm = nn.RMSNorm(self.d_head, eps=1e-6) if sizes.qk_norm else nn.Identity()

    def forward(
        self,
        x: Float[Tensor, "b t d"],
        places: Places = ANYWHERE,
        *,
        source: Float[Tensor, "b s d2"] | None = None,
        need_weights: bool = False,
    ) -> Attended:
        """Attend.

        Args:
            x: What asks.
            places: Positions and mask. With a source only the mask and the bias are used.
            source: What is looked at, where it is not ``x`` itself.
            need_weights: Return the weights too; computed with the reference backend then.

        Returns:
            ``b t d``, and the weights if asked for.

        Raises:
            ConfigError: There is a relative code and no gap; or lengths came with what they do not go with.
        """
        q, k, v = self._project(x, source)
        q, k = self.q_norm(q), self.k_norm(k)
        bias = places.bias
        if source is None:
            if self.relative is not None:  # before turning: a code that reads queries must not see absolute places
                own = self.relative(_given(places.gap), q, grid=places.grid)
                bias = own if bias is None else bias + own
            if places.turn is not None:
                q, k = turned(q, places.turn), turned(k, places.turn)
        one = partial(
            attend,
            scale=self.sizes.scale or None,
            dropout=self.sizes.dropout if self.training else 0.0,
            backend="reference" if need_weights else self.backend,
        )
        if places.lengths is None:
            values, weights = one(q, k, v, mask=places.mask, bias=bias)
        elif source is not None or need_weights or not (places.mask is None is bias):
            raise ConfigError(
                "items apart (Places.lengths) have no mask, bias, source or weights here",
                place="attention",
                remedy="say with a mask which tokens see each other (same_segment)",
            )
        else:
            items = zip(*(part.split(places.lengths, dim=2) for part in (q, k, v)), strict=True)
            values, weights = torch.cat([one(*item).values for item in items], dim=2), None
        return Attended(self.out(values.transpose(1, 2).flatten(2)), weights)

    def _project(self, x: Tensor, source: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
        if (source is not None) != bool(self.sizes.d_source):
            built = "cross" if self.sizes.d_source else "self"
            raise ConfigError(
                f"this is {built}-attention, {'no' if source is None else 'a'} source came",
                remedy="set d_source for cross-attention, and give the source",
            )
        widths = [self.heads * self.d_head, self.kv_heads * self.d_head, self.kv_heads * self.d_value]
        if source is None:
            q, k, v = self._biased(self.qkv(x)).split(widths, dim=-1)
        else:
            q, (k, v) = self.q(x), self._biased(self.kv(source)).split(widths[1:], dim=-1)
        return self._heads(q, self.heads), self._heads(k, self.kv_heads), self._heads(v, self.kv_heads)

    @staticmethod
    def _heads(x: Tensor, heads: int) -> Tensor:
        return x.unflatten(-1, (heads, -1)).transpose(1, 2)

    def _biased(self, joined: Tensor) -> Tensor:
        """With the biases of queries (where they are in it) and values, if keys have none."""
        if self.qv_bias is None:
            return joined
        values = self.kv_heads * self.d_value
        before, after = self.qv_bias.split([len(self.qv_bias) - values, values])
        return joined + torch.cat([before, before.new_zeros(self.kv_heads * self.d_head), after])


def _given(gap: Tensor | None) -> Tensor:
    if gap is None:
        raise ConfigError(
            "this attention has a relative position code, but Places.gap is None",
            place="attention",
            remedy="give gap=gaps(at, at), the distances between the tokens' coordinates",
        )
    return gap


# --- masks -----------------------------------------------------------------------------------------------------------


def causal(t: int, *, device: torch.device | None = None) -> Bool[Tensor, "1 1 t t"]:
    """Each position sees itself and what stands before it."""
    return torch.ones(1, 1, t, t, dtype=torch.bool, device=device).tril()


def real_keys(real: Bool[Tensor, "b t"]) -> Bool[Tensor, "b 1 1 t"]:
    """Every position sees those that are no padding.

    Args:
        real: True where a position is no padding.
    """
    return real[:, None, None, :]


def same_segment(segment_ids: Int[Tensor, "b t"]) -> Bool[Tensor, "b 1 t t"]:
    """Positions see those of their own segment, both ways; padding (segment 0) sees nothing."""
    same = segment_ids[:, :, None] == segment_ids[:, None, :]
    return (same & (segment_ids != 0)[:, :, None])[:, None]


def causal_mask(segment_ids: Int[Tensor, "b t"], dtype: torch.dtype) -> Float[Tensor, "b 1 t t"]:
    """Additive mask: 0 where a position may look, the lowest number of ``dtype`` elsewhere.

    A position sees itself and what stands before it in its own segment. Padding (segment 0) sees itself only, so that
    no row of the softmax is empty.

    Example:
        Segments ``1 1 2 0`` give the rows ``x...``, ``xx..``, ``..x.``, ``...x``.
    """
    t = segment_ids.shape[1]
    itself = torch.eye(t, dtype=torch.bool, device=segment_ids.device)
    seen = (same_segment(segment_ids) & causal(t, device=segment_ids.device)) | itself
    mask = torch.zeros(seen.shape, dtype=dtype, device=segment_ids.device)
    return mask.masked_fill_(~seen, torch.finfo(dtype).min)


def positions(segment_ids: Int[Tensor, "b t"]) -> Int[Tensor, "b t"]:
    """Position inside the own segment, from 0.

    Example:
        Segments ``1 1 1 2 2 0`` give ``0 1 2 0 1 0``.
    """
    index = torch.arange(segment_ids.shape[1], device=segment_ids.device).expand_as(segment_ids)
    starts = torch.ones_like(segment_ids, dtype=torch.bool)
    starts[:, 1:] = segment_ids[:, 1:] != segment_ids[:, :-1]
    return index - torch.where(starts, index, 0).cummax(dim=1).values
