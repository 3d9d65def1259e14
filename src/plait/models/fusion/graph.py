"""Graph fusion: tokens of all modalities are nodes; who hears whom is a graph.

GCN: Kipf and Welling, https://arxiv.org/abs/1609.02907. GAT: Velickovic et al., https://arxiv.org/abs/1710.10903.
Layers take the graph as a matrix, or as a list of edges; both give the same values.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import NamedTuple

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn
from torch.nn import functional

from plait.core.errors import ConfigError, DataError
from plait.models.fusion.encode import widths_of
from plait.models.fusion.streams import Fused, Inputs, at_least, take

Hears = Bool[Tensor, "b n n"]
"""``[sample, i, j]``: node i hears node j."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Edges:
    """A graph as a list, over the nodes of all samples one after the other.

    Attributes:
        to: Node that hears, ``sample * n + i``.
        source: Node that is heard.
    """

    to: Int[Tensor, " e"]
    source: Int[Tensor, " e"]


class Heard(NamedTuple):
    """Nodes after a layer, and how much each heard each other, where the graph was a matrix."""

    nodes: Tensor
    weights: Float[Tensor, "b h n n"] | None


def edges_of(hears: Hears) -> Edges:
    """The list of a matrix."""
    sample, to, source = hears.nonzero(as_tuple=True)
    n = hears.shape[1]
    return Edges(to=sample * n + to, source=sample * n + source)


# --- who hears whom --------------------------------------------------------------------------------------------------

Builder = Callable[[Tensor, Tensor], Tensor]
"""``(nodes: b n d, there: b n) -> b n n``."""


def full(nodes: Float[Tensor, "b n d"], there: Bool[Tensor, "b n"]) -> Hears:
    """All nodes that count hear each other."""
    return _between(there) & ~torch.eye(there.shape[1], dtype=torch.bool, device=there.device)


def nearest(nodes: Float[Tensor, "b n d"], there: Bool[Tensor, "b n"], *, k: int) -> Hears:
    """Each hears the k whose cosine with it is largest, and those for which it is among the k."""
    unit = functional.normalize(nodes.detach(), dim=-1)
    allowed = full(nodes, there)
    scores = (unit @ unit.mT).masked_fill(~allowed, float("-inf"))
    chosen = scores.topk(min(k, scores.shape[-1]), dim=-1).indices
    found = torch.zeros_like(allowed).scatter(2, chosen, True) & allowed
    return found | found.mT


def from_edges(edges: Sequence[Int[Tensor, "e 2"]], there: Bool[Tensor, "b n"], *, both_ways: bool = True) -> Hears:
    """A graph that is known, as from a parser, a detector or a scene graph.

    Args:
        edges: Of each sample: node that hears, node that is heard.
        there: Nodes that count; edges of others are left out.
        both_ways: Each edge is heard at both ends.

    Raises:
        DataError: Not one list a sample, or a node that is not there at all.
    """
    if len(edges) != len(there):
        raise DataError(f"{len(edges)} lists of edges for {len(there)} samples", remedy="give one list a sample")
    found = torch.zeros(*there.shape, there.shape[1], dtype=torch.bool, device=there.device)
    for sample, listed in enumerate(edges):
        if len(listed) and not 0 <= int(listed.min()) <= int(listed.max()) < there.shape[1]:
            raise DataError(
                f"an edge names node {int(listed.max())} or {int(listed.min())}, the nodes are 0 to "
                f"{there.shape[1] - 1}",
                place=f"sample {sample}",
                remedy="number nodes as they stand in the joined sequence",
            )
        found[sample, listed[:, 0], listed[:, 1]] = True
    found = found | found.mT if both_ways else found
    return found & _between(there)


def _between(there: Tensor) -> Tensor:
    return there[:, :, None] & there[:, None, :]


# --- layers ----------------------------------------------------------------------------------------------------------


