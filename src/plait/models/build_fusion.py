"""Specs to fusions of modalities whose widths the towers before them have."""

from collections.abc import Callable, Mapping, Sequence
from functools import partial

import torch
from torch import Tensor, nn

from plait.core.errors import ConfigError
from plait.models import fusion_specs as specs
from plait.models.fusion.attention import AttentionFusion
from plait.models.fusion.bilinear import BilinearFusion, FactorizedBilinear, LowRankBilinear, LowRankTensor
from plait.models.fusion.compact import CompactBilinear
from plait.models.fusion.concat import ConcatFusion
from plait.models.fusion.crossmodal import CrossModalAttention, CrossModalFusion
from plait.models.fusion.decision import (
    Classifier,
    DecisionFusion,
    Rule,
    Stacking,
    WeightedAverage,
    average,
    product,
    vote,
)
from plait.models.fusion.early import EarlyFusion
from plait.models.fusion.encode import Pool, TokenTower, Tokenwise
from plait.models.fusion.gated import GatedFusion
from plait.models.fusion.graph import GraphAttention, GraphConvolution, GraphFusion, full, nearest
from plait.models.fusion.hierarchical import HierarchicalFusion, Level, Windows
from plait.models.fusion.intermediate import Broadcast, CrossReading, IntermediateFusion
from plait.models.fusion.late import LateFusion
from plait.models.fusion.search import SearchedFusion
from plait.models.fusion.streams import Fusion
from plait.models.fusion.temporal import TemporalFusion
from plait.models.specs import Part
from plait.models.transformer import Transformer, TransformerSizes

Widths = Mapping[str, int]
"""Modality → width of its tokens, in the order in which modalities are fused."""


def build_fusion(spec: Part, widths: Widths) -> Fusion:
    """A fusion, its weights drawn from torch's generator.

    Args:
        spec: One of :data:`plait.models.fusion_specs.Fusion`.
        widths: Of the modalities.

    Raises:
        ConfigError: The spec is of no fusion, names a modality that is not there, or takes another number of them.

    Example:
        >>> fuse = build_fusion(specs.Gated(d_out=16), {"image": 8, "text": 4})
        >>> type(fuse).__name__, fuse.d_out
        ('GatedFusion', 16)
    """
    made = _vector_fusion(spec, widths) or _token_fusion(spec, widths) or _composed(spec, widths)
    if made is None:
        raise ConfigError(f"{type(spec).__name__} is no fusion", remedy="see `plait list fusions`")
    return made


def _vector_fusion(spec: Part, widths: Widths) -> Fusion | None:
    """Fusions of one vector a modality."""
    match spec:
        case specs.Concat():
            return _concat(spec, widths)
        case specs.Decision():
            return _decision(spec, widths)
        case specs.ModalityAttention():
            return AttentionFusion(widths, spec.d_out, heads=spec.heads, dropout=spec.dropout)
        case specs.Gated():
            return GatedFusion(widths, spec.d_out, tied=spec.tied, sees=spec.sees, bias=spec.bias)
        case specs.Bilinear():
            return BilinearFusion(widths, spec.d_out, one=spec.one)
        case specs.Mlb():
            return LowRankBilinear(widths, spec.d_out, rank=spec.rank, activation=spec.activation)
        case specs.Mfb():
            shape = {name: getattr(spec, name) for name in ("k", "dropout", "normalize", "bias")}
            return FactorizedBilinear(widths, spec.d_out, **shape)
        case specs.Mcb():
            drawn = torch.Generator().manual_seed(spec.seed)
            return CompactBilinear(widths, spec.d_out, size=spec.size, generator=drawn, one=spec.one)
        case specs.Lmf():
            return LowRankTensor(widths, spec.d_out, rank=spec.rank)
        case _:
            return None


def _token_fusion(spec: Part, widths: Widths) -> Fusion | None:
    """Fusions of whole sequences."""
    match spec:
        case specs.Early():
            _known([*spec.sees, *(name for seen in spec.sees.values() for name in seen)], widths, place="sees")
            joint = Transformer(TransformerSizes(d=spec.d, depth=spec.depth, heads=spec.heads, dropout=spec.dropout))
            return EarlyFusion(_projections(widths, spec.d), joint, sees=spec.sees or None)
        case specs.CrossModal():
            return _crossmodal(spec, widths)
        case specs.Graph():
            return _graph(spec, widths)
        case specs.Temporal():
            return TemporalFusion(widths, spec.d_out, d_memory=spec.d_memory)
        case specs.Hierarchical():
            units: dict[str, Callable[[], nn.Module]] = {
                "word": nn.Identity,
                "phrase": partial(Windows, spec.window),
                "sentence": Pool,
            }
            levels = {name: Level(units[name](), units[name](), d=spec.d, heads=spec.heads) for name in spec.levels}
            return HierarchicalFusion(_projections(widths, spec.d), d=spec.d, d_out=spec.d_out, levels=levels)
        case _:
            return None


def _composed(spec: Part, widths: Widths) -> Fusion | None:
    """Fusions made of others."""
    match spec:
        case specs.Late():
            inner = build_fusion(spec.fusion, dict.fromkeys(widths, spec.d))
            head = nn.Linear(inner.d_out, spec.d_out) if spec.d_out else None
            return LateFusion(_encoders(spec, widths), inner, head=head, d_out=spec.d_out)
        case specs.Intermediate():
            return _intermediate(spec, widths)
        case specs.Searched():
            return SearchedFusion({name: build_fusion(part, widths) for name, part in spec.candidates.items()})
        case _:
            return None


