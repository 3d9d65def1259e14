"""Mixture of experts: each token passes only the feed-forward networks that a router chooses for it.

Shazeer et al., https://arxiv.org/abs/1701.06538; top-k with renormalized weights as in Mixtral,
https://arxiv.org/abs/2401.04088; balance as in Switch Transformer, https://arxiv.org/abs/2101.03961; dense to sparse as
in sparse upcycling, https://arxiv.org/abs/2212.05055.
"""

from typing import NamedTuple

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from plait.core.errors import ConfigError
from plait.models.transformer import FeedForward, TransformerSizes


class Routed(NamedTuple):
    """What a router did, as sums over real tokens: sums of micro-batches and ranks add up to those of the whole.

    Attributes:
        chosen: How often each expert was chosen.
        probability: Sum of each expert's probability; has gradients.
        tokens: How many tokens there were.
    """

    chosen: Float[Tensor, " expert"]
    probability: Float[Tensor, " expert"]
    tokens: Float[Tensor, ""]

    def __add__(self, other: tuple) -> "Routed":  # pyright: ignore[reportIncompatibleMethodOverride]
        """Both together."""
        return Routed(*(a + b for a, b in zip(self, other, strict=True)))


def balance_loss(routed: Routed) -> Float[Tensor, ""]:
    """``experts * sum_e share_e * probability_e``; equations 4 to 6 of Switch Transformer.

    It is ``top_k`` where all experts are chosen alike. The product of two means: sums of all micro-batches and ranks go
    in first, for the mean of their losses is another number.
    """
    return len(routed.chosen) * (routed.chosen / routed.tokens * (routed.probability / routed.tokens)).sum()


class MixtureOfExperts(nn.Module):
    """``sum_i w_i expert_i(x)`` over the ``top_k`` experts of highest probability, their weights made to sum to 1.

    No token is dropped: experts have no capacity.

    Args:
        sizes: Width, inner width and kind of each expert.
        experts: How many.
        top_k: How many a token passes.

    Raises:
        ConfigError: ``top_k`` is not between 1 and the number of experts.

    Example:
        >>> layer = MixtureOfExperts(TransformerSizes(d=8, depth=1, heads=1, d_ff=16), experts=4, top_k=2)
        >>> routed = []
        >>> layer(torch.rand(2, 5, 8), routed=routed).shape, int(routed[0].chosen.sum())
        (torch.Size([2, 5, 8]), 20)
    """

    def __init__(self, sizes: TransformerSizes, *, experts: int, top_k: int = 2) -> None:
        super().__init__()
        if not 1 <= top_k <= experts:
            raise ConfigError(f"top_k is {top_k} of {experts} experts", remedy="choose between 1 and all of them")
        self.top_k = top_k
        self.router = nn.Linear(sizes.d, experts, bias=False)
        self.experts = nn.ModuleList(
            FeedForward(
                sizes.d,
                sizes.d_ff or 4 * sizes.d,
                activation=sizes.activation,
                gated=sizes.gated,
                bias=sizes.bias,
                dropout=sizes.dropout_inside,
            )
            for _ in range(experts)
        )

    def forward(
        self,
        x: Float[Tensor, "*b d"],
        *,
        real: Bool[Tensor, "*b"] | None = None,
        routed: list[Routed] | None = None,
    ) -> Float[Tensor, "*b d"]:
        """Route every token.

        Args:
            x: Tokens.
            real: Which of them count in the balance; all unless given.
            routed: If given, what the router did is appended.
        """
        tokens = x.flatten(0, -2)
        probability = self.router(tokens).softmax(-1, dtype=torch.float32)
        weight, chosen = probability.topk(self.top_k, dim=-1)
        weight = (weight / weight.sum(-1, keepdim=True)).to(x.dtype)
        if routed is not None:
            routed.append(_sums(probability, chosen, real))
        out = torch.zeros_like(tokens)
        # One run of tokens an expert: sorted once instead of searched for each of them.
        order = chosen.flatten().argsort(stable=True)
        counts: list[int] = torch.bincount(chosen.flatten(), minlength=len(self.experts)).tolist()
        for expert, places in zip(self.experts, order.split(counts), strict=True):
            if len(places):
                rows = places // self.top_k
                out = out.index_add(0, rows, expert(tokens[rows]) * weight.flatten()[places, None])
        return out.view(x.shape)


def _sums(probability: Tensor, chosen: Int[Tensor, "n k"], real: Tensor | None) -> Routed:
    counted = probability.new_ones(len(probability)) if real is None else real.flatten().to(probability)
    picks = torch.zeros_like(probability).scatter_add(1, chosen, torch.ones_like(chosen, dtype=probability.dtype))
    return Routed(
        chosen=(picks * counted[:, None]).sum(0).detach(),
        probability=(probability * counted[:, None]).sum(0),
        tokens=counted.sum(),
    )


def upcycled(dense: FeedForward, sizes: TransformerSizes, *, experts: int, top_k: int = 2) -> MixtureOfExperts:
    """A mixture whose experts all start as copies of a dense network: at first it computes what that one did.

    They come apart because each sees other tokens; the router starts small and random.

    Args:
        dense: Trained network.
        sizes: Of the block that it is from.
        experts: How many copies.
        top_k: How many a token passes.
    """
    made = MixtureOfExperts(sizes, experts=experts, top_k=top_k).to(next(dense.parameters()))
    for expert in made.experts:
        expert.load_state_dict(dense.state_dict())
    nn.init.normal_(made.router.weight, std=0.02)
    return made
