"""Every arm by name, as wide as a number of weights allows: encoders, a fusion, and a head over the answers."""

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from typing import NamedTuple

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from plait.core.errors import ConfigError
from plait.models.fusion.bilinear import LowRankBilinear
from plait.models.fusion.concat import ConcatFusion
from plait.models.fusion.crossmodal import CrossModalAttention, CrossModalFusion
from plait.models.fusion.early import EarlyFusion
from plait.models.fusion.encode import Pool, TokenTower, Tokenwise
from plait.models.fusion.gated import GatedFusion
from plait.models.fusion.graph import GraphAttention, GraphFusion
from plait.models.fusion.late import LateFusion
from plait.models.fusion.streams import Fused, Fusion, Inputs, Stream
from plait.models.transformer import FeedForward, Part, Transformer, TransformerSizes
from plait.studies.attending.scenes import LENGTH, REGIONS, WORDS
from plait.studies.attention import ArmName, Scenes

HEADS, TOWER_DEPTH, JOINT_DEPTH, GRAPH_DEPTH = 2, 2, 2, 1

CROSS: tuple[ArmName, ...] = ("cross-1", "cross-2", "cross-gated")
GRAPHS: tuple[ArmName, ...] = ("graph-true", "graph-random", "graph-full")
ATTENTION: tuple[ArmName, ...] = ("cross-1", "cross-2", "joint")
OTHERS: tuple[ArmName, ...] = ("early", "late", "late-tower", "gated", "low-rank")
TOKENS: tuple[ArmName, ...] = (*CROSS, "joint", *GRAPHS)


class Size(NamedTuple):
    """Free sizes: width of all but the head's inside, and that."""

    width: int
    inside: int


class Shape(NamedTuple):
    """Width of words and of regions, number of words, and of answers."""

    words: int
    regions: int
    length: int
    answers: int


class Answered(NamedTuple):
    """Scores of the answers, and a map over the regions for each layer that has one."""

    scores: Float[Tensor, "b c"]
    maps: list[Float[Tensor, "b n"]]


class Reading(nn.Module):
    """Layers of cross-modal attention, each with a feed-forward network after it: the question reads the regions.

    Args:
        d: Width of both.
        depth: Layers.
        gated: Whether what is read passes a gate that is 0 at the start.
    """

    def __init__(self, d: int, *, depth: int, gated: bool) -> None:
        super().__init__()
        self.d_out = d
        sizes = TransformerSizes(d=d, depth=1, heads=HEADS)
        self.readers = nn.ModuleList(
            CrossModalFusion(WORDS, {REGIONS: CrossModalAttention(d, d, heads=HEADS, gated=gated)})
            for _ in range(depth)
        )
        self.parts = nn.ModuleList(Part(sizes, drop_path=0.0) for _ in range(depth))
        self.inner = nn.ModuleList(FeedForward(d, d) for _ in range(depth))

    def forward(self, inputs: Inputs, *, need_weights: bool = False) -> Fused:
        """Read; weights by number of the layer."""
        asking, weights = inputs[WORDS], dict[str, Tensor]()
        for i, (reader, part, inner) in enumerate(zip(self.readers, self.parts, self.inner, strict=True)):
            found = reader({WORDS: asking, REGIONS: inputs[REGIONS]}, need_weights=need_weights)
            asking = Stream(tokens=part(found.values, inner), present=found.present)
            if need_weights:
                weights[f"{i}"] = found.weights[REGIONS]
        return Fused(values=asking.tokens, present=asking.here, weights=weights)


class GraphReading(nn.Module):
    """Regions hear each other along a graph, which is added to what they are; then the question reads them.

    Args:
        d: Width of all.
    """

    def __init__(self, d: int) -> None:
        super().__init__()
        self.d_out = d
        layers = [GraphAttention(d, d, heads=HEADS) for _ in range(GRAPH_DEPTH)]
        self.hearing = GraphFusion({REGIONS: nn.Linear(d, d)}, layers)
        self.reading = Reading(d, depth=1, gated=False)

    def forward(
        self, inputs: Inputs, *, need_weights: bool = False, graph: Bool[Tensor, "b n n"] | None = None
    ) -> Fused:
        """Hear and read; None: all regions hear all."""
        regions = inputs[REGIONS]
        heard = self.hearing({REGIONS: regions}, graph=graph)
        told = Stream(tokens=regions.tokens + heard.values, real=regions.real, present=regions.present)
        return self.reading({WORDS: inputs[WORDS], REGIONS: told}, need_weights=need_weights)


class Student(nn.Module):
    """An arm with its head.

    Args:
        fusion: Of words and regions; a vector, or tokens of which the first, the words, are read side by side.
        head: From that to scores.
    """

    def __init__(self, fusion: Fusion, head: nn.Module) -> None:
        super().__init__()
        self.fusion, self.head = fusion, head

    def forward(
        self, inputs: Inputs, *, graph: Bool[Tensor, "b n n"] | None = None, need_weights: bool = False
    ) -> Answered:
        """Answer.

        Args:
            inputs: Words and regions.
            graph: Which region hears which, for arms that are graphs; None: all hear all.
            need_weights: Give maps too, where the arm has any.
        """
        if isinstance(self.fusion, LateFusion) and isinstance(self.fusion.fusion, GraphReading):
            fused = self.fusion.fusion(self.fusion.encode(inputs), graph=graph, need_weights=need_weights)
        else:
            fused = self.fusion(inputs, need_weights=need_weights)
        values, words = fused.values, inputs[WORDS].tokens.shape[1]
        values = values[:, :words].flatten(1) if values.ndim == 3 else values
        return Answered(self.head(values), _maps(fused, words) if need_weights else [])


