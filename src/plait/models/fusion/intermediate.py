"""Intermediate fusion: towers run side by side and exchange between chosen layers; frozen towers stay as they are.

Cross-attention between two streams: ViLBERT, https://arxiv.org/abs/1908.02265; LXMERT, https://arxiv.org/abs/1908.07490.
"""

from collections.abc import Callable, Mapping
from typing import NamedTuple

import torch
from torch import Tensor, nn

from plait.core.errors import ConfigError
from plait.models.attention import Places, real_keys
from plait.models.fusion.crossmodal import CrossModalAttention
from plait.models.fusion.streams import Fused, Fusion, Inputs, Stream, at_least, take
from plait.models.transformer import Transformer

PlacesOf = Callable[[str, Stream], Places]
"""Where the tokens of a modality are and what they see in their own tower."""


class Crossed(NamedTuple):
    """Streams after an exchange, and what it weighed."""

    streams: dict[str, Stream]
    weights: dict[str, Tensor]


def every_real_token(name: str, stream: Stream) -> Places:
    """All tokens that count see each other; no positions beyond those the tokens carry."""
    return Places(mask=real_keys(stream.there))


class CrossReading(nn.Module):
    """Modalities read each other at one place; all read what the others were before.

    Args:
        readers: Who reads whom with what: target, source, attention. A modality that is not named passes unchanged.

    Raises:
        ConfigError: A modality reads itself.

    Example:
        >>> both = {"text": {"image": CrossModalAttention(12, 20, heads=2)}}
        >>> sum(p.numel() for p in CrossReading(both).parameters())
        840
    """

    def __init__(self, readers: Mapping[str, Mapping[str, CrossModalAttention]]) -> None:
        super().__init__()
        itself = [name for name, sources in readers.items() if name in sources]
        if itself:
            raise ConfigError(f"{', '.join(itself)} cannot read itself here", remedy="its own tower's attention does")
        self.readers = nn.ModuleDict({target: nn.ModuleDict(sources) for target, sources in readers.items()})

    def forward(self, streams: Mapping[str, Stream], *, need_weights: bool = False) -> Crossed:
        """Exchange; weights by ``target<source``."""
        after, weights = dict(streams), {}
        for target, sources in self.readers.items():
            assert isinstance(sources, nn.ModuleDict)
            for source, reader in sources.items():
                found = reader(after[target], streams[source], need_weights=need_weights)
                own = streams[target]
                after[target] = Stream(tokens=found.values, real=own.real, present=own.present)
                if need_weights:
                    weights[f"{target}<{source}"] = found.weights
        return Crossed(after, weights)


class Broadcast(nn.Module):
    """Any fusion in the middle of towers: its vector goes back into every token of every modality.

    ``x_m + B_m f(x_1, .., x_k)`` with ``B_m = 0`` at the start, which then changes nothing.

    Args:
        fusion: Any.
        widths: Width of each modality at this place.
    """

    def __init__(self, fusion: Fusion, widths: Mapping[str, int]) -> None:
        super().__init__()
        self.fusion = fusion
        self.back = nn.ModuleDict({name: nn.Linear(fusion.d_out, width, bias=False) for name, width in widths.items()})
        for layer in self.back.children():
            assert isinstance(layer, nn.Linear)
            nn.init.zeros_(layer.weight)

    def forward(self, streams: Mapping[str, Stream], *, need_weights: bool = False) -> Crossed:
        """Exchange."""
        fused = self.fusion(streams, need_weights=need_weights)
        told = fused.vector()[:, None]
        after = {
            name: Stream(
                tokens=(s.tokens + self.back[name](told)).masked_fill(~s.there[..., None], 0.0),
                real=s.real,
                present=s.present,
            )
            for name, s in streams.items()
        }
        return Crossed(after, dict(fused.weights))


