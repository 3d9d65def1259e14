"""Early, late, intermediate and cross-modal fusion: where modalities meet, and where they do not."""

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.autograd import gradcheck

from plait.core.errors import ConfigError
from plait.models.attention import Attention, AttentionSizes
from plait.models.fusion.attention import AttentionFusion
from plait.models.fusion.concat import ConcatFusion
from plait.models.fusion.crossmodal import CrossModalAttention, CrossModalFusion
from plait.models.fusion.early import EarlyFusion
from plait.models.fusion.encode import Pool, TokenTower, Tokenwise
from plait.models.fusion.gated import GatedFusion
from plait.models.fusion.intermediate import Broadcast, CrossReading, IntermediateFusion
from plait.models.fusion.late import LateFusion, similarity
from plait.models.fusion.streams import Stream
from plait.models.transformer import Transformer, TransformerSizes

WIDE = {"image": 8, "text": 8}


def tower(depth: int = 3) -> Transformer:
    return Transformer(TransformerSizes(d=8, depth=depth, heads=2)).eval()


def inputs(image: int = 6, text: int = 4) -> dict[str, Stream]:
    return {"image": Stream(tokens=torch.randn(2, image, 8)), "text": Stream(tokens=torch.randn(2, text, 8))}


def reaches(output: Tensor, given: Tensor) -> bool:
    (gradient,) = torch.autograd.grad(output.square().sum(), given, allow_unused=True, retain_graph=True)
    return gradient is not None and bool((gradient != 0).any())


# --- early -----------------------------------------------------------------------------------------------------------


@pytest.mark.row("S3-12", "S3-15")
def test_modalities_meet_in_the_first_block_of_early_fusion() -> None:
    fuse = EarlyFusion({"image": nn.Linear(8, 8), "text": nn.Linear(8, 8)}, tower())
    both = inputs()
    image = both["image"].tokens.requires_grad_()
    after: list[Tensor] = []
    fuse.transformer.blocks[0].register_forward_hook(lambda _m, _i, out: after.append(out))
    fused = fuse(both, need_weights=True)
    where = fuse.spans(both)
    assert where == {"image": slice(0, 6), "text": slice(6, 10)}
    assert reaches(after[0][:, where["text"]], image)
    weights = fused.weights["attention"]
    assert weights.shape == (2, 3, 2, 10, 10)
    torch.testing.assert_close(weights.sum(-1), torch.ones(2, 3, 2, 10))


@pytest.mark.row("S3-15")
def test_a_modality_may_be_kept_from_seeing_another() -> None:
    fuse = EarlyFusion({"image": nn.Linear(8, 8), "text": nn.Linear(8, 8)}, tower(), sees={"image": ["image"]})
    both = inputs()
    text = both["text"].tokens.requires_grad_()
    values = fuse(both).values
    assert not reaches(values[:, :6], text)
    assert reaches(values[:, 6:], text)


# --- late ------------------------------------------------------------------------------------------------------------


@pytest.mark.row("S3-13", "S3-16")
def test_nothing_crosses_before_the_merge_of_late_fusion() -> None:
    encoders = {"image": TokenTower(tower(1)), "text": TokenTower(tower(1), project=nn.Linear(8, 8))}
    fuse = LateFusion(encoders, GatedFusion(WIDE, 5), head=nn.Linear(5, 3), d_out=3)
    both = inputs()
    image, text = (stream.tokens.requires_grad_() for stream in both.values())
    encoded = fuse.encode(both)
    assert reaches(encoded["text"].tokens, text)
    assert not reaches(encoded["text"].tokens, image)
    assert not reaches(encoded["image"].tokens, text)
    whole = fuse(both).values
    assert reaches(whole, image)
    assert reaches(whole, text)
    # What was computed before, and kept without its graph, gives the same bits.
    kept = {
        name: Stream(tokens=s.tokens.detach().clone(), real=s.real, present=s.present) for name, s in encoded.items()
    }
    assert torch.equal(fuse.merge(kept).values, whole)


@pytest.mark.row("S3-13")
def test_scores_of_a_dual_encoder() -> None:
    both = inputs()
    found = similarity(both["image"], both["text"])
    wanted = nn.functional.cosine_similarity(both["image"].mean()[:, None], both["text"].mean()[None], dim=-1)
    torch.testing.assert_close(found, wanted)
    with pytest.raises(ConfigError, match="go together"):
        LateFusion({"image": Pool()}, GatedFusion({"image": 8}, 5), d_out=3)