def _concat(spec: specs.Concat, widths: Widths) -> Fusion:
    _known(spec.tokens, widths, place="tokens")
    flat = {name: width * spec.tokens.get(name, 1) for name, width in widths.items()}
    fusion = ConcatFusion(flat, d_out=spec.d_out, normalize=spec.normalize, flags=spec.flags)
    if len(spec.tokens) == len(widths):
        return fusion
    return LateFusion({name: Tokenwise(nn.Identity()) if name in spec.tokens else Pool() for name in widths}, fusion)


def _decision(spec: specs.Decision, widths: Widths) -> Fusion:
    classifiers = {name: Classifier(Pool(), _head(width, spec)) for name, width in widths.items()}
    return DecisionFusion(classifiers, spec.classes, rule=_rule(spec, list(widths)))


def _head(width: int, spec: specs.Decision) -> nn.Module:
    if not spec.d_hidden:
        return nn.Linear(width, spec.classes)
    return nn.Sequential(nn.Linear(width, spec.d_hidden), nn.GELU(), nn.Linear(spec.d_hidden, spec.classes))


def _rule(spec: specs.Decision, names: Sequence[str]) -> Rule:
    pure = {"average": average, "product": product, "vote": vote}.get(spec.rule)
    if spec.weights and (pure is None or sorted(spec.weights) != sorted(names)):
        raise ConfigError(
            f"weights of {', '.join(spec.weights)} for the rule {spec.rule} over {', '.join(names)}",
            place="weights",
            remedy="give one weight for every modality, or none; rules that learn have their own",
        )
    if spec.prior and (spec.rule != "product" or len(spec.prior) != spec.classes):
        raise ConfigError(
            f"{len(spec.prior)} prior probabilities for {spec.classes} classes and the rule {spec.rule}",
            place="prior",
            remedy="give one for each class, with rule: product",
        )
    if pure is None:
        return WeightedAverage(len(names)) if spec.rule == "weighted" else Stacking(len(names), spec.classes)
    bound: dict[str, Tensor] = {}
    if spec.weights:
        bound["weights"] = torch.tensor([spec.weights[name] for name in names], device="cpu")
    if spec.prior:
        bound["prior"] = torch.tensor(spec.prior, device="cpu")
    return partial(pure, **bound) if bound else pure


def _crossmodal(spec: specs.CrossModal, widths: Widths) -> Fusion:
    _known([spec.target], widths, place="target")
    shape = {name: getattr(spec, name) for name in ("heads", "d_k", "d_v", "norm_place", "gated", "dropout")}
    readers = {
        name: CrossModalAttention(widths[spec.target], width, **shape)
        for name, width in widths.items()
        if name != spec.target
    }
    return CrossModalFusion(spec.target, readers, level=spec.level, source_level=spec.source_level)


def _graph(spec: specs.Graph, widths: Widths) -> Fusion:
    layers: list[GraphConvolution | GraphAttention] = []
    for i in range(spec.depth):
        d_out = spec.d_out if i == spec.depth - 1 else spec.d
        layers.append(
            GraphAttention(spec.d, d_out, heads=spec.heads) if spec.layer == "gat" else GraphConvolution(spec.d, d_out)
        )
    build = partial(nearest, k=spec.neighbors) if spec.neighbors else full
    return GraphFusion(_projections(widths, spec.d), layers, build=build, sparse=spec.sparse)


def _intermediate(spec: specs.Intermediate, widths: Widths) -> Fusion:
    """Projections to one width, then towers that exchange."""
    wide = dict.fromkeys(widths, spec.d)
    _known([*spec.reads, *(name for read in spec.reads.values() for name in read)], widths, place="reads")
    reads = spec.reads or {name: tuple(other for other in widths if other != name) for name in widths}

    def exchange() -> nn.Module:
        if spec.exchange == "broadcast":
            return Broadcast(build_fusion(spec.through, wide), wide)
        readers = {
            target: {
                source: CrossModalAttention(spec.d, spec.d, heads=spec.heads, gated=True) for source in reads[target]
            }
            for target in reads
        }
        return CrossReading(readers)

    sizes = TransformerSizes(d=spec.d, depth=spec.depth, heads=spec.heads)
    inner = IntermediateFusion(
        {name: Transformer(sizes) for name in widths},
        {at: exchange() for at in spec.after},
        build_fusion(spec.merge, wide),
    )
    return LateFusion({name: Tokenwise(layer) for name, layer in _projections(widths, spec.d).items()}, inner)


def _encoders(spec: specs.Late, widths: Widths) -> dict[str, nn.Module]:
    projections = _projections(widths, spec.d)
    if not spec.depth:
        return {name: Tokenwise(layer) for name, layer in projections.items()}
    sizes = TransformerSizes(d=spec.d, depth=spec.depth, heads=spec.heads)
    return {name: TokenTower(Transformer(sizes), project=layer) for name, layer in projections.items()}


def _projections(widths: Widths, d: int) -> dict[str, nn.Module]:
    return {name: nn.Linear(width, d) for name, width in widths.items()}


def _known(named: Mapping[str, object] | Sequence[str], widths: Widths, *, place: str) -> None:
    strange = sorted({name for name in named if name not in widths})
    if strange:
        raise ConfigError(
            f"{place} names {', '.join(strange)}; the modalities are {', '.join(widths)}",
            place=place,
            remedy="name modalities that are fused",
        )