class IntermediateFusion(nn.Module):
    """One tower a modality, exchanges after chosen blocks, and a fusion of what comes out.

    Towers may be frozen (``requires_grad_(False)``); their weights are used as they are, and with gated readers or
    :class:`Broadcast` they compute at the start what they compute alone.

    Args:
        towers: Of each modality. Tokens come in at its width, with positions where it needs them.
        crossings: What happens after which block, counted from 0: :class:`CrossReading`, :class:`Broadcast`, or another
            module of their face.
        merge: Fuses what the towers give.
        places: Positions and masks inside the towers; by default all tokens that count see each other.

    Raises:
        ConfigError: A crossing after a block that a tower does not have.

    Example:
        >>> from plait.models.fusion.concat import ConcatFusion
        >>> from plait.models.fusion.late import LateFusion
        >>> from plait.models.fusion.encode import Pool
        >>> from plait.models.transformer import TransformerSizes
        >>> towers = {name: Transformer(TransformerSizes(d=8, depth=3, heads=2)) for name in ("image", "text")}
        >>> reads = CrossReading({"text": {"image": CrossModalAttention(8, 8, heads=2, gated=True)}})
        >>> merge = LateFusion({"image": Pool(), "text": Pool()}, ConcatFusion({"image": 8, "text": 8}))
        >>> fuse = IntermediateFusion(towers, {1: reads}, merge)
        >>> fuse({"image": Stream(tokens=torch.rand(2, 9, 8)), "text": Stream(tokens=torch.rand(2, 5, 8))}).values.shape
        torch.Size([2, 16])
    """

    def __init__(
        self,
        towers: Mapping[str, Transformer],
        crossings: Mapping[int, nn.Module],
        merge: Fusion,
        *,
        places: PlacesOf = every_real_token,
    ) -> None:
        super().__init__()
        self.names = at_least(1, list(towers), kind="intermediate fusion")
        self.depth = max(tower.sizes.depth for tower in towers.values())
        shallow = min(towers, key=lambda name: towers[name].sizes.depth)
        outside = [at for at in crossings if not 0 <= at < towers[shallow].sizes.depth]
        if outside:
            raise ConfigError(
                f"crossings after blocks {', '.join(map(str, sorted(outside)))}, but the tower of {shallow} has blocks "
                f"0 to {towers[shallow].sizes.depth - 1}",
                place="crossings",
                remedy="choose blocks that every tower has",
            )
        self.towers = nn.ModuleDict(towers)
        self.crossings = nn.ModuleDict({str(at): crossing for at, crossing in sorted(crossings.items())})
        self.merge, self.places, self.d_out = merge, places, merge.d_out

    def encode(self, inputs: Inputs, *, need_weights: bool = False) -> Crossed:
        """Streams after all blocks and exchanges; weights by block, target and source."""
        towers = {name: self.towers.get_submodule(name) for name in self.names}
        widths = {name: tower.sizes.d for name, tower in towers.items() if isinstance(tower, Transformer)}
        streams, weights = take(inputs, self.names, widths=widths), {}
        places = {name: self.places(name, stream) for name, stream in streams.items()}
        for i in range(self.depth):
            for name, tower in towers.items():
                assert isinstance(tower, Transformer)
                if i < len(tower.blocks):
                    streams[name] = _replaced(streams[name], tower.blocks[i](streams[name].tokens, places[name]))
            if str(i) in self.crossings:
                crossed = self.crossings[str(i)](streams, need_weights=need_weights)
                streams = crossed.streams
                weights |= {f"{i}:{what}": found for what, found in crossed.weights.items()}
        norms = {name: self.towers.get_submodule(f"{name}.norm") for name in self.names}
        done = {name: _replaced(stream, norms[name](stream.tokens)) for name, stream in streams.items()}
        return Crossed(done, weights)

    def forward(self, inputs: Inputs, *, need_weights: bool = False) -> Fused:
        """Encode with exchanges, then merge."""
        streams, weights = self.encode(inputs, need_weights=need_weights)
        fused = self.merge(streams, need_weights=need_weights)
        return Fused(values=fused.values, present=fused.present, real=fused.real, weights={**weights, **fused.weights})


def _replaced(stream: Stream, tokens: torch.Tensor) -> Stream:
    return Stream(tokens=tokens, real=stream.real, present=stream.present)
