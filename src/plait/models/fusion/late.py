"""Late fusion of features: every modality is encoded on its own, then what was encoded is merged.

"Late" has two meanings. This is the one of features; where each modality decides and the decisions are merged, that is
:mod:`plait.models.fusion.decision`.
"""

from collections.abc import Mapping

import torch
from torch import nn

from plait.core.errors import ConfigError
from plait.models.fusion.streams import Fused, Fusion, Inputs, Stream, at_least, take


class LateFusion(nn.Module):
    """``head(fusion(encoder_1(x_1), .., encoder_k(x_k)))``: nothing crosses before the fusion.

    With light encoders (:class:`~plait.models.fusion.encode.Tokenwise` projections) and joint layers as head this is
    fusion at the level of features; with whole towers it is late fusion. Any fusion of this package serves.

    Args:
        encoders: Of each modality, stream to stream.
        fusion: Merges what they give.
        head: From the fused vector to the result; None: what the fusion gives.
        d_out: Width of the head's result; needed with a head.

    Raises:
        ConfigError: No encoder, or a head without its width.

    Example:
        >>> from plait.models.fusion.encode import Pool
        >>> from plait.models.fusion.gated import GatedFusion
        >>> towers = {"image": Pool(), "text": Pool()}
        >>> fuse = LateFusion(towers, GatedFusion({"image": 8, "text": 4}, 16), head=nn.Linear(16, 3), d_out=3)
        >>> fuse({"image": Stream(tokens=torch.rand(2, 9, 8)), "text": Stream(tokens=torch.rand(2, 5, 4))}).values.shape
        torch.Size([2, 3])
    """

    def __init__(
        self, encoders: Mapping[str, nn.Module], fusion: Fusion, *, head: nn.Module | None = None, d_out: int = 0
    ) -> None:
        super().__init__()
        self.names = at_least(1, list(encoders), kind="late fusion")
        if (head is None) != (d_out == 0):
            raise ConfigError("a head and its width go together", remedy="give both head and d_out, or neither")
        self.encoders, self.fusion, self.head = nn.ModuleDict(encoders), fusion, head
        self.d_out = d_out or fusion.d_out

    def encode(self, inputs: Inputs) -> dict[str, Stream]:
        """Each modality on its own; can be kept and given to :meth:`merge` later, or elsewhere."""
        streams = take(inputs, self.names)
        return {name: self.encoders[name](stream) for name, stream in streams.items()}

    def merge(self, encoded: Inputs, *, need_weights: bool = False) -> Fused:
        """Fuse what was encoded."""
        fused = self.fusion(encoded, need_weights=need_weights)
        if self.head is None:
            return fused
        return Fused(values=self.head(fused.vector()), present=fused.present, weights=fused.weights)

    def forward(self, inputs: Inputs, *, need_weights: bool = False) -> Fused:
        """Encode and merge."""
        return self.merge(self.encode(inputs), need_weights=need_weights)


def similarity(first: Stream, second: Stream) -> torch.Tensor:
    """Cosine of the means of every sample of one with every sample of the other, ``b c``: a dual encoder's score."""
    return nn.functional.normalize(first.mean(), dim=-1) @ nn.functional.normalize(second.mean(), dim=-1).mT