def _maps(fused: Fused, words: int) -> list[Tensor]:
    """Mean over heads, and over words where several look; what words pay to each other is left out."""
    if "attention" in fused.weights:
        looks = fused.weights["attention"][..., :words, words:].mean((2, 3))
        return [look / look.sum(-1, keepdim=True).clamp(min=1e-9) for look in looks.unbind(1)]
    return [weights.mean((1, 2)) for name, weights in fused.weights.items() if name.isdigit()]


def student(name: ArmName, shape: Shape, size: Size) -> Student:
    """An arm, weights drawn from torch's generator.

    Args:
        name: Which.
        shape: What goes in and out.
        size: Its width, and that inside the head.
    """
    k, inside = size
    widths = {WORDS: shape.words, REGIONS: shape.regions}
    fusion = _fusion(name, widths, k)
    tokens = shape.length if name in TOKENS else 1
    head = nn.Sequential(nn.Linear(tokens * fusion.d_out, inside), nn.GELU(), nn.Linear(inside, shape.answers))
    return Student(fusion, head)


def _fusion(name: ArmName, widths: Mapping[str, int], k: int) -> Fusion:
    linear = {modality: nn.Linear(width, k) for modality, width in widths.items()}
    layers = {m: nn.Sequential(nn.Linear(w, k), nn.GELU(), nn.Linear(k, k), nn.LayerNorm(k)) for m, w in widths.items()}
    each = {modality: Tokenwise(layer) for modality, layer in layers.items()}
    same = dict.fromkeys(widths, k)
    pooled = {modality: nn.Sequential(encoder, Pool()) for modality, encoder in each.items()}
    match name:
        case "early":
            hidden = nn.Sequential(nn.GELU(), nn.Linear(k, k))
            means = {modality: Pool() for modality in widths}
            return LateFusion(means, ConcatFusion(widths, d_out=k), head=hidden, d_out=k)
        case "late":
            return LateFusion(pooled, ConcatFusion(same, d_out=k))
        case "late-tower":
            sizes = TransformerSizes(d=k, depth=TOWER_DEPTH, heads=HEADS, d_ff=k)
            towers = {m: nn.Sequential(TokenTower(Transformer(sizes), project=linear[m]), Pool()) for m in widths}
            return LateFusion(towers, ConcatFusion(same, d_out=k))
        case "gated":
            return LateFusion(pooled, GatedFusion(same, k))
        case "low-rank":
            return LateFusion(pooled, LowRankBilinear(same, k, rank=k))
        case "cross-1" | "cross-2" | "cross-gated":
            reading = Reading(k, depth=2 if name == "cross-2" else 1, gated=name == "cross-gated")
            return LateFusion(each, reading)
        case "joint":
            sizes = TransformerSizes(d=k, depth=JOINT_DEPTH, heads=HEADS, d_ff=k)
            return EarlyFusion(linear, Transformer(sizes))
        case "graph-true" | "graph-random" | "graph-full":
            return LateFusion(each, GraphReading(k))


@cache
def size_for(name: ArmName, shape: Shape, weights: int) -> Size:
    """The largest width with at most so many weights, head and all, and then the widest head.

    Raises:
        ConfigError: The smallest has more.
    """
    least = count(name, shape, Size(HEADS, 1))
    if least > weights:
        raise ConfigError(
            f"{name} has {least} weights at least, {weights} are allowed",
            place="weights",
            remedy=f"allow {least} or more",
        )
    width = HEADS
    while count(name, shape, Size(width + HEADS, width + HEADS)) <= weights:
        width += HEADS
    each = count(name, shape, Size(width, 2)) - count(name, shape, Size(width, 1))
    inside = 1 + (weights - count(name, shape, Size(width, 1))) // each
    return Size(width, inside)


def count(name: ArmName, shape: Shape, size: Size) -> int:
    """Weights of an arm."""
    with torch.device("meta"):
        return sum(weight.numel() for weight in student(name, shape, size).parameters())


def shape_of(scenes: Scenes) -> Shape:
    """What goes in and out."""
    return Shape(scenes.d_word, scenes.d_region, LENGTH, scenes.colours + scenes.marks + 2)


@dataclass(frozen=True, slots=True, kw_only=True)
class Cost:
    """What an arm costs, encoders and head and all.

    Attributes:
        arm: Its name.
        words: How many there are.
        regions: Likewise.
        width: Of the arm.
        weights: Numbers that learn.
        flops: Of one sample forward: two for each multiply-add of products of matrices, all that is counted.
    """

    arm: ArmName
    words: int
    regions: int
    width: int
    weights: int
    flops: int


def cost(name: ArmName, shape: Shape, size: Size, *, regions: int) -> Cost:
    """Count on torch's meta device: no weight is drawn and no product computed.

    A graph is counted as a matrix, so that its edges do not change what it costs here.
    """
    with torch.device("meta"):
        model = student(name, shape, size)
        inputs = {
            WORDS: Stream(tokens=torch.zeros(1, shape.length, shape.words)),
            REGIONS: Stream(tokens=torch.zeros(1, regions, shape.regions)),
        }
    with FlopCounterMode(display=False) as counter:
        model(inputs, need_weights=True)
    weights = sum(weight.numel() for weight in model.parameters())
    return Cost(
        arm=name,
        words=shape.length,
        regions=regions,
        width=size.width,
        weights=weights,
        flops=counter.get_total_flops(),
    )
