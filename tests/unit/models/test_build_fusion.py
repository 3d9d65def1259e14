"""Every fusion of the list: its settings make the module they say, which fuses and learns, or they are refused."""

from typing import Any, get_args

import pytest
import torch
from pydantic import TypeAdapter, ValidationError
from torch import nn

from plait.core.errors import ConfigError
from plait.models import fusion_specs as specs
from plait.models.build_fusion import build_fusion
from plait.models.fusion.attention import AttentionFusion
from plait.models.fusion.bilinear import BilinearFusion, FactorizedBilinear, LowRankBilinear, LowRankTensor
from plait.models.fusion.compact import CompactBilinear
from plait.models.fusion.concat import ConcatFusion
from plait.models.fusion.crossmodal import CrossModalFusion
from plait.models.fusion.decision import DecisionFusion, Stacking, WeightedAverage, product
from plait.models.fusion.early import EarlyFusion
from plait.models.fusion.gated import GatedFusion
from plait.models.fusion.graph import GraphConvolution, GraphFusion
from plait.models.fusion.hierarchical import HierarchicalFusion
from plait.models.fusion.intermediate import Broadcast, CrossReading, IntermediateFusion
from plait.models.fusion.late import LateFusion
from plait.models.fusion.search import SearchedFusion
from plait.models.fusion.streams import Fusion, Inputs, Stream, only
from plait.models.fusion.temporal import TemporalFusion
from plait.models.specs import Part, ViT

TWO = {"image": 6, "text": 4}
FUSIONS = get_args(get_args(specs.Fusion)[0])
SMALL: dict[str, dict[str, Any]] = {
    "concat": {"d_out": 8},
    "early": {"d": 8, "depth": 1, "heads": 2},
    "late": {"d": 8, "depth": 1, "heads": 2, "fusion": {"kind": "lmf", "d_out": 6}, "d_out": 3},
    "decision": {"classes": 3, "d_hidden": 5},
    "intermediate": {
        "d": 8,
        "depth": 2,
        "heads": 2,
        "after": [0, 1],
        "merge": {"kind": "attention", "d_out": 8, "heads": 2},
    },
    "cross-modal": {"heads": 2},
    "attention": {"d_out": 8, "heads": 2},
    "gated": {"d_out": 8},
    "bilinear": {"d_out": 8},
    "mlb": {"d_out": 8, "rank": 5},
    "mfb": {"d_out": 8, "k": 2},
    "mcb": {"d_out": 8, "size": 32},
    "lmf": {"d_out": 8, "rank": 2},
    "graph": {"d": 8, "d_out": 8, "heads": 2, "neighbors": 2},
    "temporal": {"d_out": 8, "d_memory": 4},
    "hierarchical": {"d": 8, "d_out": 8, "heads": 2},
    "searched": {"candidates": {"a": {"kind": "gated", "d_out": 8}, "b": {"kind": "late", "d": 8, "d_out": 8}}},
}
MODULES: dict[str, type[nn.Module]] = {
    "concat": ConcatFusion,
    "early": EarlyFusion,
    "late": LateFusion,
    "decision": DecisionFusion,
    "intermediate": IntermediateFusion,
    "cross-modal": CrossModalFusion,
    "attention": AttentionFusion,
    "gated": GatedFusion,
    "bilinear": BilinearFusion,
    "mlb": LowRankBilinear,
    "mfb": FactorizedBilinear,
    "mcb": CompactBilinear,
    "lmf": LowRankTensor,
    "graph": GraphFusion,
    "temporal": TemporalFusion,
    "hierarchical": HierarchicalFusion,
    "searched": SearchedFusion,
}
READ = TypeAdapter[Any](specs.Fusion)


def made(settings: dict[str, Any]) -> Any:
    return build_fusion(READ.validate_python(settings), TWO)


def core(fusion: Any, kind: str) -> Any:
    """The fusion itself, where projections stand before it."""
    return fusion if isinstance(fusion, MODULES[kind]) else fusion.fusion


def both(b: int = 3, n: int = 5) -> dict[str, Stream]:
    return {name: Stream(tokens=torch.rand(b, n, width)) for name, width in TWO.items()}


def weights(module: Any) -> int:
    return sum(p.numel() for p in module.parameters())