class GraphConvolution(nn.Module):
    """``D^-1/2 (A + I) D^-1/2 X W + b``, D the row sums of ``A + I``; equation 2 of arXiv 1609.02907.

    Args:
        d: Width of the nodes.
        d_out: Width of the result.

    Example:
        >>> layer = GraphConvolution(1, 1)
        >>> _ = nn.init.ones_(layer.linear.weight), nn.init.zeros_(layer.bias)
        >>> pair = torch.tensor([[[False, True], [True, False]]])
        >>> layer(torch.tensor([[[2.0], [4.0]]]), pair).nodes.round(decimals=4).tolist()
        [[[3.0], [3.0]]]
    """

    def __init__(self, d: int, d_out: int) -> None:
        super().__init__()
        self.d, self.d_out = d, d_out
        self.linear = nn.Linear(d, d_out, bias=False)
        self.bias = nn.Parameter(torch.zeros(d_out))

    def forward(self, nodes: Float[Tensor, "b n d"], graph: Hears | Edges) -> Heard:
        """Hear."""
        x = self.linear(nodes)
        if isinstance(graph, Edges):
            flat, (to, source) = x.flatten(0, 1), _with_self(graph, x)
            degree = flat.new_zeros(len(flat)).index_add(0, to, flat.new_ones(len(to)))
            factor = (degree[to] * degree[source]).rsqrt()
            heard = torch.zeros_like(flat).index_add(0, to, flat[source] * factor[:, None])
            return Heard(heard.view_as(x) + self.bias, None)
        joined = (graph | _itself(graph)).to(x.dtype)
        scale = joined.sum(-1).rsqrt()
        weights = scale[:, :, None] * joined * scale[:, None, :]
        return Heard(weights @ x + self.bias, weights[:, None])


class GraphAttention(nn.Module):
    """``sum_j softmax_j(leaky_relu(a' [W x_i; W x_j])) W x_j + b`` over those i hears and itself; equations 1 to 6.

    Args:
        d: Width of the nodes.
        d_out: Width of the result.
        heads: Of attention; their results stand side by side, or are averaged.
        average: Average the heads, as in a last layer, instead of joining them.
        slope: Of the leaky ReLU below 0.

    Raises:
        ConfigError: Heads do not divide the width.
    """

    def __init__(self, d: int, d_out: int, *, heads: int = 1, average: bool = False, slope: float = 0.2) -> None:
        super().__init__()
        if not average and d_out % heads:
            raise ConfigError(
                f"{heads} heads do not divide a width of {d_out}", remedy="choose heads that do, or average"
            )
        self.d, self.d_out, self.heads, self.average, self.slope = d, d_out, heads, average, slope
        d_head = d_out if average else d_out // heads
        self.linear = nn.Linear(d, heads * d_head, bias=False)
        self.hearing, self.heard = (nn.Parameter(torch.empty(heads, d_head)) for _ in range(2))
        for weight in (self.linear.weight, self.hearing, self.heard):
            nn.init.xavier_uniform_(weight)
        self.bias = nn.Parameter(torch.zeros(d_out))

    def forward(self, nodes: Float[Tensor, "b n d"], graph: Hears | Edges) -> Heard:
        """Hear."""
        x = self.linear(nodes).unflatten(-1, (self.heads, -1))
        to_score, source_score = (x * self.hearing).sum(-1), (x * self.heard).sum(-1)  # b n h each
        if isinstance(graph, Edges):
            return Heard(self._merged(self._along(x, graph, to_score=to_score, source_score=source_score)), None)
        joined = (graph | _itself(graph))[:, None]
        scores = functional.leaky_relu(to_score.mT[..., :, None] + source_score.mT[..., None, :], self.slope)
        weights = scores.masked_fill(~joined, float("-inf")).softmax(-1)
        return Heard(self._merged(torch.einsum("bhij,bjhe->bihe", weights, x)), weights)

    def _along(self, x: Tensor, graph: Edges, *, to_score: Tensor, source_score: Tensor) -> Tensor:
        flat, (to, source) = x.flatten(0, 1), _with_self(graph, x)
        scores = to_score.flatten(0, 1)[to] + source_score.flatten(0, 1)[source]
        scores = functional.leaky_relu(scores, self.slope)
        where = to[:, None].expand_as(scores)
        low = scores.new_full((len(flat), self.heads), float("-inf"))
        peak = low.scatter_reduce(0, where, scores.detach(), "amax")
        raised = (scores - peak[to]).exp()
        total = torch.zeros_like(peak).index_add(0, to, raised)
        heard = torch.zeros_like(flat).index_add(0, to, flat[source] * (raised / total[to])[..., None])
        return heard.view_as(x)

    def _merged(self, heads: Tensor) -> Tensor:
        return (heads.mean(-2) if self.average else heads.flatten(-2)) + self.bias


