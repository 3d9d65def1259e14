"""Every way to fuse stands at every level: features, inside towers, decisions."""

from collections.abc import Callable, Mapping
from typing import Literal

import pytest
import torch
from torch import nn

from plait.models.fusion.attention import AttentionFusion
from plait.models.fusion.bilinear import BilinearFusion, FactorizedBilinear, LowRankBilinear, LowRankTensor
from plait.models.fusion.compact import CompactBilinear
from plait.models.fusion.concat import ConcatFusion
from plait.models.fusion.crossmodal import CrossModalAttention, CrossModalFusion
from plait.models.fusion.decision import Classifier, DecisionFusion, Stacking
from plait.models.fusion.early import EarlyFusion
from plait.models.fusion.encode import Pool, TokenTower, Tokenwise
from plait.models.fusion.gated import GatedFusion
from plait.models.fusion.graph import GraphAttention, GraphFusion
from plait.models.fusion.hierarchical import HierarchicalFusion
from plait.models.fusion.intermediate import Broadcast, IntermediateFusion
from plait.models.fusion.late import LateFusion
from plait.models.fusion.streams import Fusion, Stream
from plait.models.fusion.temporal import TemporalFusion
from plait.models.transformer import Transformer, TransformerSizes

RAW = {"image": 5, "text": 4}
CLASSES = 3


def linears(widths: Mapping[str, int]) -> dict[str, nn.Module]:
    return {name: nn.Linear(width, 8) for name, width in widths.items()}


def tower(depth: int = 1) -> Transformer:
    return Transformer(TransformerSizes(d=8, depth=depth, heads=2))


FUSIONS: dict[str, Callable[[Mapping[str, int]], Fusion]] = {
    "concat": lambda widths: ConcatFusion(widths, d_out=6),
    "attention": lambda widths: AttentionFusion(widths, 6),
    "gated": lambda widths: GatedFusion(widths, 6),
    "bilinear": lambda widths: BilinearFusion(widths, 6),
    "mlb": lambda widths: LowRankBilinear(widths, 6, rank=4),
    "mfb": lambda widths: FactorizedBilinear(widths, 6, k=2),
    "mcb": lambda widths: CompactBilinear(widths, 6, size=32, generator=torch.Generator().manual_seed(0)),
    "lmf": lambda widths: LowRankTensor(widths, 6, rank=2),
    "graph": lambda widths: GraphFusion(linears(widths), [GraphAttention(8, 6)]),
    "temporal": lambda widths: TemporalFusion(widths, 6),
    "early": lambda widths: EarlyFusion(linears(widths), tower()),
    "hierarchical": lambda widths: HierarchicalFusion(linears(widths), d=8, d_out=6),
    "cross-modal": lambda widths: CrossModalFusion(
        "text", {"image": CrossModalAttention(widths["text"], widths["image"], heads=1)}
    ),
}
Level = Literal["feature", "late", "intermediate", "decision"]


def pooled(fusion: Fusion) -> LateFusion:
    """A fusion of means, wherever it stands."""
    return LateFusion({"image": Pool(), "text": Pool()}, fusion)


def at(level: Level, build: Callable[[Mapping[str, int]], Fusion]) -> Fusion:
    wide = dict.fromkeys(RAW, 8)
    projections = {name: Tokenwise(layer) for name, layer in linears(RAW).items()}
    match level:
        case "feature":
            fusion = pooled(build(wide))
            joint = nn.Sequential(nn.Linear(fusion.d_out, 8), nn.GELU(), nn.Linear(8, CLASSES))
            return LateFusion(projections, fusion, head=joint, d_out=CLASSES)
        case "late":
            towers = {name: TokenTower(tower(2), project=layer) for name, layer in linears(RAW).items()}
            fusion = pooled(build(wide))
            return LateFusion(towers, fusion, head=nn.Linear(fusion.d_out, CLASSES), d_out=CLASSES)
        case "intermediate":
            exchange = Broadcast(pooled(build(wide)), wide)
            for layer in exchange.back.children():
                nn.init.normal_(layer.weight)
            decide = {name: Classifier(Pool(), nn.Linear(8, CLASSES)) for name in RAW}
            inside = IntermediateFusion(
                {name: tower(2) for name in RAW},
                {0: exchange},
                DecisionFusion(decide, CLASSES, rule=Stacking(2, CLASSES)),
            )
            return LateFusion(projections, inside)
        case "decision":
            decide = {name: nn.Sequential(Tokenwise(nn.Linear(width, CLASSES)), Pool()) for name, width in RAW.items()}
            return LateFusion(decide, build(dict.fromkeys(RAW, CLASSES)))


@pytest.mark.row("S3-16", "S3-17", "S3-18")
@pytest.mark.parametrize("level", ["feature", "late", "intermediate", "decision"])
@pytest.mark.parametrize("name", FUSIONS)
def test_any_fusion_at_any_level(name: str, level: Level) -> None:
    torch.manual_seed(0)
    fuse = at(level, FUSIONS[name])
    inputs = {n: Stream(tokens=torch.randn(2, 4, w, requires_grad=True)) for n, w in RAW.items()}
    found = fuse(inputs).vector()
    assert found.shape == (2, fuse.d_out)
    found.square().sum().backward()
    for stream in inputs.values():
        assert stream.tokens.grad is not None
        assert bool((stream.tokens.grad != 0).any())
    lost = {**inputs, "image": Stream(tokens=torch.full((2, 4, 5), torch.nan), present=torch.tensor([False, False]))}
    assert fuse(lost).values.isfinite().all()
