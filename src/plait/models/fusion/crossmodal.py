"""Cross-modal attention: one modality asks another, token by token or as a whole sentence.

Section 4 of the notes that this project follows ends before the residual; ``A V`` is ``n x d_v`` there and cannot be
added to ``n x d_1``. The output projection makes it fit, as in https://arxiv.org/abs/1706.03762 and
https://arxiv.org/abs/1908.02265 (ViLBERT's co-attention).
"""

from collections.abc import Mapping
from typing import Literal

import torch
from torch import Tensor, nn

from plait.core.errors import ConfigError
from plait.models.attention import Attended, Attention, AttentionSizes, Places
from plait.models.fusion.streams import Fused, Inputs, Stream, at_least, take
from plait.models.transformer import NormPlace, Part, TransformerSizes

Level = Literal["token", "sentence"]


class CrossModalAttention(nn.Module):
    """``x + W_O concat_i softmax(x W_Q (s W_K)' / sqrt(d_k)) s W_V``, with the norm before or after.

    A sample whose source is absent, or empty, passes unchanged (but for a norm after).

    Args:
        d1: Width of what asks, and of the result.
        d2: Width of the source.
        heads: Of attention.
        d_k: Width of a head's queries and keys; 0: ``d1 / heads``.
        d_v: Width of a head's values; 0: ``d_k``.
        norm_place: ``pre``: ``x + f(norm(x))``; ``post``: ``norm(x + f(x))``; ``none``.
        gated: Multiply what is added by ``tanh(a)``, a = 0 at the start, so that it then changes nothing.
        dropout: Share of what is added dropped while training.

    Raises:
        ConfigError: Heads do not divide the width, and ``d_k`` is not given.

    Example:
        >>> text, image = Stream(tokens=torch.rand(2, 5, 12)), Stream(tokens=torch.rand(2, 9, 20))
        >>> found = CrossModalAttention(12, 20, heads=2, d_k=4, d_v=3)(text, image, need_weights=True)
        >>> found.values.shape, found.weights.shape
        (torch.Size([2, 5, 12]), torch.Size([2, 2, 5, 9]))
    """

    def __init__(
        self,
        d1: int,
        d2: int,
        *,
        heads: int,
        d_k: int = 0,
        d_v: int = 0,
        norm_place: NormPlace = "pre",
        gated: bool = False,
        dropout: float = 0.0,
    ) -> None:
        super().__init__()
        self.d1, self.d2 = d1, d2
        self.attention = Attention(AttentionSizes(d=d1, heads=heads, d_head=d_k, d_value=d_v, d_source=d2))
        self.part = Part(
            TransformerSizes(d=d1, depth=1, heads=heads, norm_place=norm_place, dropout=dropout), drop_path=0.0
        )
        self.gate = nn.Parameter(torch.zeros(1)) if gated else None

    def forward(self, x: Stream, source: Stream, *, need_weights: bool = False) -> Attended:
        """Ask.

        Returns:
            ``b n d1``, zeros where ``x`` has no token; and weights ``b h n s`` if asked for.
        """
        x, source = take({"x": x, "source": source}, ("x", "source"), widths={"x": self.d1, "source": self.d2}).values()
        there = source.there
        kept: list[Tensor] = []

        def look(y: Tensor) -> Tensor:
            if not there.shape[1]:
                kept.append(y.new_zeros(len(y), self.attention.heads, y.shape[1], 0))
                return torch.zeros_like(y)
            mask = Places(mask=there[:, None, None, :])
            found = self.attention(y, mask, source=source.tokens, need_weights=need_weights)
            if found.weights is not None:
                kept.append(found.weights)
            added = found.values.masked_fill(~source.here[:, None, None], 0.0)  # the projection's bias is left there
            return added if self.gate is None else self.gate.tanh() * added

        values = self.part(x.tokens, look).masked_fill(~x.there[..., None], 0.0)
        return Attended(values, kept[0] if need_weights else None)


class CrossModalFusion(nn.Module):
    """One modality asks all the others, one after the other.

    A sample without the asking modality has nothing to ask with, and gives zeros with ``present`` False; give it
    learned tokens first (:class:`~plait.models.fusion.missing.MissingTokens`) where that happens.

    Args:
        target: Who asks.
        readers: Its attention to each other modality, in the order of asking.
        level: ``token``: every word asks; ``sentence``: their mean asks, and one token comes out.
        source_level: ``token``: regions are looked at; ``sentence``: only their mean, so that weights are 1.

    Raises:
        ConfigError: No reader, the target reads itself, or widths differ.

    Example:
        >>> fuse = CrossModalFusion("text", {"image": CrossModalAttention(12, 20, heads=2)}, level="sentence")
        >>> text, image = Stream(tokens=torch.rand(2, 5, 12)), Stream(tokens=torch.rand(2, 9, 20))
        >>> fuse({"text": text, "image": image}).values.shape
        torch.Size([2, 1, 12])
    """

    def __init__(
        self,
        target: str,
        readers: Mapping[str, CrossModalAttention],
        *,
        level: Level = "token",
        source_level: Level = "token",
    ) -> None:
        super().__init__()
        at_least(1, list(readers), kind="what cross-modal fusion reads:")
        self.target, self.readers = target, nn.ModuleDict(readers)
        self.level: Level = level
        self.source_level: Level = source_level
        widths = {reader.d1 for reader in readers.values()}
        if target in readers or len(widths) > 1:
            raise ConfigError(
                f"{target} reads {', '.join(readers)}, with widths {', '.join(map(str, sorted(widths)))} of its own",
                remedy="give one attention for each other modality, all with the target's width as d1",
            )
        self.d_out = widths.pop()

    def forward(self, inputs: Inputs, *, need_weights: bool = False) -> Fused:
        """Tokens of the target that read the others; weights ``b h n s`` by name of the source."""
        streams = take(inputs, [self.target, *self.readers])
        asking = _at(streams[self.target], self.level)
        weights: dict[str, Tensor] = {}
        for name, reader in self.readers.items():
            found = reader(asking, _at(streams[name], self.source_level), need_weights=need_weights)
            asking = Stream(tokens=found.values, real=asking.real, present=asking.present)
            if need_weights:
                weights[name] = found.weights
        return Fused(values=asking.tokens, present=asking.here, real=asking.there, weights=weights)


def _at(stream: Stream, level: Level) -> Stream:
    return stream if level == "token" else Stream(tokens=stream.mean()[:, None], present=stream.here)
