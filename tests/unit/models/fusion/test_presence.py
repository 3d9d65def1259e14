"""Every fusion: what is absent or padding has no influence at all, be it NaN, and gets no gradient."""

from collections.abc import Callable, Mapping

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from plait.models.fusion.attention import AttentionFusion
from plait.models.fusion.bilinear import BilinearFusion, FactorizedBilinear, LowRankBilinear, LowRankTensor
from plait.models.fusion.compact import CompactBilinear
from plait.models.fusion.concat import ConcatFusion
from plait.models.fusion.crossmodal import CrossModalAttention, CrossModalFusion
from plait.models.fusion.decision import Classifier, DecisionFusion, Stacking, WeightedAverage, average, product, vote
from plait.models.fusion.early import EarlyFusion
from plait.models.fusion.encode import Pool, TokenTower, Tokenwise
from plait.models.fusion.gated import GatedFusion
from plait.models.fusion.graph import GraphAttention, GraphConvolution, GraphFusion, nearest
from plait.models.fusion.hierarchical import HierarchicalFusion
from plait.models.fusion.intermediate import Broadcast, CrossReading, IntermediateFusion
from plait.models.fusion.late import LateFusion
from plait.models.fusion.missing import MissingTokens
from plait.models.fusion.search import SearchedFusion
from plait.models.fusion.streams import Fused, Fusion, Stream, only
from plait.models.fusion.temporal import TemporalFusion
from plait.models.transformer import Transformer, TransformerSizes

THREE = {"image": 5, "text": 4, "audio": 3}
TWO = {"image": 5, "text": 4}
TOKENS = 4


def projections(widths: Mapping[str, int], d: int = 8) -> dict[str, nn.Module]:
    return {name: nn.Linear(width, d) for name, width in widths.items()}


def transformer(depth: int = 2, d: int = 8) -> Transformer:
    return Transformer(TransformerSizes(d=d, depth=depth, heads=2))


def towers(widths: Mapping[str, int]) -> dict[str, nn.Module]:
    return {name: TokenTower(transformer(1), project=layer) for name, layer in projections(widths).items()}


def crossed() -> nn.Module:
    """Projections, then towers of 8 that read each other after block 0 and hear a gated fusion after block 1."""
    wide = dict.fromkeys(THREE, 8)
    reads = CrossReading({"text": {"image": attends(), "audio": attends()}, "image": {"text": attends()}})
    told = Broadcast(GatedFusion(wide, 6), wide)
    for layer in told.back.children():
        nn.init.normal_(layer.weight)
    inside = IntermediateFusion({name: transformer(3) for name in THREE}, {0: reads, 1: told}, AttentionFusion(wide, 8))
    return LateFusion({name: Tokenwise(layer) for name, layer in projections(THREE).items()}, inside)


def attends() -> CrossModalAttention:
    return CrossModalAttention(8, 8, heads=2)


def decided(rule: Callable) -> nn.Module:
    return DecisionFusion({n: Classifier(Pool(), nn.Linear(w, 3)) for n, w in THREE.items()}, 3, rule=rule)


def drawn() -> torch.Generator:
    return torch.Generator().manual_seed(0)


