"""Direct concatenation: the baseline. All tokens of all modalities, flattened into one vector.

Without normalization the modality with the larger numbers dominates, and a linear layer on top cannot see interactions;
normalization, projection, masks and modality dropout (:mod:`plait.models.fusion.missing`) repair the first and what
missing modalities break, so that a fair baseline has them.
"""

from collections.abc import Mapping
from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn import functional

from plait.core.errors import DataError
from plait.models.fusion.streams import Fused, Inputs, at_least, presence, take

Normalization = Literal["none", "layer", "unit", "rms"]


class ConcatFusion(nn.Module):
    """``[f(x_1); ..; f(x_k)]``, and a linear layer if ``d_out``.

    Absent modalities and padding are zeros, after the normalization too.

    Args:
        widths: Numbers of each modality: tokens times their width.
        d_out: Width of a linear layer after; 0: the concatenation as it is.
        normalize: Of each modality on its own, without learned weights: ``layer`` to mean 0 and variance 1, ``unit`` to
            length 1, ``rms`` to root mean square 1.
        flags: Append 1 or 0 for every modality that is present or not.

    Raises:
        ConfigError: Built for no modality.

    Example:
        >>> from plait.models.fusion.streams import Stream
        >>> both = ConcatFusion({"image": 3, "text": 2}, normalize="unit")
        >>> image, text = torch.tensor([[[0.0, 300.0, 400.0]]]), torch.tensor([[[0.6, 0.8]]])
        >>> [round(v, 2) for v in both({"image": Stream(tokens=image), "text": Stream(tokens=text)}).values[0].tolist()]
        [0.0, 0.6, 0.8, 0.6, 0.8]
    """

    def __init__(
        self, widths: Mapping[str, int], *, d_out: int = 0, normalize: Normalization = "none", flags: bool = False
    ) -> None:
        super().__init__()
        at_least(1, list(widths), kind="concatenation")
        self.widths, self.flags = dict(widths), flags
        self.normalize: Normalization = normalize
        total = sum(widths.values()) + (len(widths) if flags else 0)
        self.out = nn.Linear(total, d_out) if d_out else nn.Identity()
        self.d_out = d_out or total

    def forward(self, inputs: Inputs, *, need_weights: bool = False) -> Fused:
        """Concatenate.

        Raises:
            DataError: A modality has another number of values.
        """
        streams = take(inputs, list(self.widths))
        parts: list[Tensor] = []
        for name, stream in streams.items():
            flat = stream.tokens.flatten(1)
            if flat.shape[1] != self.widths[name]:
                raise DataError(
                    f"{name} has {stream.tokens.shape[1]} tokens of width {stream.tokens.shape[2]}, which is "
                    f"{flat.shape[1]} numbers; this concatenation was built for {self.widths[name]}",
                    place=name,
                    remedy="pool or resample to a fixed number of tokens first",
                )
            parts.append(self._normalized(flat).masked_fill(~stream.here[:, None], 0.0))
        there = presence(streams, list(self.widths))
        if self.flags:
            parts.append(there.to(parts[0].dtype))
        return Fused(values=self.out(torch.cat(parts, dim=1)), present=there.any(1))

    def _normalized(self, x: Tensor) -> Tensor:
        match self.normalize:
            case "layer":
                return functional.layer_norm(x, x.shape[-1:])
            case "unit":
                return functional.normalize(x, dim=-1)
            case "rms":
                return functional.rms_norm(x, x.shape[-1:])
            case "none":
                return x