def test_all_seventeen_are_tried_here() -> None:
    kinds = [part.model_fields["kind"].default for part in FUSIONS]
    assert len(kinds) == 17
    assert set(kinds) == set(SMALL) == set(MODULES)
    for part in FUSIONS:
        assert part.source.startswith("https://")
        assert part.__doc__.endswith(".")


@pytest.mark.parametrize("part", FUSIONS, ids=lambda part: part.__name__)
def test_defaults_build_at_the_widths_of_towers(part: type[Part]) -> None:
    with torch.device("meta"):
        fusion = build_fusion(part(), {"image": 768, "text": 512})
    assert isinstance(fusion, Fusion)
    assert isinstance(core(fusion, part.model_fields["kind"].default), MODULES[part.model_fields["kind"].default])
    assert weights(fusion) > 0


@pytest.mark.row("S0-21")
@pytest.mark.parametrize("kind", SMALL)
def test_settings_make_a_fusion_that_learns_and_does_without_one(kind: str) -> None:
    torch.manual_seed(0)
    fusion = made({"kind": kind, **SMALL[kind]})
    assert isinstance(core(fusion, kind), MODULES[kind])
    inputs: Inputs = both()
    found = fusion(inputs)
    assert found.values.shape[-1] == fusion.d_out
    found.vector().square().sum().backward()
    assert any(p.grad is not None and p.grad.any() for p in fusion.parameters())
    lost = both()
    lost["image"] = Stream(tokens=torch.full((3, 5, 6), torch.nan), present=torch.zeros(3, dtype=torch.bool))
    assert fusion.eval()(lost).values.isfinite().all()
    assert fusion(only(both(), ["text"])).present.all()


# (settings, what the module they make has)
SAID: list[tuple[dict[str, Any], Any]] = [
    ({"kind": "concat", "d_out": 0, "flags": True}, lambda f: (f.d_out, core(f, "concat").normalize) == (12, "layer")),
    ({"kind": "concat", "tokens": {"image": 5, "text": 5}}, lambda f: f.widths == {"image": 30, "text": 20}),
    ({"kind": "concat", "tokens": {"text": 5}}, lambda f: f.fusion.widths == {"image": 6, "text": 20}),
    ({"kind": "early", "sees": {"image": ["image"]}}, lambda f: f.allowed.tolist() == [[True, False], [True, True]]),
    ({"kind": "late", "depth": 2}, lambda f: len(f.encoders["image"].transformer.blocks) == 2),
    ({"kind": "late", "fusion": {"kind": "mfb", "k": 3}}, lambda f: (f.fusion.k, f.d_out) == (3, 256)),
    ({"kind": "decision", "rule": "weighted"}, lambda f: isinstance(f.rule, WeightedAverage)),
    ({"kind": "decision", "rule": "stacking", "classes": 4}, lambda f: isinstance(f.rule, Stacking) and f.d_out == 4),
    (
        {"kind": "decision", "rule": "product", "prior": [0.25, 0.75], "weights": {"text": 2.0, "image": 1.0}},
        lambda f: f.rule.func is product and f.rule.keywords["weights"].tolist() == [1.0, 2.0],
    ),
    (
        {"kind": "intermediate", "reads": {"text": ["image"]}},
        lambda f: list(f.fusion.crossings["1"].readers) == ["text"],
    ),
    ({"kind": "intermediate"}, lambda f: [type(c) for c in f.fusion.crossings.values()] == [CrossReading] * 2),
    (
        {"kind": "intermediate", "exchange": "broadcast", "through": {"kind": "lmf"}},
        lambda f: all(
            isinstance(c, Broadcast) and isinstance(c.fusion, LowRankTensor) for c in f.fusion.crossings.values()
        ),
    ),
    (
        {"kind": "cross-modal", "target": "image", "heads": 2, "level": "sentence", "gated": True},
        lambda f: (f.target, f.level, f.d_out, f.readers["text"].gate is not None) == ("image", "sentence", 6, True),
    ),
    ({"kind": "attention", "heads": 8}, lambda f: f.attention.heads == 8),
    ({"kind": "gated", "tied": True, "bias": False}, lambda f: f.tied and weights(f) == 256 * (6 + 4 + 10)),
    ({"kind": "bilinear", "one": False, "d_out": 7}, lambda f: weights(f) == 6 * 4 * 7 + 7),
    ({"kind": "mlb", "rank": 5, "activation": "none"}, lambda f: f.activation == "none" and f.out.in_features == 5),
    (
        {"kind": "mfb", "k": 3, "normalize": False, "bias": False},
        lambda f: weights(f) == 3 * 256 * 10 and not f.normalize,
    ),
    ({"kind": "mcb", "size": 64}, lambda f: f.out.in_features == 64),
    ({"kind": "lmf", "rank": 3, "d_out": 2}, lambda f: f.tensor().shape == (7, 5, 2)),
    ({"kind": "graph", "layer": "gcn", "depth": 3, "d_out": 9, "sparse": True}, lambda f: f.sparse and f.d_out == 9),
    ({"kind": "graph", "layer": "gcn"}, lambda f: all(isinstance(layer, GraphConvolution) for layer in f.layers)),
    ({"kind": "temporal", "d_memory": 7}, lambda f: f.memory.hidden_size == 7),
    ({"kind": "hierarchical", "levels": ["word", "sentence"]}, lambda f: list(f.levels) == ["word", "sentence"]),
    ({"kind": "hierarchical", "window": 5}, lambda f: f.levels["phrase"].first.size == 5),
]


