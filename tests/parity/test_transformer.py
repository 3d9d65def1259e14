"""The one Transformer = torch's layers with the same weights, and its switches do what they say."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn import functional

from plait.models.attention import Places, causal, real_keys
from plait.models.position.relative import BucketBias, gaps
from plait.models.position.rotary import Rotary
from plait.models.transformer import Activation, Block, FeedForward, NormPlace, Part, Transformer, TransformerSizes

ACTIVATIONS: tuple[Activation, ...] = ("gelu", "gelu_tanh", "quick_gelu", "relu", "silu")


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


def close(found: Tensor, wanted: Tensor, *, atol: float) -> None:
    torch.testing.assert_close(found, wanted, atol=atol, rtol=0)


def spread(model: nn.Module) -> None:
    """Weights far from their start, so that no norm is the identity and no bias is 0."""
    for name, weight in model.named_parameters():
        nn.init.normal_(weight, mean=1.0 if "norm" in name and name.endswith("weight") else 0.0, std=0.3)


def copy_attention(ours: nn.Module, theirs: nn.MultiheadAttention) -> None:
    ours.qkv.weight.data.copy_(theirs.in_proj_weight)
    ours.qkv.bias.data.copy_(theirs.in_proj_bias)
    ours.out.load_state_dict(theirs.out_proj.state_dict())


def copy_layer(ours: Block, theirs: nn.TransformerEncoderLayer | nn.TransformerDecoderLayer) -> None:
    copy_attention(ours.attention, theirs.self_attn)
    norms = [theirs.norm1, theirs.norm2]
    parts = [ours.attention_part, ours.feed_forward_part]
    if isinstance(theirs, nn.TransformerDecoderLayer):
        d = theirs.multihead_attn.embed_dim
        weight, bias = theirs.multihead_attn.in_proj_weight, theirs.multihead_attn.in_proj_bias
        ours.cross.q.load_state_dict({"weight": weight[:d], "bias": bias[:d]})
        ours.cross.kv.load_state_dict({"weight": weight[d:], "bias": bias[d:]})
        ours.cross.out.load_state_dict(theirs.multihead_attn.out_proj.state_dict())
        norms.append(theirs.norm3)
        parts.insert(1, ours.cross_part)
    for part, norm in zip(parts, norms, strict=True):
        part.norm.load_state_dict(norm.state_dict())
    ours.feed_forward.up.load_state_dict(theirs.linear1.state_dict())
    ours.feed_forward.down.load_state_dict(theirs.linear2.state_dict())


# --- torch's layers --------------------------------------------------------------------------------------------------


@pytest.mark.row("S3-02")
@pytest.mark.parametrize("activation", ["relu", "gelu"])
@pytest.mark.parametrize("place", ["pre", "post"])
@pytest.mark.parametrize("kind", ["none", "causal", "padding"])
def test_a_stack_is_torchs_encoder(place: NormPlace, activation: Activation, kind: str) -> None:
    def layer() -> nn.TransformerEncoderLayer:
        return nn.TransformerEncoderLayer(
            16, 4, 40, 0.0, activation=activation, batch_first=True, norm_first=place == "pre"
        )

    theirs = [layer(), layer()]
    sizes = TransformerSizes(d=16, depth=2, heads=4, d_ff=40, norm_place=place, activation=activation, eps=1e-5)
    ours = Transformer(sizes, final_norm=False)
    for block, one in zip(ours.blocks, theirs, strict=True):
        spread(one)
        copy_layer(block, one)
    x = torch.randn(2, 7, 16, requires_grad=True)
    padding = torch.arange(7)[None] >= torch.tensor([7, 4])[:, None] if kind == "padding" else None
    wanted = x
    for one in theirs:
        hidden = nn.Transformer.generate_square_subsequent_mask(7) if kind == "causal" else None
        wanted = one(wanted, src_mask=hidden, src_key_padding_mask=padding)
    mask = {"none": None, "causal": causal(7), "padding": None if padding is None else real_keys(~padding)}[kind]
    found = ours(x, Places(mask=mask))
    close(found, wanted, atol=1e-5)  # worst measured: 0
    pull = torch.randn_like(wanted)
    mine, other = (torch.autograd.grad((y * pull).sum(), x, retain_graph=True)[0] for y in (found, wanted))
    close(mine, other, atol=1e-4)  # worst measured: 0
    (found * pull).sum().backward()
    (wanted * pull).sum().backward()
    for block, one in zip(ours.blocks, theirs, strict=True):
        close(block.attention.qkv.weight.grad, one.self_attn.in_proj_weight.grad, atol=1e-4)  # worst measured: 8e-6
        close(block.feed_forward.up.weight.grad, one.linear1.weight.grad, atol=1e-4)
        close(block.feed_forward_part.norm.weight.grad, one.norm2.weight.grad, atol=1e-4)


@pytest.mark.row("S3-02")
@pytest.mark.row("S3-19")
@pytest.mark.parametrize("place", ["pre", "post"])
def test_a_block_with_a_source_is_torchs_decoder_layer(place: NormPlace) -> None:
    theirs = nn.TransformerDecoderLayer(16, 4, 40, 0.0, batch_first=True, norm_first=place == "pre")
    spread(theirs)
    sizes = TransformerSizes(
        d=16, depth=1, heads=4, d_ff=40, norm_place=place, activation="relu", eps=1e-5, d_source=16
    )
    ours = Block(sizes)
    copy_layer(ours, theirs)
    x, source = torch.randn(2, 5, 16, requires_grad=True), torch.randn(2, 9, 16, requires_grad=True)
    padding = torch.arange(9)[None] >= torch.tensor([9, 3])[:, None]
    hidden = nn.Transformer.generate_square_subsequent_mask(5)
    wanted = theirs(x, source, tgt_mask=hidden, memory_key_padding_mask=padding)
    seen: list[Tensor] = []
    places, there = Places(mask=causal(5)), Places(mask=real_keys(~padding))
    found = ours(x, places, source=source, source_places=there)
    close(found, wanted, atol=1e-5)  # worst measured: 0; 1.4e-6 with weights
    close(ours(x, places, source=source, source_places=there, weights=seen), wanted, atol=1e-5)
    assert [w.shape for w in seen] == [(2, 4, 5, 5), (2, 4, 5, 9)]
    assert (seen[1][1, :, :, 3:] == 0).all()
    pull = torch.randn_like(wanted)
    for a, b in zip(*(torch.autograd.grad(y, [x, source], pull) for y in (found, wanted)), strict=True):
        close(a, b, atol=1e-4)  # worst measured: 0


@pytest.mark.row("S3-02")
def test_without_a_source_a_block_leaves_that_part_out() -> None:
    sizes = {"d": 16, "depth": 1, "heads": 4}
    both, plain = (Block(TransformerSizes(**sizes, d_source=n)) for n in (8, 0))
    spread(both)
    plain.load_state_dict({k: v for k, v in both.state_dict().items() if not k.startswith("cross")})
    x = torch.randn(1, 3, 16)
    assert torch.equal(both(x, Places()), plain(x, Places()))


# --- feed-forward ----------------------------------------------------------------------------------------------------


@pytest.mark.row("S3-04")
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("gated", [True, False])
def test_weights_of_a_feed_forward_network(gated: bool, bias: bool) -> None:
    d, d_ff = 12, 20
    network = FeedForward(d, d_ff, gated=gated, bias=bias)
    wanted = (3 if gated else 2) * d * d_ff + bias * (d + d_ff * (2 if gated else 1))
    assert sum(p.numel() for p in network.parameters()) == wanted


@pytest.mark.row("S3-04")
@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("gated", [True, False])
def test_feed_forward_by_hand(activation: Activation, gated: bool) -> None:
    act = {
        "gelu": nn.GELU(),
        "gelu_tanh": nn.GELU(approximate="tanh"),
        "quick_gelu": lambda x: x / (1 + torch.exp(-1.702 * x)),
        "relu": nn.ReLU(),
        "silu": nn.SiLU(),
    }[activation]
    network = FeedForward(6, 10, activation=activation, gated=gated)
    x = torch.randn(2, 3, 6)
    w, b = network.up.weight, network.up.bias
    if gated:
        gate, up = functional.linear(x, w[:10], b[:10]), functional.linear(x, w[10:], b[10:])
        inner = act(gate) * up
    else:
        inner = act(functional.linear(x, w, b))
    close(network(x), network.down(inner), atol=1e-6)  # worst measured: 6e-8


@pytest.mark.row("S3-04")
def test_a_feed_forward_network_sees_one_token_at_a_time() -> None:
    network, x = FeedForward(6, 10, gated=True, activation="silu"), torch.randn(2, 5, 6)
    close(torch.stack([network(x[:, t]) for t in range(5)], dim=1), network(x), atol=1e-6)


# --- switches --------------------------------------------------------------------------------------------------------


@pytest.mark.row("S3-05")
@pytest.mark.row("S3-06")
@pytest.mark.parametrize("norm", ["layer", "rms"])
@pytest.mark.parametrize("residual", [True, False])
@pytest.mark.parametrize("place", ["pre", "post", "none"])
def test_the_place_of_the_norm_and_the_residual(place: NormPlace, residual: bool, norm: str) -> None:
    part = Part(TransformerSizes(d=8, depth=1, heads=2, norm_place=place, residual=residual, norm=norm), drop_path=0.0)
    x = torch.randn(2, 3, 8) * 2 + 1
    if place == "none":
        assert not list(part.parameters())
    else:
        spread(part)

    def normed(y: Tensor) -> Tensor:
        if place == "none":
            return y
        weight, bias = part.norm.weight, getattr(part.norm, "bias", 0.0)
        y = y - y.mean(-1, keepdim=True) if norm == "layer" else y
        return y / (y.square().mean(-1, keepdim=True) + 1e-6).sqrt() * weight + bias

    kept = x if residual else 0.0
    wanted = normed(kept + x.sin()) if place == "post" else kept + (normed(x) if place == "pre" else x).sin()
    close(part(x, torch.sin), wanted, atol=3e-6)  # worst measured: 5e-7


@pytest.mark.row("S3-05")
def test_where_a_last_norm_stands() -> None:
    def last(place: NormPlace, final_norm: bool | None = None) -> nn.Module:
        return Transformer(TransformerSizes(d=8, depth=1, heads=2, norm_place=place), final_norm=final_norm).norm

    assert isinstance(last("pre"), nn.LayerNorm)
    assert isinstance(last("post"), nn.Identity)
    assert isinstance(last("none"), nn.Identity)
    assert isinstance(last("pre", False), nn.Identity)
    assert isinstance(last("post", True), nn.LayerNorm)


@pytest.mark.row("S3-06")
def test_the_residual_carries_the_gradient_through_many_blocks() -> None:
    """What reaches the first block of 24 from the last one, without norms to help."""

    def share(residual: bool) -> float:
        torch.manual_seed(0)
        sizes = TransformerSizes(d=16, depth=24, heads=2, norm_place="none", residual=residual)
        model = Transformer(sizes).double()
        for weight in model.parameters():
            nn.init.normal_(weight, std=0.1) if weight.ndim == 2 else nn.init.zeros_(weight)
        hidden: list[Tensor] = []
        x = torch.randn(2, 4, 16, dtype=torch.float64, requires_grad=True)
        out = model(x, hidden=hidden)
        first, last = torch.autograd.grad((out * torch.randn_like(out)).sum(), [hidden[0], hidden[-1]])
        return float(first.norm() / last.norm())

    assert share(residual=True) > 0.5
    assert share(residual=False) < 1e-6


def test_layer_scale_starts_small_and_learns() -> None:
    sizes = TransformerSizes(d=8, depth=2, heads=2, layer_scale=1e-4)
    model = Transformer(sizes, final_norm=False)
    x = torch.randn(1, 5, 8)
    out = model(x)
    assert 0 < (out - x).abs().max() < 1e-2
    out.sum().backward()
    scales = [m.factor for m in model.modules() if hasattr(m, "factor")]
    assert len(scales) == 4
    assert all(s.grad is not None and s.grad.any() for s in scales)
    part = model.blocks[0].attention_part
    close(part(x, torch.sin) - x, part.norm(x).sin() * 1e-4, atol=1e-6)


def test_drop_path_keeps_the_mean_and_sleeps_in_eval() -> None:
    part = Part(TransformerSizes(d=4, depth=1, heads=1, norm_place="none"), drop_path=0.3)
    x = torch.randn(1, 2, 4).expand(20_000, 2, 4)
    gained = part(x, torch.cos) - x
    whole = (gained - x.cos() / 0.7).abs().amax((1, 2)) < 1e-5
    none = gained.abs().amax((1, 2)) < 1e-6
    assert (whole | none).all(), "a sample is skipped as a whole"
    assert abs(float(none.float().mean()) - 0.3) < 5 * (0.21 / 20_000) ** 0.5
    close(gained.mean(0), x[0].cos(), atol=0.03)
    part.eval()
    assert torch.equal(part(x[:1], torch.cos), x[:1] + x[:1].cos())


def test_drop_path_grows_with_depth_and_dropout_drops() -> None:
    model = Transformer(TransformerSizes(d=8, depth=5, heads=2, drop_path=0.4))
    assert [round(block.attention_part.drop_path, 6) for block in model.blocks] == [0.0, 0.1, 0.2, 0.3, 0.4]
    assert [block.feed_forward_part.drop_path for block in model.blocks][-1] == 0.4
    x = torch.randn(2, 6, 8)
    for sizes in ({"dropout": 0.2}, {"attention_dropout": 0.2}, {"drop_path": 0.4}):
        model = Transformer(TransformerSizes(d=8, depth=2, heads=2, **sizes))
        assert not torch.equal(model(x), model(x))
        model.eval()
        assert torch.equal(model(x), model(x))


@pytest.mark.row("S3-02")
def test_what_goes_into_each_block_and_its_weights_can_be_seen() -> None:
    model = Transformer(TransformerSizes(d=8, depth=3, heads=2)).eval()
    x, hidden, weights = torch.randn(2, 5, 8), [], []
    out = model(x, weights=weights, hidden=hidden)
    close(out, model(x), atol=1e-5)
    assert torch.equal(hidden[0], x)
    close(model.blocks[0](x, Places()), hidden[1], atol=1e-5)
    assert [w.shape for w in weights] == [(2, 2, 5, 5)] * 3


# --- what no position may see ----------------------------------------------------------------------------------------

KINDS: dict[str, TransformerSizes] = {
    "pre": TransformerSizes(d=8, depth=2, heads=2),
    "post, grouped": TransformerSizes(d=8, depth=2, heads=2, kv_heads=1, norm_place="post"),
    "gated rms": TransformerSizes(
        d=8, depth=2, heads=2, norm="rms", gated=True, activation="silu", bias=False, qk_norm=True
    ),
}


@pytest.mark.row("S3-02")
@pytest.mark.parametrize("backend", ["sdpa", "reference", "chunked"])
@pytest.mark.parametrize("kind", KINDS)
@settings(deadline=None, max_examples=8)
@given(seed=st.integers(0, 999), real=st.integers(1, 6), more=st.integers(1, 5))
def test_padding_changes_nothing_that_is_real(kind: str, backend: str, seed: int, real: int, more: int) -> None:
    torch.manual_seed(seed)
    model = Transformer(KINDS[kind], relative=lambda i: BucketBias(2), backend=backend).eval()
    at = torch.arange(real + more)[:, None]
    x = torch.randn(2, real + more, 8)
    x[:, real:] *= 1e3
    padding = (torch.arange(real + more) >= real).expand(2, -1)
    turn = Rotary.sequence(4)
    long = model(x, Places(mask=real_keys(~padding), gap=gaps(at, at), turn=turn(at)))
    near = at[:real]
    short = model(x[:, :real], Places(gap=gaps(near, near), turn=turn(near)))
    close(long[:, :real], short, atol=2e-5)  # worst measured: 8e-7


@pytest.mark.row("S3-02")
@pytest.mark.parametrize("backend", ["sdpa", "reference", "chunked"])
@pytest.mark.parametrize("kind", KINDS)
@settings(deadline=None, max_examples=8)
@given(seed=st.integers(0, 999), t=st.integers(2, 9), data=st.data())
def test_under_a_causal_mask_nothing_later_is_seen(
    kind: str, backend: str, seed: int, t: int, data: st.DataObject
) -> None:
    torch.manual_seed(seed)
    model = Transformer(KINDS[kind], backend=backend).eval()
    cut = data.draw(st.integers(1, t - 1))
    x = torch.randn(2, t, 8)
    other = x.clone()
    other[:, cut:] = torch.randn(2, t - cut, 8) * 100
    places = Places(mask=causal(t))
    close(model(other, places)[:, :cut], model(x, places)[:, :cut], atol=2e-5)  # worst measured: 0
    assert not torch.allclose(model(other, places)[:, cut:], model(x, places)[:, cut:], atol=1e-2)
    reach = x.clone().requires_grad_()
    model(reach, places)[:, cut - 1].square().sum().backward()
    assert not reach.grad[:, cut:].any()


@pytest.mark.row("S3-02")
@settings(deadline=None, max_examples=10)
@given(seed=st.integers(0, 999))
def test_without_positions_the_order_of_tokens_means_nothing(seed: int) -> None:
    torch.manual_seed(seed)
    model = Transformer(TransformerSizes(d=8, depth=2, heads=2)).eval()
    x, order = torch.randn(1, 7, 8), torch.randperm(7)
    close(model(x[:, order]), model(x)[:, order], atol=1e-5)  # worst measured: 5e-7
