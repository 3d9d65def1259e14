"""Small networks on top of an encoder."""

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional


class ProjectionHead(nn.Module):
    """Two-layer MLP into a shared space: linear, GELU, dropout, linear.

    Features are scaled to root mean square 1 first, without a learned weight: towers differ (unit vectors of width 384
    have 0.05, ReLU6 features about 0.5), and one learning rate has to fit both sides.

    Args:
        d_in: Width of the features.
        d_hidden: Width between the layers.
        d_out: Width of the shared space.
        dropout: Share of hidden units dropped while training.

    Example:
        >>> head = ProjectionHead(1280, 512, 256, dropout=0.3)
        >>> sum(p.numel() for p in head.parameters())
        787200
    """

    def __init__(self, d_in: int, d_hidden: int, d_out: int, *, dropout: float = 0.0) -> None:
        super().__init__()
        self.d_out = d_out
        self.layers = nn.Sequential(
            nn.Linear(d_in, d_hidden), nn.GELU(), nn.Dropout(dropout), nn.Linear(d_hidden, d_out)
        )

    def forward(self, features: Float[Tensor, "b d"]) -> Float[Tensor, "b e"]:
        """Project; the result is not normalized."""
        return self.layers(functional.rms_norm(features, features.shape[-1:]))


class MaskedHead(nn.Module):
    """BERT's head for masked tokens (https://arxiv.org/abs/1810.04805): linear, GELU, norm, then the embedding table.

    Args:
        d: Width of hidden states.
        vocabulary: Token ids.
        eps: Of the norm.
    """

    def __init__(self, d: int, vocabulary: int, *, eps: float = 1e-12) -> None:
        super().__init__()
        self.dense = nn.Linear(d, d)
        self.norm = nn.LayerNorm(d, eps=eps)
        self.bias = nn.Parameter(torch.zeros(vocabulary))

    def forward(self, hidden: Float[Tensor, "*b d"], table: Float[Tensor, "v d"]) -> Float[Tensor, "*b v"]:
        """Scores of every token."""
        return functional.linear(self.norm(functional.gelu(self.dense(hidden))), table, self.bias)
