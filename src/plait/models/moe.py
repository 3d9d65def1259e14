"""Mixture of experts: each token passes only the feed-forward networks that a router chooses for it.

Shazeer et al., https://arxiv.org/abs/1701.06538; top-k with renormalized weights as in Mixtral,
https://arxiv.org/abs/2401.04088; balance as in Switch Transformer, https://arxiv.org/abs/2101.03961, and by document as
in DeepSeek-V3, https://arxiv.org/abs/2412.19437; capacity as in GShard, https://arxiv.org/abs/2006.16668; dense to
sparse as in sparse upcycling, https://arxiv.org/abs/2212.05055.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from fractions import Fraction
from typing import NamedTuple

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn
from torch.nn import functional

from plait.core import dtensors
from plait.core.errors import ConfigError
from plait.models.transformer import ACTIVATIONS, Activation, FeedForward, TransformerSizes


class Routed(NamedTuple):
    """What a router did, as sums over real tokens: sums of micro-batches and ranks add up to those of the whole.

    Attributes:
        chosen: How often each expert was chosen.
        probability: Sum of each expert's probability; has gradients.
        tokens: How many tokens there were.
        dropped: How many choices no expert had room for.
    """

    chosen: Float[Tensor, " expert"]
    probability: Float[Tensor, " expert"]
    tokens: Float[Tensor, ""]
    dropped: Float[Tensor, ""]

    def __add__(self, other: tuple) -> Routed:  # pyright: ignore[reportIncompatibleMethodOverride]
        """Both together."""
        return Routed(*(a + b for a, b in zip(self, other, strict=True)))


class Choices(NamedTuple):
    """What a router did with each token.

    Attributes:
        probability: Of each expert; has gradients.
        chosen: The experts of highest probability, that one first.
        kept: Which of these had room; none has at padding.
        document: Number of each token's document, from 0 in the order of rows; -1 is padding.
        lengths: Tokens of each document.
    """

    probability: Float[Tensor, "n expert"]
    chosen: Int[Tensor, "n k"]
    kept: Bool[Tensor, "n k"]
    document: Int[Tensor, " n"]
    lengths: Int[Tensor, " doc"]

    @property
    def dropped(self) -> Int[Tensor, ""]:
        """How many choices of real tokens had no room."""
        return (~self.kept & (self.document >= 0)[:, None]).sum()

    @property
    def routed(self) -> Routed:
        """The sums over all real tokens."""
        real = (self.document >= 0).to(self.probability)
        return Routed(
            chosen=(self._picks() * real[:, None]).sum(0),
            probability=(self.probability * real[:, None]).sum(0),
            tokens=real.sum(),
            dropped=self.dropped.to(real),
        )

    def balance(self) -> Float[Tensor, ""]:
        """Sum over documents of ``experts * sum_e share_e * probability_e``, both means over the document's tokens.

        Equations 17 to 20 of DeepSeek-V3, times ``top_k``. A sum over documents adds up over micro-batches and ranks,
        which a balance over a whole batch, a product of two means, does not.
        """
        real = self.document >= 0
        each = self.probability.new_zeros(len(self.lengths), self.probability.shape[1])
        share = each.index_add(0, self.document[real], self._picks()[real])
        mean = each.index_add(0, self.document[real], self.probability[real])
        return each.shape[1] * (share * mean / self.lengths[:, None] ** 2).sum()

    def _picks(self) -> Float[Tensor, "n expert"]:
        ones = torch.ones_like(self.chosen, dtype=self.probability.dtype)
        return torch.zeros_like(self.probability).scatter_add(1, self.chosen, ones).detach()


def balance_loss(routed: Routed) -> Float[Tensor, ""]:
    """``experts * sum_e share_e * probability_e``; equations 4 to 6 of Switch Transformer.

    It is ``top_k`` where all experts are chosen alike. The product of two means: sums of all micro-batches and ranks go
    in first, for the mean of their losses is another number.
    """
    return len(routed.chosen) * (routed.chosen / routed.tokens * (routed.probability / routed.tokens)).sum()


class Router(nn.Module):
    """A score for each expert; no ``nn.Linear``, so that what adapts or shrinks these leaves it alone.

    Args:
        d: Width.
        experts: How many.
    """

    def __init__(self, d: int, *, experts: int) -> None:
        super().__init__()
        bound = 1 / math.sqrt(d)  # as torch draws linear layers
        self.weight = nn.Parameter(torch.empty(experts, d).uniform_(-bound, bound))

    def forward(self, x: Float[Tensor, "n d"]) -> Float[Tensor, "n expert"]:
        """Scores."""
        return functional.linear(x, self.weight)


class Experts(nn.Module):
    """The networks of one layer. Each kind of weight is one tensor ``expert out in``, named as in transformers.

    Args:
        sizes: Width, inner width and kind of each.
        experts: How many.
    """

    def __init__(self, sizes: TransformerSizes, *, experts: int) -> None:
        super().__init__()
        inner = sizes.d_ff or 4 * sizes.d
        self.activation: Activation = sizes.activation
        self.gated, self.dropout = sizes.gated, sizes.dropout_inside
        self.up = "gate_up_proj" if sizes.gated else "up_proj"
        wide = inner * (2 if sizes.gated else 1)
        for name, out, width in ((self.up, wide, sizes.d), ("down_proj", sizes.d, inner)):
            bound = 1 / math.sqrt(width)
            self.register_parameter(name, nn.Parameter(torch.empty(experts, out, width).uniform_(-bound, bound)))
            bias = nn.Parameter(torch.empty(experts, out).uniform_(-bound, bound)) if sizes.bias else None
            self.register_parameter(f"{name}_bias", bias)

    def forward(self, x: Float[Tensor, "n d"], counts: Sequence[int]) -> Float[Tensor, "n d"]:
        """Transform tokens.

        Args:
            x: Those of the first expert first.
            counts: How many each expert has.
        """
        each = zip(x.split(list(counts)), *(self._each(name, len(counts)) for name in self._names()), strict=True)
        return torch.cat([self._one(tokens, weights) for tokens, *weights in each])

    def _one(self, x: Tensor, weights: Sequence[Tensor | None]) -> Tensor:
        up, up_bias, down, down_bias = weights
        assert up is not None
        assert down is not None
        inner, act = functional.linear(x, up, up_bias), ACTIVATIONS[self.activation]
        if self.gated:
            gate, inner = inner.chunk(2, dim=-1)
            inner = act(gate) * inner
        else:
            inner = act(inner)
        return functional.linear(functional.dropout(inner, self.dropout, self.training), down, down_bias)

    def _names(self) -> tuple[str, ...]:
        return self.up, f"{self.up}_bias", "down_proj", "down_proj_bias"

    def _each(self, name: str, count: int) -> Sequence[Tensor | None]:
        """A weight of each expert that lies here."""
        weight: Tensor | None = getattr(self, name)
        return [None] * count if weight is None else dtensors.local(weight).unbind(0)


Through = Callable[[Experts, Tensor, Sequence[int]], Tensor]
"""Brings tokens, sorted by expert, through their experts: ``(experts, tokens, count of each expert)``."""


class MixtureOfExperts(nn.Module):
    """``sum_i w_i expert_i(x)`` over the ``top_k`` experts of highest probability, their weights made to sum to 1.

    With a capacity, an expert takes ``ceil(capacity * top_k * tokens / experts)`` tokens of each document while
    training: first choices before second ones, earlier tokens before later ones. A choice beyond that adds nothing, so
    that such a token passes by the residual, and is counted (``dropped``). GShard counts within groups of tokens; here
    a document is the group, since then it does not matter how a batch is split over micro-batches and processes.

    Weights have the names of a Mixtral layer in transformers.

    Args:
        sizes: Width, inner width and kind of each expert.
        experts: How many.
        top_k: How many a token passes.
        capacity: Room of an expert, as a multiple of an even share; None drops nothing.

    Attributes:
        documents: Where it is not an argument of the forward, this tells documents while training.
        choices: If a list, what the router did is appended.
        through: Brings tokens through experts that other processes hold (:mod:`plait.models.moe_parallel`).

    Raises:
        ConfigError: ``top_k`` is not between 1 and the number of experts, or the capacity is not above 0.

    Example:
        >>> layer = MixtureOfExperts(TransformerSizes(d=8, depth=1, heads=1, d_ff=16), experts=4, top_k=2)
        >>> routed = []
        >>> layer(torch.rand(2, 5, 8), routed=routed).shape, int(routed[0].chosen.sum())
        (torch.Size([2, 5, 8]), 20)
    """

    def __init__(self, sizes: TransformerSizes, *, experts: int, top_k: int = 2, capacity: float | None = None) -> None:
        super().__init__()
        if not 1 <= top_k <= experts:
            raise ConfigError(f"top_k is {top_k} of {experts} experts", remedy="choose between 1 and all of them")
        if capacity is not None and not 0 < capacity < math.inf:
            raise ConfigError(f"capacity is {capacity}", remedy="give a number above 0, such as 1.25, or none")
        self.count, self.top_k, self.capacity = experts, top_k, capacity
        self.gate = Router(sizes.d, experts=experts)
        self.experts = Experts(sizes, experts=experts)
        self.documents: Int[Tensor, "*b"] | None = None
        self.choices: list[Choices] | None = None
        self.through: Through | None = None

    def forward(
        self,
        x: Float[Tensor, "*b d"],
        *,
        documents: Int[Tensor, "*b"] | None = None,
        routed: list[Routed] | None = None,
    ) -> Float[Tensor, "*b d"]:
        """Route every token.

        Args:
            x: Tokens.
            documents: Which document of its row each token is of; 0 is padding, which passes no expert and does not
                count. Without it, each row is one.
            routed: If given, what the router did is appended.

        Raises:
            ValueError: Documents are told of other tokens.
        """
        tokens = x.flatten(0, -2)
        if x.is_meta:
            return self._even(tokens).view(x.shape)
        choices, weight = self._choose(tokens, self._numbers(x, documents))
        if routed is not None:
            routed.append(choices.routed)
        if self.choices is not None:
            self.choices.append(choices)
        # One run of tokens an expert: sorted once instead of searched for each of them.
        free = torch.where(choices.kept, choices.chosen, self.count).flatten()
        order = free.argsort(stable=True)
        counts: list[int] = torch.bincount(free, minlength=self.count + 1).tolist()[: self.count]
        places = order[: sum(counts)]
        rows = places // self.top_k
        through = self.through or _here
        found = through(self.experts, tokens[rows], counts) * weight.flatten()[places, None]
        return torch.zeros_like(tokens).index_add(0, rows, found.to(tokens.dtype)).view(x.shape)

    def _even(self, tokens: Tensor) -> Tensor:
        """Where only sizes count, tokens are dealt out evenly."""
        self.gate(tokens)
        all_of_them, rest = divmod(len(tokens) * self.top_k, self.count)
        counts = [all_of_them + (number < rest) for number in range(self.count)]
        return self.experts(tokens.repeat(self.top_k, 1), counts).view(self.top_k, *tokens.shape).sum(0)

    def _choose(self, tokens: Tensor, document: Int[Tensor, " n"]) -> tuple[Choices, Float[Tensor, "n k"]]:
        scores = self.gate(tokens)
        probability = scores.softmax(-1, dtype=torch.promote_types(scores.dtype, torch.float32))
        weight, chosen = probability.topk(self.top_k, dim=-1)
        lengths = torch.bincount(document[document >= 0])
        kept = (document >= 0)[:, None].expand_as(chosen)
        if self.capacity is not None and self.training:
            kept = kept & with_room(chosen, document, lengths=lengths, experts=self.count, capacity=self.capacity)
        choices = Choices(probability=probability, chosen=chosen, kept=kept, document=document, lengths=lengths)
        return choices, (weight / weight.sum(-1, keepdim=True)).to(tokens.dtype)

    def _numbers(self, x: Tensor, documents: Tensor | None) -> Int[Tensor, " n"]:
        """The document of each token, counted through all rows."""
        told = documents if documents is not None or not self.training else self.documents
        if told is None:
            told = torch.ones(x.shape[:-1], dtype=torch.long, device=x.device)
        if told.shape != x.shape[:-1]:
            raise ValueError(f"documents of {list(told.shape)} tokens are told, {list(x.shape[:-1])} came")
        rows = told.reshape(-1, told.shape[-1])
        starts = torch.arange(len(rows), device=x.device)[:, None] * (int(rows.max()) + 1 if rows.numel() else 1)
        found = torch.full_like(rows, -1).flatten()
        real = rows.flatten() != 0
        found[real] = (starts + rows).flatten()[real].unique(return_inverse=True)[1]
        return found


def with_room(
    chosen: Int[Tensor, "n k"],
    document: Int[Tensor, " n"],
    *,
    lengths: Int[Tensor, " doc"],
    experts: int,
    capacity: float,
) -> Bool[Tensor, "n k"]:
    """Which choices are within ``ceil(capacity * k * length / experts)`` of their document and expert.

    First choices take their places before second ones, earlier tokens before later ones (GShard, algorithm 1).

    Args:
        chosen: Experts of each token, the first choice first.
        document: Of each token; -1 is padding.
        lengths: Tokens of each document.
        experts: How many there are.
        capacity: Multiple of an even share.
    """
    share = Fraction(str(capacity)) * chosen.shape[1] / experts  # exact: 1.1 * 10 has no rest
    room = -(-lengths * share.numerator // share.denominator)
    real = document >= 0
    queue = torch.where(real, document * experts, -experts) + chosen.T  # by choice, then by token
    order = queue.flatten().argsort(stable=True)
    runs = queue.flatten()[order]
    place = torch.empty_like(order)
    place[order] = torch.arange(len(order), device=order.device) - torch.searchsorted(runs, runs)
    allowed = torch.zeros_like(document)
    allowed[real] = room[document[real]]
    return (place.view(chosen.shape[1], -1) < allowed).T


def _here(experts: Experts, tokens: Tensor, counts: Sequence[int]) -> Tensor:
    return experts(tokens, counts)


def upcycled(
    dense: FeedForward, sizes: TransformerSizes, *, experts: int, top_k: int = 2, capacity: float | None = None
) -> MixtureOfExperts:
    """A mixture whose experts all start as copies of a dense network: at first it computes what that one did.

    They come apart because each sees other tokens; the router starts small and random.

    Args:
        dense: Trained network.
        sizes: Of the block that it is from.
        experts: How many copies.
        top_k: How many a token passes.
        capacity: See :class:`MixtureOfExperts`.
    """
    made = MixtureOfExperts(sizes, experts=experts, top_k=top_k, capacity=capacity).to(next(dense.parameters()))
    with torch.no_grad():
        for name, layer in ((made.experts.up, dense.up), ("down_proj", dense.down)):
            made.experts.get_parameter(name).copy_(layer.weight)
            if layer.bias is not None:
                made.experts.get_parameter(f"{name}_bias").copy_(layer.bias)
    nn.init.normal_(made.gate.weight, std=0.02)
    return made
