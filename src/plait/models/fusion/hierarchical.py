"""Hierarchical fusion: words with regions, phrases with objects, the sentence with the picture; a score at each level.

After Lu et al., hierarchical co-attention, https://arxiv.org/abs/1606.00061 (words, phrases, question). The score of a
level is FILIP's, https://arxiv.org/abs/2111.07783, section 3.1: mean over the units of one side of their best match on
the other, both ways.
"""

from collections.abc import Mapping
from typing import NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.nn import functional

from plait.core.errors import ConfigError
from plait.models.fusion.crossmodal import CrossModalAttention
from plait.models.fusion.encode import Pool, Tokenwise
from plait.models.fusion.streams import Fused, Inputs, Stream, take


class Pair(NamedTuple):
    """Units of both sides at one level, such as words and regions."""

    first: Stream
    second: Stream


class Windows(nn.Module):
    """Phrases where none are known: mean of every token that counts and its neighbors.

    Args:
        size: Tokens of a phrase; odd.

    Raises:
        ConfigError: An even size.
    """

    def __init__(self, size: int = 3) -> None:
        super().__init__()
        if size % 2 == 0:
            raise ConfigError(f"a window of {size} tokens has no middle", remedy="choose an odd size")
        self.size = size

    def forward(self, stream: Stream) -> Stream:
        """Average."""
        clean = stream.clean()
        there = clean.there[..., None].to(clean.tokens.dtype)
        both = torch.cat([clean.tokens, there], dim=2).mT
        sums = functional.avg_pool1d(both, self.size, stride=1, padding=self.size // 2).mT  # the divisor cancels
        means = sums[..., :-1] / sums[..., -1:].where(sums[..., -1:] > 0, 1.0)
        return Stream(tokens=means, real=clean.real, present=clean.present).clean()


def grouped(stream: Stream, groups: Int[Tensor, "b n"]) -> Stream:
    """Means of known groups: phrases of a parser, objects of a detector.

    Args:
        stream: Words or regions.
        groups: Number of each token's group, from 0; -1: in none.

    Example:
        >>> words = Stream(tokens=torch.tensor([[[1.0], [3.0], [7.0]]]))
        >>> grouped(words, torch.tensor([[1, 1, -1]])).tokens.flatten().tolist()
        [0.0, 2.0]
    """
    clean = stream.clean()
    count = max(int(groups.max()) + 1, 1) if groups.numel() else 1
    member = (groups[:, None, :] == torch.arange(count, device=groups.device)[:, None]) & clean.there[:, None, :]
    number = member.sum(-1, keepdim=True)
    means = member.to(clean.tokens.dtype) @ clean.tokens / number.clamp(min=1)
    return Stream(tokens=means, real=number[..., 0] > 0, present=stream.present)


class Level(nn.Module):
    """One level: how units are made of tokens, and the attention of both sides to each other.

    Args:
        first: Makes units of the first modality, stream to stream, at the shared width.
        second: Of the second.
        d: Shared width.
        heads: Of attention.
    """

    def __init__(self, first: nn.Module, second: nn.Module, *, d: int, heads: int) -> None:
        super().__init__()
        self.first, self.second, self.d = first, second, d
        self.first_reads, self.second_reads = (CrossModalAttention(d, d, heads=heads) for _ in range(2))


class HierarchicalFusion(nn.Module):
    """Both modalities in one space; at each level their units are matched and read each other; levels are joined.

    Scores of all pairs of samples (:meth:`scores`) are what a contrastive loss of each level takes.

    Args:
        projections: Of both modalities, token by token, to the levels' width.
        levels: By name, from fine to coarse; None: words and regions, windows of words and of regions, both whole.
        d: Width of the shared space.
        d_out: Width of the result.
        heads: Of the attention of the default levels.

    Raises:
        ConfigError: Not two modalities, no level, or a level of another width.

    Example:
        >>> fuse = HierarchicalFusion({"text": nn.Linear(8, 16), "image": nn.Linear(6, 16)}, d=16, d_out=4)
        >>> two = {"text": Stream(tokens=torch.rand(3, 5, 8)), "image": Stream(tokens=torch.rand(3, 9, 6))}
        >>> fuse(two).values.shape, {name: tuple(s.shape) for name, s in fuse.scores(fuse.pairs(two)).items()}
        (torch.Size([3, 4]), {'word': (3, 3), 'phrase': (3, 3), 'sentence': (3, 3)})
    """

    def __init__(
        self,
        projections: Mapping[str, nn.Module],
        *,
        d: int,
        d_out: int,
        levels: Mapping[str, Level] | None = None,
        heads: int = 1,
    ) -> None:
        super().__init__()
        if levels is None:
            levels = {
                "word": Level(nn.Identity(), nn.Identity(), d=d, heads=heads),
                "phrase": Level(Windows(), Windows(), d=d, heads=heads),
                "sentence": Level(Pool(), Pool(), d=d, heads=heads),
            }
        wrong = [f"{name} has width {level.d}" for name, level in levels.items() if level.d != d]
        if len(projections) != 2 or not levels or wrong:
            raise ConfigError(
                f"{len(projections)} modalities and {len(levels)} levels of width {d}"
                + "".join(f"; {w}" for w in wrong),
                remedy="give two modalities and levels of one width; fuse further modalities with the result",
            )
        self.names = tuple(projections)
        self.projections = nn.ModuleDict({name: Tokenwise(layer) for name, layer in projections.items()})
        self.levels, self.d_out = nn.ModuleDict(levels), d_out
        self.out = nn.Linear(2 * len(levels) * d, d_out)

    def pairs(self, inputs: Inputs) -> dict[str, Pair]:
        """Units of each level. A caller that knows phrases or objects may replace those (:func:`grouped`)."""
        streams = take(inputs, self.names)
        first, second = (self.projections[name](stream).clean() for name, stream in streams.items())
        return {name: Pair(level.first(first), level.second(second)) for name, level in self._levels().items()}

    def scores(self, pairs: Mapping[str, Pair]) -> dict[str, Float[Tensor, "b c"]]:
        """Score of every first with every second at each level, -1 to 1; minus infinity where one is absent."""
        return {name: all_pairs(pair) for name, pair in pairs.items()}

    def fuse(self, pairs: Mapping[str, Pair], *, need_weights: bool = False) -> Fused:
        """Fuse units; weights ``<level> score`` are ``b``, ``<level> first`` and ``second`` the attention of both."""
        parts: list[Tensor] = []
        weights: dict[str, Tensor] = {}
        for name, level in self._levels().items():
            first, second = pairs[name]
            own = level.first_reads(first, second, need_weights=need_weights)
            other = level.second_reads(second, first, need_weights=need_weights)
            for stream, found in ((first, own), (second, other)):
                parts.append(Stream(tokens=found.values, real=stream.real, present=stream.present).mean())
            weights[f"{name} score"] = own_pairs(pairs[name])
            if need_weights:
                weights |= {f"{name} first": own.weights, f"{name} second": other.weights}
        here = torch.stack([pair.first.here | pair.second.here for pair in pairs.values()]).any(0)
        return Fused(values=self.out(torch.cat(parts, dim=1)), present=here, weights=weights)

    def forward(self, inputs: Inputs, *, need_weights: bool = False) -> Fused:
        """Units, then their fusion."""
        return self.fuse(self.pairs(inputs), need_weights=need_weights)

    def _levels(self) -> dict[str, Level]:
        return {name: level for name, level in self.levels.items() if isinstance(level, Level)}


def all_pairs(pair: Pair) -> Float[Tensor, "b c"]:
    """Score of every first with every second."""
    a, b = pair.first.clean(), pair.second.clean()
    cosine = torch.einsum(
        "bnd,crd->bcnr", functional.normalize(a.tokens, dim=-1), functional.normalize(b.tokens, dim=-1)
    )
    known = a.there[:, None, :, None] & b.there[None, :, None, :]
    return _matched(cosine, known)


def own_pairs(pair: Pair) -> Float[Tensor, " b"]:
    """Score of each first with its own second."""
    a, b = pair.first.clean(), pair.second.clean()
    cosine = functional.normalize(a.tokens, dim=-1) @ functional.normalize(b.tokens, dim=-1).mT
    return _matched(cosine, a.there[:, :, None] & b.there[:, None, :])


def _matched(cosine: Float[Tensor, "*b n r"], known: Tensor) -> Float[Tensor, "*b"]:
    """Mean of best matches, both ways, over what is known."""
    possible = known.flatten(-2).any(-1)
    if not cosine.shape[-1] or not cosine.shape[-2]:
        return cosine.new_full(possible.shape, float("-inf"))
    best = cosine.masked_fill(~known, -2.0)
    total = torch.zeros((), dtype=cosine.dtype, device=cosine.device)
    for dim in (-1, -2):
        counts = known.any(dim)
        total = total + best.amax(dim).masked_fill(~counts, 0.0).sum(-1) / counts.sum(-1).clamp(min=1)
    return (total / 2).masked_fill(~possible, float("-inf"))
