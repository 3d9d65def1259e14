"""Encoders of one modality inside a fusion: a stream in, a stream out, masks kept."""

from collections.abc import Mapping

from torch import nn

from plait.models.attention import Places, real_keys
from plait.models.fusion.streams import Stream
from plait.models.transformer import Transformer


class Tokenwise(nn.Module):
    """Any module that works on every token alone: a linear layer, an MLP, a norm.

    Args:
        module: ``b n d`` to ``b n e``.
    """

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.module = module

    def forward(self, stream: Stream) -> Stream:
        """Transform."""
        return Stream(tokens=self.module(stream.tokens), real=stream.real, present=stream.present)


class TokenTower(nn.Module):
    """A Transformer over the tokens that count, behind a projection to its width.

    Args:
        transformer: The blocks.
        project: ``b n d`` to the Transformer's width; None: the tokens have it.
    """

    def __init__(self, transformer: Transformer, *, project: nn.Module | None = None) -> None:
        super().__init__()
        self.project = nn.Identity() if project is None else project
        self.transformer = transformer
        self.d_out = transformer.d_out

    def forward(self, stream: Stream) -> Stream:
        """Encode."""
        places = Places(mask=real_keys(stream.there))
        tokens = self.transformer(self.project(stream.tokens), places)
        return Stream(tokens=tokens, real=stream.real, present=stream.present)


class Pool(nn.Module):
    """Mean of the tokens that count: from words or regions to one vector, the sentence or the picture."""

    def forward(self, stream: Stream) -> Stream:
        """Pool."""
        return Stream(tokens=stream.mean()[:, None], present=stream.here)


def widths_of(layers: Mapping[str, nn.Module]) -> dict[str, int]:
    """Width that each takes, where it is a linear layer and so can tell."""
    return {name: layer.in_features for name, layer in layers.items() if isinstance(layer, nn.Linear)}