FLAT = {name: TOKENS * width for name, width in THREE.items()}
ROW = pytest.mark.row
FUSIONS: dict[str, tuple[str, Mapping[str, int], Callable[[], Fusion]]] = {
    "concat": ("S0-14", THREE, lambda: ConcatFusion(FLAT, d_out=6)),
    "concat layer": ("S0-14", THREE, lambda: ConcatFusion(FLAT, normalize="layer", flags=True)),
    "concat unit": ("S0-14", THREE, lambda: ConcatFusion(FLAT, normalize="unit")),
    "attention": ("S0-15", THREE, lambda: AttentionFusion(THREE, 8, heads=2)),
    "gated": ("S0-16", THREE, lambda: GatedFusion(THREE, 6)),
    "gated own": ("S0-16", THREE, lambda: GatedFusion(THREE, 6, sees="own")),
    "gated tied": ("S0-16", TWO, lambda: GatedFusion(TWO, 6, tied=True)),
    "bilinear": ("S0-17", TWO, lambda: BilinearFusion(TWO, 6)),
    "mlb": ("S0-17", THREE, lambda: LowRankBilinear(THREE, 6, rank=7)),
    "mfb": ("S0-17", THREE, lambda: FactorizedBilinear(THREE, 6, k=3)),
    "mcb": ("S0-17", THREE, lambda: CompactBilinear(THREE, 6, size=16, generator=drawn())),
    "lmf": ("S0-17", THREE, lambda: LowRankTensor(THREE, 6, rank=2)),
    "gcn": ("S0-18", THREE, lambda: GraphFusion(projections(THREE), [GraphConvolution(8, 8), GraphConvolution(8, 6)])),
    "gat": (
        "S0-18",
        THREE,
        lambda: GraphFusion(
            projections(THREE), [GraphAttention(8, 8, heads=2)], build=lambda x, there: nearest(x, there, k=2)
        ),
    ),
    "gat sparse": (
        "S0-18",
        THREE,
        lambda: GraphFusion(projections(THREE), [GraphAttention(8, 8, heads=2)], sparse=True),
    ),
    "search": (
        "S0-19",
        THREE,
        lambda: SearchedFusion({"concat": ConcatFusion(FLAT, d_out=6), "gated": GatedFusion(THREE, 6)}),
    ),
    "temporal": ("S0-20", THREE, lambda: TemporalFusion(THREE, 6, d_memory=5)),
    "early": ("S3-12", THREE, lambda: EarlyFusion(projections(THREE), transformer())),
    "early, one way": (
        "S3-15",
        THREE,
        lambda: EarlyFusion(projections(THREE), transformer(), sees={"image": ["image"]}),
    ),
    "late": ("S3-13", THREE, lambda: LateFusion(towers(THREE), GatedFusion(dict.fromkeys(THREE, 8), 6))),
    "late product": (
        "S3-16",
        THREE,
        lambda: LateFusion(
            {n: Tokenwise(p) for n, p in projections(THREE).items()},
            LowRankTensor(dict.fromkeys(THREE, 8), 6),
            head=nn.Linear(6, 2),
            d_out=2,
        ),
    ),
    "hierarchical": ("S3-14", TWO, lambda: HierarchicalFusion(projections(TWO), d=8, d_out=6, heads=2)),
    "average": ("S3-17", THREE, lambda: decided(average)),
    "product": ("S3-17", THREE, lambda: decided(product)),
    "vote": ("S3-17", THREE, lambda: decided(vote)),
    "weighted": ("S3-17", THREE, lambda: decided(WeightedAverage(3))),
    "stacking": ("S3-17", THREE, lambda: decided(Stacking(3, 3))),
    "intermediate": ("S3-18", THREE, crossed),
    "cross-modal": (
        "S3-19",
        THREE,
        lambda: CrossModalFusion("text", {n: CrossModalAttention(4, THREE[n], heads=2) for n in ("image", "audio")}),
    ),
    "cross-modal, sentence": (
        "S3-20",
        TWO,
        lambda: CrossModalFusion("text", {"image": CrossModalAttention(4, 5, heads=2)}, level="sentence"),
    ),
}
EVERY = pytest.mark.parametrize("name", [pytest.param(n, marks=ROW(row)) for n, (row, _, _) in FUSIONS.items()])
LEARNING = pytest.mark.parametrize(
    "name", [pytest.param(n, marks=ROW(r)) for n, (r, _, _) in FUSIONS.items() if n != "vote"]
)
"""All whose values have a gradient."""
BATCH = 3


def built(name: str) -> tuple[Fusion, Mapping[str, int]]:
    torch.manual_seed(1)
    _, widths, build = FUSIONS[name]
    made = build()
    assert isinstance(made, nn.Module)
    return made.eval(), widths


def drawn_inputs(widths: Mapping[str, int], data: st.DataObject) -> dict[str, Stream]:
    torch.manual_seed(data.draw(st.integers(0, 99)))
    flags = lambda count: st.lists(st.booleans(), min_size=count, max_size=count)  # noqa: E731  twice below
    return {
        name: Stream(
            tokens=torch.randn(BATCH, TOKENS, width),
            real=torch.tensor(data.draw(flags(BATCH * TOKENS))).view(BATCH, TOKENS),
            present=torch.tensor(data.draw(flags(BATCH))),
        )
        for name, width in widths.items()
    }


def equal(a: Fused, b: Fused) -> None:
    assert torch.equal(a.values, b.values)
    assert torch.equal(a.present, b.present)
    assert set(a.weights) == set(b.weights)
    for what, weights in a.weights.items():
        assert torch.equal(weights, b.weights[what])