def _itself(graph: Tensor) -> Tensor:
    return torch.eye(graph.shape[-1], dtype=torch.bool, device=graph.device)


def _with_self(graph: Edges, nodes: Tensor) -> tuple[Tensor, Tensor]:
    """Every node hears itself once, whether the list says so or not."""
    own = torch.arange(nodes.shape[0] * nodes.shape[1], device=nodes.device)
    others = graph.to != graph.source
    return torch.cat([graph.to[others], own]), torch.cat([graph.source[others], own])


# --- fusion ----------------------------------------------------------------------------------------------------------


class GraphFusion(nn.Module):
    """Projections and a vector for each modality make nodes; layers with ELU between them let them hear each other.

    Args:
        projections: Of each modality, from its width to the first layer's, token by token.
        layers: :class:`GraphConvolution`, :class:`GraphAttention`, or another module of their face.
        build: Who hears whom, where a call brings no graph: :func:`full`, or :func:`nearest` with its k bound.
        sparse: Pass the graph on as edges: less memory where it has few.

    Raises:
        ConfigError: Built for no modality, without layers, or their widths do not fit.

    Example:
        >>> layers = [GraphAttention(16, 16, heads=2), GraphConvolution(16, 8)]
        >>> fuse = GraphFusion({"image": nn.Linear(6, 16), "text": nn.Linear(4, 16)}, layers)
        >>> from plait.models.fusion.streams import Stream
        >>> fuse({"image": Stream(tokens=torch.rand(2, 9, 6)), "text": Stream(tokens=torch.rand(2, 5, 4))}).values.shape
        torch.Size([2, 14, 8])
    """

    def __init__(
        self,
        projections: Mapping[str, nn.Module],
        layers: Sequence[GraphConvolution | GraphAttention],
        *,
        build: Builder = full,
        sparse: bool = False,
    ) -> None:
        super().__init__()
        self.names = at_least(1, list(projections), kind="graph fusion")
        ends = [(a.d_out, b.d) for a, b in pairwise(layers) if a.d_out != b.d]
        if not layers or ends:
            raise ConfigError(
                f"{len(layers)} graph layers" + "".join(f"; one gives width {a}, the next takes {b}" for a, b in ends),
                place="layers",
                remedy="give at least one layer, each taking what the one before gives",
            )
        self.projections, self.layers = nn.ModuleDict(projections), nn.ModuleList(layers)
        self.kinds = nn.Embedding(len(self.names), layers[0].d)
        nn.init.normal_(self.kinds.weight, std=0.02)
        self.build, self.sparse, self.d_out = build, sparse, layers[-1].d_out

    def forward(self, inputs: Inputs, *, need_weights: bool = False, graph: Hears | None = None) -> Fused:
        """All nodes; ``weights["layer 0"]`` and so on are ``b h n n``, if asked for and not sparse.

        Args:
            inputs: Modalities.
            need_weights: Keep how much each heard each.
            graph: Who hears whom in this batch, over the joined tokens in the order of the projections.
        """
        streams = take(inputs, self.names, widths=widths_of(dict(self.projections.items())))
        x = torch.cat(
            [self.projections[name](s.tokens) + self.kinds.weight[i] for i, (name, s) in enumerate(streams.items())],
            dim=1,
        )
        there = torch.cat([stream.there for stream in streams.values()], dim=1)
        x = x.masked_fill(~there[..., None], 0.0)
        hears = (self.build(x, there) if graph is None else graph) & _between(there)
        passed = edges_of(hears) if self.sparse else hears
        weights: dict[str, Tensor] = {}
        for i, layer in enumerate(self.layers):
            x, found = layer(functional.elu(x) if i else x, passed)
            x = x.masked_fill(~there[..., None], 0.0)
            if need_weights and found is not None:
                weights[f"layer {i}"] = found
        return Fused(values=x, present=there.any(1), real=there, weights=weights)
