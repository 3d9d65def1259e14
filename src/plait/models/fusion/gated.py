"""Gated fusion: learned gates say, number by number, how much of each modality passes.

Arevalo et al., "Gated multimodal units", https://arxiv.org/abs/1702.01992, equations 1 to 4 and figure 2.
"""

from collections.abc import Mapping
from typing import Literal

import torch
from torch import Tensor, nn

from plait.core.errors import ConfigError
from plait.models.fusion.streams import Fused, Inputs, at_least, pooled

Sees = Literal["all", "own"]


class GatedFusion(nn.Module):
    """``h = sum_m z_m * h_m``, ``h_m = tanh(W_m x_m)``, ``z_m = sigmoid(V_m [x_1; ..; x_k])``.

    ``tied`` is the unit for two modalities: ``z_2 = 1 - z_1``. The gate of an absent modality is 0; in the tied form
    the other's is then 1.

    Args:
        widths: Width of each modality.
        d_out: Width of the result, and of each gate.
        tied: Two modalities share one gate.
        sees: What a gate looks at: ``all`` modalities (the paper), so that a closed gate stops what a modality says but
            not what it does to the other gates; or its ``own``, so that a closed gate stops everything.
        bias: Whether ``W`` and ``V`` have one; the paper's equations have none.

    Raises:
        ConfigError: Tied with other than two modalities, or with gates that see only their own.

    Example:
        >>> from plait.models.fusion.streams import vector
        >>> fuse = GatedFusion({"image": 8, "text": 4}, 16)
        >>> lost = vector(torch.full((1, 8), torch.nan), present=torch.tensor([False]))
        >>> fuse({"image": lost, "text": vector(torch.rand(1, 4))}).weights["gates"][0, 0].unique().tolist()
        [0.0]
    """

    def __init__(
        self, widths: Mapping[str, int], d_out: int, *, tied: bool = False, sees: Sees = "all", bias: bool = True
    ) -> None:
        super().__init__()
        names = at_least(1, list(widths), kind="gated fusion")
        if tied and (len(names) != 2 or sees == "own"):
            raise ConfigError(
                f"a tied gate is for two modalities and sees both; came {len(names)}, seeing {sees}",
                remedy="leave out tied, or give two modalities and sees='all'",
            )
        self.widths, self.d_out, self.tied = dict(widths), d_out, tied
        self.sees: Sees = sees
        total = sum(widths.values())
        self.hidden = nn.ModuleDict({name: nn.Linear(width, d_out, bias=bias) for name, width in widths.items()})
        gated = names[:1] if tied else names
        self.gates = nn.ModuleDict(
            {name: nn.Linear(total if sees == "all" else widths[name], d_out, bias=bias) for name in gated}
        )

    def forward(self, inputs: Inputs, *, need_weights: bool = False) -> Fused:
        """Fuse; ``weights["gates"]`` is ``b m d_out``. They are always given."""
        means, there = pooled(inputs, self.widths)
        gates = self._open(means).masked_fill(~there[..., None], 0.0)
        if self.tied:
            alone = there & ~there.flip(1)
            gates = gates.masked_fill(alone[..., None], 1.0)
        hidden = torch.stack([self.hidden[name](x).tanh() for name, x in means.items()], dim=1)
        return Fused(values=(gates * hidden).sum(1), present=there.any(1), weights={"gates": gates})

    def _open(self, means: dict[str, Tensor]) -> Tensor:
        together = torch.cat(list(means.values()), dim=1)
        found = [gate(together if self.sees == "all" else means[name]).sigmoid() for name, gate in self.gates.items()]
        return torch.stack([found[0], 1 - found[0]] if self.tied else found, dim=1)