# --- intermediate ----------------------------------------------------------------------------------------------------


def reads(**options: Any) -> CrossReading:
    return CrossReading({"text": {"image": CrossModalAttention(8, 8, heads=2, **options)}})


def pooled() -> LateFusion:
    return LateFusion({"image": Pool(), "text": Pool()}, ConcatFusion(WIDE))


@pytest.mark.row("S3-18", "S3-20")
@pytest.mark.parametrize("at", [0, 1, 2])
def test_exchange_happens_after_the_chosen_block(at: int) -> None:
    fuse = IntermediateFusion({name: tower() for name in WIDE}, {at: reads()}, pooled())
    both = inputs()
    image = both["image"].tokens.requires_grad_()
    seen: list[Tensor] = []
    text = fuse.towers.get_submodule("text.blocks")
    for block in text.children():
        block.register_forward_hook(lambda _m, _i, out: seen.append(out))
    streams, weights = fuse.encode(both, need_weights=True)
    assert [reaches(states, image) for states in seen] == [i > at for i in range(3)]
    assert reaches(streams["text"].tokens, image)
    assert not reaches(streams["image"].tokens, both["text"].tokens.requires_grad_())
    assert list(weights) == [f"{at}:text<image"]
    assert weights[f"{at}:text<image"].shape == (2, 2, 4, 6)


@pytest.mark.row("S3-18")
def test_frozen_towers_stay_as_they_are() -> None:
    """Same bits as each tower alone at the start; training moves the exchange and no tower."""
    wide = {**WIDE, "audio": 8}
    towers = {name: tower(depth).requires_grad_(False) for name, depth in zip(wide, (3, 2, 4), strict=True)}
    before = {name: {key: value.clone() for key, value in t.state_dict().items()} for name, t in towers.items()}
    told = Broadcast(AttentionFusion(wide, 8), wide)
    merge = LateFusion({name: Pool() for name in wide}, ConcatFusion(wide))
    fuse = IntermediateFusion(towers, {0: reads(gated=True), 1: told}, merge)
    both = {**inputs(), "audio": Stream(tokens=torch.randn(2, 5, 8))}
    streams, _ = fuse.encode(both)
    for name, stream in streams.items():
        alone = TokenTower(towers[name])(both[name].clean())
        assert torch.equal(stream.tokens, alone.tokens)
    trained = [p for p in fuse.parameters() if p.requires_grad]
    best = torch.optim.SGD(trained, lr=0.1)
    for _ in range(2):
        best.zero_grad()
        (fuse(both).values - 1).square().sum().backward()
        best.step()
    assert not torch.equal(fuse.encode(both)[0]["text"].tokens, streams["text"].tokens)
    for name, t in towers.items():
        assert all(p.grad is None for p in t.parameters())
        assert all(torch.equal(value, before[name][key]) for key, value in t.state_dict().items())


def test_exchanges_that_cannot_be_are_refused() -> None:
    with pytest.raises(ConfigError, match="crossings after blocks 2, but the tower of text has blocks 0 to 1"):
        IntermediateFusion({"image": tower(3), "text": tower(2)}, {2: reads()}, pooled())
    with pytest.raises(ConfigError, match="text cannot read itself"):
        CrossReading({"text": {"text": CrossModalAttention(8, 8, heads=2)}})


# --- cross-modal -----------------------------------------------------------------------------------------------------


@pytest.mark.row("S3-19")
def test_shapes_of_the_notes() -> None:
    """W_Q: d1 x h dk, W_K: d2 x h dk, W_V: d2 x h dv, W_O: h dv x d1, and n x d1 comes out."""
    attend = CrossModalAttention(10, 6, heads=3, d_k=4, d_v=5)
    assert attend.attention.q.weight.shape == (12, 10)
    assert attend.attention.kv.weight.shape == (12 + 15, 6)
    assert attend.attention.out.weight.shape == (10, 15)
    x, source = torch.randn(2, 7, 10), torch.randn(2, 9, 6)
    values, weights = attend(Stream(tokens=x), Stream(tokens=source), need_weights=True)
    assert values.shape == (2, 7, 10)
    q = attend.attention.q(attend.part.norm(x)).view(2, 7, 3, 4)
    k, v = attend.attention.kv(source).split([12, 15], dim=-1)
    k, v = k.view(2, 9, 3, 4), v.view(2, 9, 3, 5)
    wanted = (torch.einsum("bqhe,bkhe->bhqk", q, k) / 4**0.5).softmax(-1)
    torch.testing.assert_close(weights, wanted)
    heads = torch.einsum("bhqk,bkhf->bqhf", wanted, v).flatten(2)
    torch.testing.assert_close(values, x + attend.attention.out(heads))


