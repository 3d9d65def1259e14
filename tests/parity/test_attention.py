"""Attention: three ways to one result, torch's as the reference, and what every attention must satisfy."""

from __future__ import annotations

import math
from itertools import pairwise

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn import functional

from plait.core.errors import ConfigError
from plait.models.attention import (
    Attention,
    AttentionSizes,
    Backend,
    Places,
    attend,
    causal,
    real_keys,
    same_segment,
)

BACKENDS: tuple[Backend, ...] = ("sdpa", "reference", "chunked")


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


def qkv(*, heads: int = 4, groups: int = 4, q: int = 5, k: int = 7, dtype: torch.dtype = torch.float32) -> list[Tensor]:
    """Queries, keys and values of a batch of 2, heads of 8 and values of 6 dimensions."""
    shapes = ((2, heads, q, 8), (2, groups, k, 8), (2, groups, k, 6))
    return [torch.randn(shape, dtype=dtype, requires_grad=True) for shape in shapes]


def close(found: Tensor, wanted: Tensor, *, atol: float) -> None:
    torch.testing.assert_close(found, wanted, atol=atol, rtol=0)


def masks(q: int, k: int) -> dict[str, Tensor | None]:
    """Kinds of masks; in the last, some queries see nothing."""
    some = torch.rand(2, 4, q, k) > 0.5
    some[0, 1, 2] = False
    some[1, :, 0] = False
    return {
        "none": None,
        "causal": causal(max(q, k))[:, :, :q, :k],
        "padding": real_keys(torch.arange(k)[None] < torch.tensor([k, k - 3])[:, None]),
        "blind rows": some,
    }


# --- one result ------------------------------------------------------------------------------------------------------


