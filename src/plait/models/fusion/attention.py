"""Attention fusion: a learned question weighs the modalities of each sample; the weights can be read."""

from collections.abc import Mapping

import torch
from torch import nn

from plait.models.attention import Attention, AttentionSizes, Places, real_keys
from plait.models.fusion.streams import Fused, Inputs, at_least, pooled


class AttentionFusion(nn.Module):
    """``sum_m w_m h_m`` with ``h_m = norm(W_m x_m)`` and ``w = softmax(q . K h)`` over the modalities that are present.

    Multi-head attention (https://arxiv.org/abs/1706.03762) whose keys are the modalities and whose query is learned.
    The weights of a sample sum to 1; where it has no modality at all they, and what comes out, are 0.

    Args:
        widths: Width of each modality.
        d_out: Width it works in, and of the result.
        heads: Each weighs the modalities on its own; the weights given out are their mean.
        dropout: Share of weights dropped while training.

    Raises:
        ConfigError: Built for no modality, or heads do not divide the width.

    Example:
        >>> from plait.models.fusion.streams import vector
        >>> fuse = AttentionFusion({"image": 8, "text": 4}, 16, heads=2)
        >>> fused = fuse({"image": vector(torch.rand(3, 8)), "text": vector(torch.rand(3, 4))})
        >>> fused.weights["modality"].sum(1).round(decimals=5).tolist()
        [1.0, 1.0, 1.0]
    """

    def __init__(self, widths: Mapping[str, int], d_out: int, *, heads: int = 1, dropout: float = 0.0) -> None:
        super().__init__()
        at_least(1, list(widths), kind="attention fusion")
        self.widths, self.d_out = dict(widths), d_out
        self.projections = nn.ModuleDict({name: nn.Linear(width, d_out) for name, width in widths.items()})
        self.norms = nn.ModuleDict({name: nn.LayerNorm(d_out) for name in widths})
        self.query = nn.Parameter(torch.empty(d_out))
        nn.init.normal_(self.query, std=0.02)
        self.attention = Attention(AttentionSizes(d=d_out, heads=heads, d_source=d_out, dropout=dropout))

    def forward(self, inputs: Inputs, *, need_weights: bool = False) -> Fused:
        """Fuse; ``weights["modality"]`` is ``b m``, in the order of the widths. They are always given."""
        means, there = pooled(inputs, self.widths)
        hidden = torch.stack([self.norms[name](self.projections[name](x)) for name, x in means.items()], dim=1)
        asked = self.query.expand(len(hidden), 1, -1)
        values, weights = self.attention(asked, Places(mask=real_keys(there)), source=hidden, need_weights=True)
        assert weights is not None
        present = there.any(1)
        values = values[:, 0].masked_fill(~present[:, None], 0.0)  # of nothing, the output projection left its bias
        return Fused(values=values, present=present, weights={"modality": weights[:, :, 0].mean(1)})
