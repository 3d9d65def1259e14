"""Small networks on top of an encoder."""

from itertools import chain, pairwise

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional


class ProjectionHead(nn.Module):
    """MLP into a shared space, of two layers or more: linear, GELU, dropout, linear.

    Features are scaled to root mean square 1 first, without a learned weight: towers differ (unit vectors of width 384
    have 0.05, ReLU6 features about 0.5), and one learning rate has to fit both sides.

    Args:
        d_in: Width of the features.
        d_hidden: Width between the layers.
        d_out: Width of the shared space.
        dropout: Share of hidden units dropped while training.
        depth: Linear layers.

    Example:
        >>> head = ProjectionHead(1280, 512, 256, dropout=0.3)
        >>> sum(p.numel() for p in head.parameters())
        787200
    """

    def __init__(self, d_in: int, d_hidden: int, d_out: int, *, dropout: float = 0.0, depth: int = 2) -> None:
        super().__init__()
        self.d_out = d_out
        widths = [d_in, *[d_hidden] * (depth - 1)]
        inner = [(nn.Linear(a, b), nn.GELU(), nn.Dropout(dropout)) for a, b in pairwise(widths)]
        self.layers = nn.Sequential(*chain.from_iterable(inner), nn.Linear(widths[-1], d_out))

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


class MatchingHead(nn.Module):
    """Whether a text belongs to a picture, judged by every query and averaged (BLIP-2, https://arxiv.org/abs/2301.12597).

    Args:
        d: Width of queries that have seen both.
    """

    def __init__(self, d: int) -> None:
        super().__init__()
        self.judge = nn.Linear(d, 2)

    def forward(self, queries: Float[Tensor, "b q d"]) -> Float[Tensor, "b 2"]:
        """Scores of no and yes."""
        return self.judge(queries).mean(1)


class QueryContrastHead(nn.Module):
    """Pictures, each a handful of queries, and texts in one space: a pair is as near as the nearest query is.

    Section 3.1 of BLIP-2, after FILIP's way to compare parts (https://arxiv.org/abs/2111.07783).

    Args:
        d: Width of queries and text.
        d_out: Of the shared space.

    Example:
        >>> head = QueryContrastHead(8, 4)
        >>> image, text = head.image_vectors(torch.rand(3, 5, 8)), head.text_vectors(torch.rand(2, 8))
        >>> head.similarity(image, text).shape
        torch.Size([3, 2])
    """

    def __init__(self, d: int, d_out: int) -> None:
        super().__init__()
        self.image, self.text = nn.Linear(d, d_out), nn.Linear(d, d_out)

    def image_vectors(self, queries: Float[Tensor, "b q d"]) -> Float[Tensor, "b q e"]:
        """Unit vectors of every query."""
        return functional.normalize(self.image(queries), dim=-1)

    def text_vectors(self, text: Float[Tensor, "b d"]) -> Float[Tensor, "b e"]:
        """Unit vectors of texts."""
        return functional.normalize(self.text(text), dim=-1)

    @staticmethod
    def similarity(image: Float[Tensor, "b q e"], text: Float[Tensor, "c e"]) -> Float[Tensor, "b c"]:
        """Cosine of each text with the query of each picture that is nearest to it."""
        return (image @ text.T).amax(1)
