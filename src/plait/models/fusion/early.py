"""Early fusion: the tokens of all modalities are one sequence of a joint Transformer (self-attention fusion).

ViLT, https://arxiv.org/abs/2102.03334; VisualBERT, https://arxiv.org/abs/1908.03557. For the literal concatenation of
raw vectors see :mod:`plait.models.fusion.concat`.
"""

from collections.abc import Collection, Mapping
from itertools import accumulate

import torch
from jaxtyping import Bool
from torch import Tensor, nn

from plait.core.errors import ConfigError
from plait.models.attention import Places
from plait.models.fusion.encode import widths_of
from plait.models.fusion.streams import Fused, Inputs, Stream, at_least, take
from plait.models.transformer import Transformer


class EarlyFusion(nn.Module):
    """``Transformer([P_1 x_1 + e_1; ..; P_k x_k + e_k])`` with a learned vector ``e_m`` for each modality.

    From the first block on every modality sees the others. Positions are not added here: tokens of a tower have them,
    others need them first (:mod:`plait.models.position.absolute`).

    Args:
        projections: Of each modality, from its width to the Transformer's, token by token.
        transformer: Joint blocks.
        sees: What each modality sees; one that is not named sees all. None: all see all. ``{"image": ["image"]}`` lets
            text read pictures while pictures stay as they are.

    Raises:
        ConfigError: Built for no modality, or ``sees`` names one that is not there.

    Example:
        >>> from plait.models.transformer import TransformerSizes
        >>> joint = Transformer(TransformerSizes(d=16, depth=2, heads=2))
        >>> fuse = EarlyFusion({"image": nn.Linear(8, 16), "text": nn.Linear(4, 16)}, joint)
        >>> fuse({"image": Stream(tokens=torch.rand(3, 9, 8)), "text": Stream(tokens=torch.rand(3, 5, 4))}).values.shape
        torch.Size([3, 14, 16])
    """

    allowed: Tensor

    def __init__(
        self,
        projections: Mapping[str, nn.Module],
        transformer: Transformer,
        *,
        sees: Mapping[str, Collection[str]] | None = None,
    ) -> None:
        super().__init__()
        self.names = at_least(1, list(projections), kind="early fusion")
        self.projections, self.transformer = nn.ModuleDict(projections), transformer
        self.d_out = transformer.d_out
        self.kinds = nn.Embedding(len(self.names), self.d_out)
        nn.init.normal_(self.kinds.weight, std=0.02)
        self.register_buffer("allowed", _allowed(self.names, sees or {}), persistent=False)

    def spans(self, inputs: Inputs) -> dict[str, slice]:
        """Where the tokens of each modality stand in the joint sequence."""
        ends = list(accumulate(inputs[name].tokens.shape[1] for name in self.names))
        return {name: slice(a, b) for name, a, b in zip(self.names, [0, *ends], ends, strict=False)}

    def forward(self, inputs: Inputs, *, need_weights: bool = False) -> Fused:
        """All tokens of all modalities; ``weights["attention"]`` is ``b layer head t t``."""
        streams = take(inputs, self.names, widths=widths_of(dict(self.projections.items())))
        x = torch.cat([self._projected(i, stream) for i, stream in enumerate(streams.values())], dim=1)
        there = torch.cat([stream.there for stream in streams.values()], dim=1)
        kind = torch.cat([torch.full((s.tokens.shape[1],), i, device=x.device) for i, s in enumerate(streams.values())])
        mask = there[:, None, None, :] & self.allowed[kind[:, None], kind]
        kept: list[Tensor] | None = [] if need_weights else None
        values = self.transformer(x, Places(mask=mask), weights=kept).masked_fill(~there[..., None], 0.0)
        weights = {} if not kept else {"attention": torch.stack(kept, dim=1)}
        return Fused(values=values, present=there.any(1), real=there, weights=weights)

    def _projected(self, i: int, stream: Stream) -> Tensor:
        name = self.names[i]
        tokens = self.projections[name](stream.tokens)
        if tokens.shape[-1] != self.d_out:
            raise ConfigError(
                f"{name} is projected to width {tokens.shape[-1]}, the joint Transformer has {self.d_out}",
                place=f"projections.{name}",
                remedy=f"project every modality to {self.d_out}",
            )
        return tokens + self.kinds.weight[i]


def _allowed(names: tuple[str, ...], sees: Mapping[str, Collection[str]]) -> Bool[Tensor, "m m"]:
    strange = {n for n in sees if n not in names} | {n for seen in sees.values() for n in seen if n not in names}
    if strange:
        raise ConfigError(
            f"sees names {', '.join(sorted(strange))}; there are {', '.join(names)}",
            place="sees",
            remedy="name modalities that have a projection",
        )
    return torch.tensor([[key in sees.get(query, names) for key in names] for query in names])