@EVERY
@settings(max_examples=3, deadline=None)
@given(data=st.data())
def test_what_is_absent_has_no_influence_and_no_gradient(name: str, data: st.DataObject) -> None:
    fuse, widths = built(name)
    inputs = drawn_inputs(widths, data)
    found = fuse(inputs, need_weights=True)
    spoiled = {
        what: Stream(
            tokens=s.tokens.masked_fill(~s.there[..., None], torch.nan).requires_grad_(), real=s.real, present=s.present
        )
        for what, s in inputs.items()
    }
    again = fuse(spoiled, need_weights=True)
    equal(again, found)
    assert not again.values.isnan().any()
    if again.values.requires_grad:
        again.values.masked_fill(again.values.isinf(), 0.0).square().sum().backward()
    for stream in spoiled.values():
        gradient = stream.tokens.grad
        assert gradient is None or torch.equal(gradient[~stream.there], torch.zeros_like(gradient[~stream.there]))
    for weight in fuse.parameters():
        assert weight.grad is None or bool(torch.isfinite(weight.grad).all())


@EVERY
def test_samples_and_the_order_of_the_mapping_do_not_matter_to_each_other(name: str) -> None:
    """Each sample alone gives what it gives in the batch (measured: at most 5e-7 apart)."""
    fuse, widths = built(name)
    torch.manual_seed(2)
    inputs = {n: Stream(tokens=torch.randn(BATCH, TOKENS, w), present=torch.tensor([True, n == "text", True]))
              for n, w in widths.items()}  # fmt: skip
    whole = fuse(inputs)
    equal(fuse(dict(reversed(inputs.items()))), whole)
    assert whole.values.shape[-1] == fuse.d_out
    for i in (1, 2):  # one that lacks most, one that has all
        one = {n: Stream(tokens=s.tokens[i : i + 1], present=s.present[i : i + 1]) for n, s in inputs.items()}
        torch.testing.assert_close(fuse(one).values[0], whole.values[i], atol=1e-5, rtol=1e-4)


@LEARNING
def test_every_modality_that_is_present_counts(name: str) -> None:
    fuse, widths = built(name)
    torch.manual_seed(3)
    inputs = {n: Stream(tokens=torch.randn(BATCH, TOKENS, w)) for n, w in widths.items()}
    for what in widths:
        moved = {n: Stream(tokens=s.tokens.clone().requires_grad_(n == what)) for n, s in inputs.items()}
        fuse(moved).vector()[0].square().sum().backward()
        gradient = moved[what].tokens.grad
        assert gradient is not None
        assert bool((gradient[0] != 0).any())
        assert bool((gradient[1:] == 0).all())  # no sample reads another


@LEARNING
def test_learned_tokens_stand_for_what_is_missing_in_every_fusion(name: str) -> None:
    fuse, widths = built(name)
    fill = MissingTokens(widths)
    torch.manual_seed(4)
    inputs = only({n: Stream(tokens=torch.randn(BATCH, TOKENS, w)) for n, w in widths.items()}, ["text"])
    found = fuse(fill(inputs))
    assert found.present.all()
    found.vector().square().sum().backward()
    for what in widths:
        gradient = fill.tokens[what].grad
        assert (gradient is not None and bool((gradient != 0).any())) == (what != "text")


@EVERY
def test_the_checkpoint_holds_all_that_was_drawn(name: str) -> None:
    fuse, widths = built(name)
    torch.manual_seed(99)
    other = FUSIONS[name][2]()
    other.load_state_dict(fuse.state_dict())
    other.eval()
    inputs = {n: Stream(tokens=torch.randn(BATCH, TOKENS, w)) for n, w in widths.items()}
    equal(other(inputs), fuse(inputs))


@EVERY
def test_sixteen_bits(name: str) -> None:
    """Masks, shares and sketches keep the number format of what comes in (measured: at most 0.023 from 32 bits)."""
    fuse, widths = built(name)
    torch.manual_seed(5)
    inputs = {n: Stream(tokens=torch.randn(BATCH, TOKENS, w).bfloat16()) for n, w in widths.items()}
    inputs["text"] = Stream(tokens=inputs["text"].tokens, present=torch.tensor([True, False, True]))
    wide = {n: Stream(tokens=s.tokens.float(), present=s.present) for n, s in inputs.items()}
    wanted = fuse(wide).values.exp() if name == "vote" else fuse(wide).values
    assert isinstance(fuse, nn.Module)
    found = fuse.bfloat16()(inputs).values
    assert found.dtype == torch.bfloat16
    found = found.exp() if name == "vote" else found
    torch.testing.assert_close(found.float(), wanted, atol=0.05, rtol=0.1)
