"""The one Transformer: where the norm stands, residuals, activation, positions and masks are arguments.

Vaswani et al., https://arxiv.org/abs/1706.03762; pre-norm: Xiong et al., https://arxiv.org/abs/2002.04745. Every tower
and text model that is built here from scratch is made of these blocks.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Literal

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional

from plait.core.errors import ConfigError
from plait.models.attention import ANYWHERE, Attention, AttentionSizes, Backend, Places

Norm = Literal["layer", "rms"]
NormPlace = Literal["pre", "post", "none"]
Activation = Literal["gelu", "gelu_tanh", "quick_gelu", "relu", "silu"]


def _quick_gelu(x: Tensor) -> Tensor:
    return x * torch.sigmoid(1.702 * x)


ACTIVATIONS: dict[Activation, Callable[[Tensor], Tensor]] = {
    "gelu": functional.gelu,
    "gelu_tanh": partial(functional.gelu, approximate="tanh"),
    "quick_gelu": _quick_gelu,  # of CLIP's weights
    "relu": functional.relu,
    "silu": functional.silu,
}


@dataclass(frozen=True, slots=True, kw_only=True)
class TransformerSizes:
    """Shape and kind of a stack of blocks.

    Attributes:
        d: Width.
        depth: Blocks.
        heads: Heads of queries.
        d_ff: Width inside the feed-forward network; 0: ``4 d``.
        kv_heads: Heads of keys and values; 0: as many as of queries.
        d_head: Width of a head; 0: ``d / heads``.
        norm: LayerNorm, or RMSNorm (https://arxiv.org/abs/1910.07467), which only divides.
        norm_place: ``pre``: ``x + f(norm(x))`` and a norm at the end; ``post``: ``norm(x + f(x))``, as in BERT and the
            first Transformer; ``none``.
        eps: Of the norms.
        residual: Whether ``x`` is added at all.
        activation: Of the feed-forward network.
        gated: Multiply the activation by a second projection (SwiGLU with ``silu``, https://arxiv.org/abs/2002.05202).
        bias: Whether the feed-forward and output projections have one.
        qkv_bias: Whether queries, keys and values have one; None: like ``bias``.
        key_bias: Whether keys have one where queries and values have.
        qk_norm: RMS-normalize queries and keys.
        scale: Factor on attention scores; 0: ``1 / sqrt(d_head)``; T5 has 1.
        d_source: Width of what every block also looks at (cross-attention); 0: nothing.
        dropout: Share of what each part adds that is dropped.
        inner_dropout: Share of the feed-forward's inside that is dropped; None: like ``dropout``.
        attention_dropout: Share of attention weights dropped.
        drop_path: Share of samples for which the last block is skipped; earlier ones less, linearly
            (https://arxiv.org/abs/1603.09382).
        layer_drop: Chance that a block is left out of a training step for the whole batch
            (LayerDrop, https://arxiv.org/abs/1909.11556).
        layer_scale: Start of a learned factor on what each part adds (https://arxiv.org/abs/2103.17239); 0: none.
    """

    d: int
    depth: int
    heads: int
    d_ff: int = 0
    kv_heads: int = 0
    d_head: int = 0
    norm: Norm = "layer"
    norm_place: NormPlace = "pre"
    eps: float = 1e-6
    residual: bool = True
    activation: Activation = "gelu"
    gated: bool = False
    bias: bool = True
    qkv_bias: bool | None = None
    key_bias: bool = True
    qk_norm: bool = False
    scale: float = 0.0
    d_source: int = 0
    dropout: float = 0.0
    inner_dropout: float | None = None
    attention_dropout: float = 0.0
    drop_path: float = 0.0
    layer_drop: float = 0.0
    layer_scale: float = 0.0

    @property
    def dropout_inside(self) -> float:
        """Share of the feed-forward's inside that is dropped."""
        return self.dropout if self.inner_dropout is None else self.inner_dropout

    def attention(self, *, d_source: int = 0) -> AttentionSizes:
        """Sizes of one attention of a block."""
        return AttentionSizes(
            d=self.d,
            heads=self.heads,
            kv_heads=self.kv_heads,
            d_head=self.d_head,
            d_source=d_source,
            bias=self.bias if self.qkv_bias is None else self.qkv_bias,
            out_bias=self.bias,
            scale=self.scale,
            dropout=self.attention_dropout,
            qk_norm=self.qk_norm,
            key_bias=self.key_bias,
        )


class FeedForward(nn.Module):
    """``down(act(up(x)))``, or ``down(act(gate(x)) * up(x))``; gate and up are one matrix.

    Weights without a gate: ``2 d d_ff``, and ``d + d_ff`` for biases.

    Args:
        d: Width.
        d_ff: Inner width.
        activation: Between.
        gated: With a gate.
        bias: With biases.
        dropout: Share of the inner width dropped while training.
    """

    def __init__(
        self,
        d: int,
        d_ff: int,
        *,
        activation: Activation = "gelu",
        gated: bool = False,
        bias: bool = True,
        dropout: float = 0.0,
    ) -> None:
        super().__init__()
        self.activation: Activation = activation
        self.gated, self.dropout = gated, dropout
        self.up = nn.Linear(d, d_ff * (2 if gated else 1), bias=bias)
        self.down = nn.Linear(d_ff, d, bias=bias)

    def forward(self, x: Float[Tensor, "*b d"]) -> Float[Tensor, "*b d"]:
        """Transform every token on its own."""
        inner, act = self.up(x), ACTIVATIONS[self.activation]
        if self.gated:
            gate, inner = inner.chunk(2, dim=-1)
            inner = act(gate) * inner
        else:
            inner = act(inner)
        return self.down(functional.dropout(inner, self.dropout, self.training))


class Scale(nn.Module):
    """A learned factor for each dimension on what a part of a block adds."""

    def __init__(self, d: int, start: float) -> None:
        super().__init__()
        self.factor = nn.Parameter(torch.full((d,), start))

    def forward(self, x: Tensor) -> Tensor:
        """Scale."""
        return x * self.factor


class Part(nn.Module):
    """One sublayer with its norm: ``x + f(norm(x))``, ``norm(x + f(x))``, or either without ``x``.

    Args:
        sizes: Norm, its place, residual, dropout and scale.
        drop_path: Share of samples for which it adds nothing while training.
    """

    def __init__(self, sizes: TransformerSizes, *, drop_path: float) -> None:
        super().__init__()
        self.norm = norm_of(sizes) if sizes.norm_place != "none" else nn.Identity()
        self.scale = Scale(sizes.d, sizes.layer_scale) if sizes.layer_scale else nn.Identity()
        self.place, self.residual = sizes.norm_place, sizes.residual
        self.dropout, self.drop_path = sizes.dropout, drop_path

    def forward(
        self, x: Float[Tensor, "b t d"], inner: Callable[[Float[Tensor, "b t d"]], Float[Tensor, "b t d"]]
    ) -> Float[Tensor, "b t d"]:
        """Put ``inner`` in its place."""
        gained = self.scale(inner(self.norm(x) if self.place == "pre" else x))
        if self.training and (self.dropout or self.drop_path):
            gained = functional.dropout(gained, self.dropout)
            if self.drop_path:
                kept = torch.rand(len(x), 1, 1, device=x.device) >= self.drop_path
                gained = gained * kept / (1 - self.drop_path)
        x = x + gained if self.residual else gained
        return self.norm(x) if self.place == "post" else x


class Block(nn.Module):
    """Attention, cross-attention if there is a source, feed-forward; each in a :class:`Part`.

    Args:
        sizes: Shape and kind.
        relative: Relative position code of the self-attention.
        feed_forward: In place of the plain network, such as :class:`plait.models.moe.MixtureOfExperts`.
        drop_path: Share of samples for which a part adds nothing.
        backend: How attention is computed.
    """

    def __init__(
        self,
        sizes: TransformerSizes,
        *,
        relative: nn.Module | None = None,
        feed_forward: nn.Module | None = None,
        drop_path: float = 0.0,
        backend: Backend = "sdpa",
    ) -> None:
        super().__init__()
        self.attention = Attention(sizes.attention(), relative=relative, backend=backend)
        self.attention_part = Part(sizes, drop_path=drop_path)
        self.cross: Attention | None = None
        if sizes.d_source:
            self.cross = Attention(sizes.attention(d_source=sizes.d_source), backend=backend)
            self.cross_part = Part(sizes, drop_path=drop_path)
        self.feed_forward = feed_forward or FeedForward(
            sizes.d,
            sizes.d_ff or 4 * sizes.d,
            activation=sizes.activation,
            gated=sizes.gated,
            bias=sizes.bias,
            dropout=sizes.dropout_inside,
        )
        self.feed_forward_part = Part(sizes, drop_path=drop_path)

    def forward(
        self,
        x: Float[Tensor, "b t d"],
        places: Places,
        *,
        source: Float[Tensor, "b s d2"] | None = None,
        source_places: Places = ANYWHERE,
        weights: list[Tensor] | None = None,
        routed: list | None = None,
    ) -> Float[Tensor, "b t d"]:
        """One block.

        Args:
            x: Tokens.
            places: Of the tokens.
            source: What the cross-attention looks at.
            source_places: Mask (and bias) of the cross-attention.
            weights: Attention weights are appended here: of the block itself, then of the cross-attention.
            routed: What a mixture of experts did is appended here (:class:`plait.models.moe.Routed`).
        """

        def own(y: Tensor) -> Tensor:
            values, found = self.attention(y, places, need_weights=weights is not None)
            if weights is not None:
                weights.append(found)
            return values

        def other(y: Tensor) -> Tensor:
            assert self.cross is not None
            values, found = self.cross(y, source_places, source=source, need_weights=weights is not None)
            if weights is not None:
                weights.append(found)
            return values

        x = self.attention_part(x, own)
        if self.cross is not None and source is not None:
            x = self.cross_part(x, other)
        if routed is None or isinstance(self.feed_forward, FeedForward):
            return self.feed_forward_part(x, self.feed_forward)
        return self.feed_forward_part(x, partial(self.feed_forward, routed=routed))


class Transformer(nn.Module):
    """A stack of blocks.

    Args:
        sizes: Shape and kind.
        relative: Makes the relative position code of each block, given its number; None: none.
        feed_forward: Makes what stands in place of the plain network of each block, given its number; None where it
            gives none.
        final_norm: A norm after the last block; by default where norms come first.
        backend: How attention is computed.

    Example:
        >>> bert = Transformer(TransformerSizes(d=768, depth=12, heads=12, norm_place="post"))
        >>> sum(p.numel() for p in bert.parameters())
        85054464
    """

    def __init__(
        self,
        sizes: TransformerSizes,
        *,
        relative: Callable[[int], nn.Module] | None = None,
        feed_forward: Callable[[int], nn.Module | None] | None = None,
        final_norm: bool | None = None,
        backend: Backend = "sdpa",
    ) -> None:
        super().__init__()
        self.sizes = sizes
        self.d_out = sizes.d
        self.blocks = nn.ModuleList(
            Block(
                sizes,
                relative=relative(i) if relative else None,
                feed_forward=feed_forward(i) if feed_forward else None,
                drop_path=sizes.drop_path * (i / (sizes.depth - 1) if sizes.depth > 1 else 1.0),
                backend=backend,
            )
            for i in range(sizes.depth)
        )
        last = sizes.norm_place == "pre" if final_norm is None else final_norm
        self.norm = norm_of(sizes) if last else nn.Identity()

    def forward(
        self,
        x: Float[Tensor, "b t d"],
        places: Places = ANYWHERE,
        *,
        source: Float[Tensor, "b s d2"] | None = None,
        source_places: Places = ANYWHERE,
        weights: list[Tensor] | None = None,
        hidden: list[Tensor] | None = None,
        routed: list | None = None,
    ) -> Float[Tensor, "b t d"]:
        """All blocks and the last norm.

        Args:
            x: Tokens.
            places: Positions and mask.
            source: What blocks with cross-attention look at; without it they leave that part out.
            source_places: Mask of the cross-attention.
            weights: If given, attention weights ``b h q k`` of every block are appended to it.
            hidden: If given, what goes into each block is appended to it.
            routed: If given, what each mixture of experts did is appended to it.

        Raises:
            ConfigError: A source came, and there is no cross-attention.
        """
        if source is not None and not self.sizes.d_source:
            raise ConfigError("a source came, but these blocks have no cross-attention", remedy="set d_source")
        for block in self.blocks:
            if hidden is not None:
                hidden.append(x)
            if self.training and self.sizes.layer_drop and float(torch.rand(())) < self.sizes.layer_drop:
                continue
            x = block(x, places, source=source, source_places=source_places, weights=weights, routed=routed)
        return self.norm(x)


def norm_of(sizes: TransformerSizes) -> nn.Module:
    """A norm of the kind that the sizes name."""
    return (nn.LayerNorm if sizes.norm == "layer" else nn.RMSNorm)(sizes.d, eps=sizes.eps)