@pytest.mark.row("S3-07")
@pytest.mark.parametrize("groups", [1, 2, 4])
@pytest.mark.parametrize("biased", [False, True])
@pytest.mark.parametrize("kind", ["none", "causal", "padding", "blind rows"])
@pytest.mark.parametrize("length", [7, 600])  # 600 keys are three pieces of the chunked one
def test_the_three_are_one_and_are_torchs(kind: str, biased: bool, groups: int, length: int) -> None:
    q, k, v = qkv(groups=groups, q=5, k=length)
    mask = masks(5, length)[kind]
    bias = torch.randn(1, 4, 5, length, requires_grad=True) if biased else None
    wide = [x.repeat_interleave(4 // groups, dim=1) for x in (k, v)]
    hidden = torch.zeros(()) if mask is None else torch.zeros(mask.shape).masked_fill(~mask, float("-inf"))
    added = hidden + (0.0 if bias is None else bias)
    blind = added.isneginf().all(-1, keepdim=True)
    wanted = functional.scaled_dot_product_attention(
        q, *wide, attn_mask=added.masked_fill(blind, 0.0).expand(2, 4, 5, length)
    )
    wanted = wanted.masked_fill(blind, 0.0)
    pull = torch.randn_like(wanted)
    inputs = [q, k, v, *([bias] if bias is not None else [])]
    gradients = torch.autograd.grad(wanted, inputs, pull)
    for backend in BACKENDS:
        found = attend(q, k, v, mask=mask, bias=bias, backend=backend)
        close(found.values, wanted, atol=2e-6)  # worst measured: 5e-7
        for ours, theirs in zip(torch.autograd.grad(found.values, inputs, pull), gradients, strict=True):
            close(ours, theirs, atol=2e-5)  # worst measured: 1.1e-6
        assert (found.weights is not None) == (backend == "reference")


@pytest.mark.row("S3-07")
@pytest.mark.parametrize("backend", BACKENDS)
def test_a_given_scale(backend: Backend) -> None:
    q, k, v = qkv()
    wanted = functional.scaled_dot_product_attention(q, k, v, scale=1.0)
    close(attend(q, k, v, scale=1.0, backend=backend).values, wanted, atol=2e-6)  # worst measured: 2.4e-7


@pytest.mark.parametrize("backend", BACKENDS)
def test_bfloat16_is_as_near_to_the_truth_as_torch(backend: Backend) -> None:
    q, k, v = qkv(q=64, k=300, dtype=torch.bfloat16)
    mask = causal(300)[:, :, -64:]
    bias = torch.randn(1, 4, 64, 300)
    truth = attend(q.float(), k.float(), v.float(), mask=mask, bias=bias, backend="reference").values
    found = attend(q, k, v, mask=mask, bias=bias, backend=backend).values
    assert found.dtype == torch.bfloat16
    close(found.float(), truth, atol=0.03)  # worst measured: 0.018


@pytest.mark.row("S3-07")
@pytest.mark.parametrize("backend", ["reference", "chunked"])
def test_gradcheck(backend: Backend) -> None:
    q, k, v = (x.detach().double().requires_grad_() for x in qkv(groups=2, q=3, k=4))
    bias = torch.randn(1, 4, 3, 4, dtype=torch.float64, requires_grad=True)
    mask = masks(3, 4)["blind rows"]

    def values(*inputs: Tensor) -> Tensor:
        return attend(*inputs[:3], mask=mask, bias=inputs[3], backend=backend).values

    assert torch.autograd.gradcheck(values, (q, k, v, bias))


# --- what holds for every attention ----------------------------------------------------------------------------------


@pytest.mark.row("S3-07")
@settings(deadline=None, max_examples=40)
@given(seed=st.integers(0, 999), sharp=st.sampled_from([0.1, 1.0, 30.0]), q=st.integers(1, 6), k=st.integers(1, 9))
def test_weights_are_shares_and_hidden_keys_have_none(seed: int, sharp: float, q: int, k: int) -> None:
    torch.manual_seed(seed)
    queries, keys, values = qkv(q=q, k=k)
    mask = torch.rand(2, 1, q, k) > 0.4
    found = attend(queries * sharp, keys, values, mask=mask, backend="reference")
    assert found.weights is not None
    seen = mask.any(-1).expand(2, 4, q)
    close(found.weights.sum(-1)[seen], torch.ones(int(seen.sum())), atol=1e-6)  # worst measured: 1.2e-7
    assert (found.weights[~mask.expand_as(found.weights)] == 0).all()
    assert (found.values[~seen] == 0).all(), "who sees nothing gets zeros"
    other = torch.where(mask.any(-2, keepdim=True).mT, values, 1e6)  # what nobody sees may be anything
    for backend in BACKENDS:
        changed = attend(queries * sharp, keys, other, mask=mask, backend=backend).values
        close(changed, attend(queries * sharp, keys, values, mask=mask, backend=backend).values, atol=0)


@pytest.mark.row("S3-07")
@pytest.mark.parametrize("backend", BACKENDS)
def test_blind_queries_get_and_give_nothing(backend: Backend) -> None:
    q, k, v = qkv()
    mask = torch.ones(1, 1, 5, 7, dtype=torch.bool)
    mask[..., 3, :] = False
    found = attend(q, k, v, mask=mask, backend=backend).values
    found.square().sum().backward()
    assert not found[:, :, 3].any()
    assert not q.grad[:, :, 3].any()
    assert all(x.grad.isfinite().all() for x in (q, k, v))
    alone = [x.detach().clone().requires_grad_() for x in (q[:, :, [0, 1, 2, 4]], k, v)]
    attend(*alone, backend=backend).values.square().sum().backward()
    close(k.grad, alone[1].grad, atol=2e-6)  # worst measured: 0
    close(v.grad, alone[2].grad, atol=2e-6)


@pytest.mark.row("S3-07")
def test_dropout_drops_weights_and_keeps_the_mean() -> None:
    q, k, v = (x.detach() for x in qkv(q=1, k=3))
    for backend in ("sdpa", "reference"):
        drawn = torch.stack([attend(q, k, v, dropout=0.3, backend=backend).values for _ in range(3000)])
        wanted = attend(q, k, v).values
        error = drawn.std(0) / math.sqrt(3000)
        assert ((drawn.mean(0) - wanted).abs() < 5 * error + 1e-6).all()
        assert error.max() > 0
    with pytest.raises(ConfigError, match="chunked attention has no dropout"):
        attend(q, k, v, dropout=0.3, backend="chunked")


def test_segments() -> None:
    found = same_segment(torch.tensor([[1, 1, 2, 0]]))[0, 0]
    assert found.int().tolist() == [[1, 1, 0, 0], [1, 1, 0, 0], [0, 0, 1, 0], [0, 0, 0, 0]]


# --- many heads ------------------------------------------------------------------------------------------------------


def copied(theirs: nn.MultiheadAttention) -> Attention:
    """Our attention with the weights of torch's."""
    d, heads = theirs.embed_dim, theirs.num_heads
    ours = Attention(AttentionSizes(d=d, heads=heads))
    ours.qkv.weight.data.copy_(theirs.in_proj_weight)
    ours.qkv.bias.data.copy_(theirs.in_proj_bias)
    ours.out.load_state_dict(theirs.out_proj.state_dict())
    return ours


@pytest.mark.row("S3-08")
@pytest.mark.parametrize("kind", ["none", "causal", "padding"])
def test_self_attention_is_torchs(kind: str) -> None:
    theirs = nn.MultiheadAttention(12, 4, batch_first=True)
    nn.init.normal_(theirs.in_proj_bias)
    ours = copied(theirs)
    x = torch.randn(2, 6, 12, requires_grad=True)
    padding = torch.arange(6)[None] >= torch.tensor([6, 4])[:, None] if kind == "padding" else None
    hidden = ~causal(6)[0, 0] if kind == "causal" else None
    wanted, shares = theirs(x, x, x, key_padding_mask=padding, attn_mask=hidden, average_attn_weights=False)
    mask = {"none": None, "causal": causal(6), "padding": None if padding is None else real_keys(~padding)}[kind]
    found = ours(x, Places(mask=mask), need_weights=True)
    close(found.values, wanted, atol=1e-6)  # worst measured: 3e-7
    close(found.weights, shares, atol=1e-6)
    close(ours(x, Places(mask=mask)).values, wanted, atol=1e-6)
    pull = torch.randn_like(wanted)
    mine = torch.autograd.grad(found.values, [x, ours.qkv.weight, ours.qkv.bias, ours.out.weight], pull)
    given_ = [x, theirs.in_proj_weight, theirs.in_proj_bias, theirs.out_proj.weight]
    for a, b in zip(mine, torch.autograd.grad(wanted, given_, pull), strict=True):
        close(a, b, atol=1e-5)  # worst measured: 1.9e-6


@pytest.mark.row("S3-08")
@pytest.mark.row("S3-19")
def test_cross_attention_to_another_width_is_torchs() -> None:
    theirs = nn.MultiheadAttention(12, 4, kdim=20, vdim=20, batch_first=True)
    ours = Attention(AttentionSizes(d=12, heads=4, d_source=20))
    nn.init.normal_(theirs.in_proj_bias)
    ours.q.weight.data.copy_(theirs.q_proj_weight)
    ours.kv.weight.data.copy_(torch.cat([theirs.k_proj_weight, theirs.v_proj_weight]))
    bias = theirs.in_proj_bias.data
    ours.q.bias.data.copy_(bias[:12])
    ours.kv.bias.data.copy_(bias[12:])
    ours.out.load_state_dict(theirs.out_proj.state_dict())
    x, source = torch.randn(2, 5, 12, requires_grad=True), torch.randn(2, 9, 20, requires_grad=True)
    padding = torch.arange(9)[None] >= torch.tensor([9, 2])[:, None]
    wanted, _ = theirs(x, source, source, key_padding_mask=padding)
    found = ours(x, Places(mask=real_keys(~padding)), source=source).values
    close(found, wanted, atol=1e-6)  # worst measured: 3.6e-7
    pull = torch.randn_like(wanted)
    mine = torch.autograd.grad(found, [x, source, ours.q.weight], pull)
    for a, b in zip(mine, torch.autograd.grad(wanted, [x, source, theirs.q_proj_weight], pull), strict=True):
        close(a, b, atol=1e-5)  # worst measured: 8e-7


@pytest.mark.row("S3-08")
@pytest.mark.parametrize("groups", [1, 2, 4])
def test_a_loop_over_heads_is_the_fused_result(groups: int) -> None:
    d, heads, e = 12, 4, 5
    ours = Attention(AttentionSizes(d=d, heads=heads, kv_heads=groups, d_head=e))
    x = torch.randn(2, 6, d)
    w, b = ours.qkv.weight, ours.qkv.bias
    out = ours.out.bias.expand(2, 6, d)
    for head in range(heads):
        group = head // (heads // groups)
        starts = (head * e, (heads + group) * e, (heads + groups + group) * e)
        q, k, v = (x @ w[at : at + e].T + b[at : at + e] for at in starts)
        one = (q @ k.mT / math.sqrt(e)).softmax(-1) @ v
        out = out + one @ ours.out.weight[:, head * e : (head + 1) * e].T
    close(ours(x).values, out, atol=1e-6)  # worst measured: 1.2e-7


@pytest.mark.row("S3-08")
def test_the_order_of_heads_means_nothing() -> None:
    ours, other = (Attention(AttentionSizes(d=12, heads=3)) for _ in range(2))
    order = torch.tensor([2, 0, 1])
    other.qkv.weight.data.copy_(ours.qkv.weight.view(3, 3, 4, 12)[:, order].reshape(36, 12))
    other.qkv.bias.data.copy_(ours.qkv.bias.view(3, 3, 4)[:, order].flatten())
    other.out.weight.data.copy_(ours.out.weight.view(12, 3, 4)[:, order].flatten(1))
    other.out.bias.data.copy_(ours.out.bias)
    x = torch.randn(2, 6, 12)
    mine, theirs = ours(x, need_weights=True), other(x, need_weights=True)
    close(theirs.values, mine.values, atol=1e-6)  # worst measured: 6e-8
    close(theirs.weights, mine.weights[:, order], atol=1e-6)


@pytest.mark.row("S3-19")
@settings(deadline=None, max_examples=15)
@given(seed=st.integers(0, 999), n=st.integers(1, 12))
def test_the_order_of_the_source_means_nothing(seed: int, n: int) -> None:
    torch.manual_seed(seed)
    ours = Attention(AttentionSizes(d=8, heads=2, d_source=6))
    x, source, order = torch.randn(2, 5, 8), torch.randn(2, n, 6), torch.randperm(n)
    mask = torch.rand(2, 1, 5, n) > 0.3
    found = ours(x, Places(mask=mask), source=source).values
    shuffled = ours(x, Places(mask=mask[..., order]), source=source[:, order]).values
    close(shuffled, found, atol=2e-6)  # worst measured: 9e-8


@pytest.mark.row("S3-08")
def test_normalized_queries_and_keys() -> None:
    ours = Attention(AttentionSizes(d=8, heads=2, qk_norm=True))
    nn.init.uniform_(ours.q_norm.weight, 0.5, 2.0)
    x = torch.randn(1, 5, 8)
    q, k, _ = ours.qkv(x).view(1, 5, 3, 2, 4).permute(2, 0, 3, 1, 4)
    q, k = (y / (y.square().mean(-1, keepdim=True) + 1e-6).sqrt() for y in (q, k))
    wanted = ((q * ours.q_norm.weight) @ k.mT / 2).softmax(-1)
    close(ours(x, need_weights=True).weights, wanted, atol=1e-6)  # worst measured: 6e-8
    bigger = ours(x * 100, need_weights=True)  # but for the bias, the size of what comes in does not count
    assert bigger.weights.isfinite().all()


def test_shapes_that_do_not_divide() -> None:
    for sizes in (AttentionSizes(d=10, heads=4), AttentionSizes(d=8, heads=4, kv_heads=3)):
        with pytest.raises(ConfigError, match="do not divide"):
            Attention(sizes)
    assert Attention(AttentionSizes(d=10, heads=4, d_head=3))(torch.randn(1, 2, 10)).values.shape == (1, 2, 10)


# --- why the square root ---------------------------------------------------------------------------------------------


@pytest.mark.row("S3-C03")
@pytest.mark.parametrize("d", [4, 64, 1024])
def test_scores_have_variance_d_and_scaled_ones_1(d: int) -> None:
    q, k = torch.randn(2, 40_000, d, dtype=torch.float64)
    scores = (q * k).sum(-1)
    # The variance of a sample variance is about (kurtosis - 1) / n of its square: 5 standard errors are under 0.1.
    assert abs(float(scores.var()) / d - 1) < 0.1
    assert abs(float((scores / math.sqrt(d)).var()) - 1) < 0.1


@pytest.mark.row("S3-C03")
def test_unscaled_scores_starve_the_softmax_of_gradient() -> None:
    """It vanishes; it does not explode: the softmax saturates at one key."""

    def gradient(d: int, scale: float) -> tuple[float, float]:
        generator = torch.Generator().manual_seed(0)
        q, k = (torch.randn(256, n, d, generator=generator, dtype=torch.float64) for n in (1, 32))
        scores = (q @ k.mT * scale).requires_grad_()
        weights = scores.softmax(-1)
        target = torch.randn(weights.shape, generator=generator, dtype=torch.float64)
        (found,) = torch.autograd.grad((weights * target).sum(), scores)
        entropy = -(weights * weights.clamp(min=1e-300).log()).sum(-1)
        return float(found.norm(dim=-1).median()), float(entropy.detach().mean())

    widths = (16, 64, 256, 1024, 4096)
    raw = [gradient(d, 1.0) for d in widths]
    scaled = [gradient(d, 1 / math.sqrt(d)) for d in widths]
    assert all(later[0] < earlier[0] / 1.5 for earlier, later in pairwise(raw))
    assert all(later[1] < earlier[1] for earlier, later in pairwise(raw))
    assert raw[-1][0] < scaled[-1][0] / 100
    assert max(g for g, _ in scaled) < 1.2 * min(g for g, _ in scaled)