def test_self_attention_with_values_of_another_width() -> None:
    attend = Attention(AttentionSizes(d=8, heads=4, kv_heads=2, d_head=3, d_value=5))
    assert attend.qkv.weight.shape == (12 + 6 + 10, 8)
    x = torch.randn(2, 6, 8)
    assert attend(x).values.shape == (2, 6, 8)
    torch.testing.assert_close(attend(x).values, attend(x, need_weights=True).values)


@pytest.mark.row("S3-19")
@pytest.mark.parametrize("norm_place", ["pre", "post", "none"])
def test_the_order_of_the_source_does_not_matter_and_an_empty_one_changes_nothing(norm_place: Any) -> None:
    attend = CrossModalAttention(8, 6, heads=2, norm_place=norm_place)
    nn.init.normal_(attend.attention.out.bias)
    x, source = Stream(tokens=torch.randn(2, 5, 8)), Stream(tokens=torch.randn(2, 9, 6))
    found = attend(x, source).values
    mixed = Stream(tokens=source.tokens[:, torch.randperm(9)])
    torch.testing.assert_close(attend(x, mixed).values, found, atol=1e-6, rtol=1e-5)
    unchanged = attend.part.norm(x.tokens) if norm_place == "post" else x.tokens
    nothing = Stream(tokens=source.tokens, real=torch.tensor([[False] * 9, [True] * 9]))
    values, weights = attend(x, nothing, need_weights=True)
    assert torch.equal(values[0], unchanged[0])
    assert weights[0].eq(0).all()
    torch.testing.assert_close(values[1], found[1])
    empty = torch.zeros(2, 0, 6, requires_grad=True)
    values, weights = attend(x, Stream(tokens=empty), need_weights=True)
    assert torch.equal(values, unchanged)
    assert weights.shape == (2, 2, 5, 0)


@pytest.mark.row("S3-20")
def test_a_sentence_asks_as_the_mean_of_its_words() -> None:
    attend = CrossModalAttention(8, 6, heads=2)
    text = Stream(tokens=torch.randn(2, 5, 8), real=torch.tensor([[True] * 5, [True] * 2 + [False] * 3]))
    image = Stream(tokens=torch.randn(2, 9, 6))
    both = {"text": text, "image": image}
    sentence = CrossModalFusion("text", {"image": attend}, level="sentence")(both, need_weights=True)
    torch.testing.assert_close(sentence.values, attend(Stream(tokens=text.mean()[:, None]), image).values)
    assert sentence.weights["image"].shape == (2, 2, 1, 9)
    words = CrossModalFusion("text", {"image": attend})(both, need_weights=True)
    assert words.weights["image"].shape == (2, 2, 5, 9)
    whole = CrossModalFusion("text", {"image": attend}, source_level="sentence")(both, need_weights=True)
    assert torch.equal(whole.weights["image"], torch.ones(2, 2, 5, 1))
    with pytest.raises(ConfigError, match="text reads image, text"):
        CrossModalFusion("text", {"image": attend, "text": CrossModalAttention(8, 8, heads=2)})


@pytest.mark.row("S3-19")
def test_gradients() -> None:
    torch.manual_seed(0)
    attend = CrossModalAttention(4, 3, heads=2, d_k=2, d_v=3, gated=True).double()
    assert attend.gate is not None
    nn.init.ones_(attend.gate)
    real = torch.tensor([[True, False, True], [False, False, False]])

    def run(x: Tensor, source: Tensor) -> Tensor:
        return attend(Stream(tokens=x), Stream(tokens=source, real=real)).values

    drawn = (torch.randn(2, 2, 4), torch.randn(2, 3, 3))
    assert gradcheck(run, tuple(x.double().requires_grad_() for x in drawn))


@pytest.mark.row("S3-16")
def test_any_token_module_is_an_encoder() -> None:
    encoders = {"image": Tokenwise(nn.Linear(8, 3)), "text": Tokenwise(nn.LayerNorm(8))}
    fuse = LateFusion(encoders, GatedFusion({"image": 3, "text": 8}, 4))
    assert fuse(inputs()).values.shape == (2, 4)