@pytest.mark.parametrize(("settings", "has"), SAID, ids=lambda v: str(v) if isinstance(v, dict) else "")
def test_the_module_is_what_the_settings_say(settings: dict[str, Any], has: Any) -> None:
    assert has(made(settings))


def test_exchanges_change_nothing_at_the_start() -> None:
    torch.manual_seed(0)
    read, inputs = made({"kind": "intermediate", **SMALL["intermediate"]}).eval(), both()
    inner = read.fusion
    alone = IntermediateFusion(dict(inner.towers.items()), {}, inner.merge)
    projected = read.encode(inputs)
    assert torch.equal(inner(projected).values, alone(projected).values)


def test_the_seed_of_a_sketch_is_its_own() -> None:
    one, same, other = (made({"kind": "mcb", "size": 32, "seed": seed}) for seed in (1, 1, 2))
    places = [fusion.sketches["image"].places for fusion in (one, same, other)]
    assert torch.equal(places[0], places[1])
    assert not torch.equal(places[0], places[2])


@pytest.mark.parametrize(
    ("settings", "cause"),
    [
        ({"kind": "early", "sees": {"sound": ["text"]}}, "sees names sound; the modalities are image, text"),
        ({"kind": "cross-modal", "target": "audio"}, "target names audio"),
        ({"kind": "concat", "tokens": {"audio": 2}}, "tokens names audio"),
        ({"kind": "intermediate", "reads": {"text": ["audio"]}}, "reads names audio"),
        ({"kind": "intermediate", "reads": {"text": ["text"]}}, "text cannot read itself"),
        ({"kind": "intermediate", "depth": 2, "after": [2]}, "crossings after blocks 2"),
        ({"kind": "decision", "weights": {"text": 1.0}}, "weights of text for the rule average over image, text"),
        ({"kind": "decision", "rule": "stacking", "weights": {"text": 1.0, "image": 1.0}}, "for the rule stacking"),
        ({"kind": "decision", "prior": [0.5, 0.5]}, "2 prior probabilities for 2 classes and the rule average"),
        ({"kind": "searched", "candidates": {"a": {"kind": "gated"}, "b": {"kind": "gated", "d_out": 3}}}, "width 3"),
        ({"kind": "attention", "d_out": 6, "heads": 4}, "heads"),
    ],
)
def test_what_does_not_fit_together_is_refused(settings: dict[str, Any], cause: str) -> None:
    with pytest.raises(ConfigError, match=cause):
        made(settings)


def test_other_parts_are_no_fusions() -> None:
    with pytest.raises(ConfigError, match="ViT is no fusion"):
        build_fusion(ViT(), TWO)
    with pytest.raises(ConfigError, match="takes 2 modalities, came 3"):
        build_fusion(specs.Bilinear(), {**TWO, "audio": 3})


@pytest.mark.parametrize(
    "settings",
    [{"kind": "gate"}, {"kind": "gated", "d_uot": 3}, {"kind": "searched", "candidates": {"one": {"kind": "lmf"}}}],
)
def test_settings_that_are_none_are_refused(settings: dict[str, Any]) -> None:
    with pytest.raises(ValidationError):
        READ.validate_python(settings)
