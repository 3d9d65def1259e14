"""Fusions against torch's own modules, and against torch_geometric, scikit-learn and pykale through goldens."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from plait.models.attention import Attention
from plait.models.fusion.attention import AttentionFusion
from plait.models.fusion.bilinear import BilinearFusion, LowRankTensor
from plait.models.fusion.crossmodal import CrossModalAttention
from plait.models.fusion.decision import Stacking, average, vote
from plait.models.fusion.early import EarlyFusion
from plait.models.fusion.graph import Edges, GraphAttention, GraphConvolution
from plait.models.fusion.streams import Stream, vector
from plait.models.transformer import Transformer, TransformerSizes

Golden = Callable[[str], tuple[dict[str, Tensor], dict[str, Any]]]
EXACT = {"atol": 1e-12, "rtol": 1e-12}
"""In float64; values were at most 1e-15 apart."""


def copied(ours: Attention, theirs: nn.MultiheadAttention) -> None:
    """Weights of torch's attention whose key and value have widths of their own."""
    with torch.no_grad():
        q, k, v = theirs.in_proj_bias.chunk(3)
        ours.q.weight.copy_(theirs.q_proj_weight)
        ours.q.bias.copy_(q)
        ours.kv.weight.copy_(torch.cat([theirs.k_proj_weight, theirs.v_proj_weight]))
        ours.kv.bias.copy_(torch.cat([k, v]))
        ours.out.load_state_dict(theirs.out_proj.state_dict())


def multihead(d1: int, d2: int, heads: int) -> nn.MultiheadAttention:
    torch.manual_seed(0)
    made = nn.MultiheadAttention(d1, heads, kdim=d2, vdim=d2, batch_first=True, dtype=torch.float64)
    nn.init.normal_(made.in_proj_bias)
    nn.init.normal_(made.out_proj.bias)
    return made


@pytest.mark.row("S3-19")
@pytest.mark.parametrize("norm_place", ["pre", "post", "none"])
def test_cross_modal_attention_is_torchs_with_a_residual(norm_place: Any) -> None:
    theirs = multihead(12, 20, 3)
    ours = CrossModalAttention(12, 20, heads=3, norm_place=norm_place).double()
    copied(ours.attention, theirs)
    x = torch.randn(2, 5, 12, dtype=torch.float64, requires_grad=True)
    source = torch.randn(2, 9, 20, dtype=torch.float64, requires_grad=True)
    real = torch.ones(2, 9, dtype=torch.bool)
    real[1, 6:] = False
    norm = nn.LayerNorm(12, eps=1e-6, dtype=torch.float64)
    asked = norm(x) if norm_place == "pre" else x
    added, weights = theirs(asked, source, source, key_padding_mask=~real, average_attn_weights=False)
    wanted = norm(x + added) if norm_place == "post" else x + added
    found = ours(Stream(tokens=x), Stream(tokens=source, real=real), need_weights=True)
    torch.testing.assert_close(found.values, wanted, **EXACT)
    torch.testing.assert_close(found.weights, weights, **EXACT)
    up = torch.randn_like(wanted)
    for a, b in zip(
        torch.autograd.grad((found.values * up).sum(), [x, source, ours.attention.q.weight]),
        torch.autograd.grad((wanted * up).sum(), [x, source, theirs.q_proj_weight]),
        strict=True,
    ):
        torch.testing.assert_close(a, b, **EXACT)


@pytest.mark.row("S0-15")
def test_attention_fusion_is_torchs_with_a_learned_query() -> None:
    widths = {"image": 5, "text": 4, "audio": 3}
    ours = AttentionFusion(widths, 8, heads=2).double()
    theirs = multihead(8, 8, 2)  # of one width, torch keeps one matrix
    with torch.no_grad():
        q, k, v = theirs.in_proj_weight.chunk(3)
        ours.attention.q.weight.copy_(q)
        ours.attention.kv.weight.copy_(torch.cat([k, v]))
        q, k, v = theirs.in_proj_bias.chunk(3)
        ours.attention.q.bias.copy_(q)
        ours.attention.kv.bias.copy_(torch.cat([k, v]))
        ours.attention.out.load_state_dict(theirs.out_proj.state_dict())
    x = {name: torch.randn(3, width, dtype=torch.float64) for name, width in widths.items()}
    here = torch.tensor([[True, True, True], [False, True, True], [True, False, False]])
    keys = torch.stack([ours.norms[n](ours.projections[n](value)) for n, value in x.items()], dim=1)
    wanted, weights = theirs(ours.query.expand(3, 1, -1), keys, keys, key_padding_mask=~here)
    fused = ours({name: vector(value, here[:, i]) for i, (name, value) in enumerate(x.items())})
    torch.testing.assert_close(fused.values, wanted[:, 0], **EXACT)
    torch.testing.assert_close(fused.weights["modality"], weights[:, 0], **EXACT)


@pytest.mark.row("S3-12", "S3-15")
@pytest.mark.parametrize("norm_first", [True, False])
def test_early_fusion_is_torchs_encoder_over_the_joined_tokens(norm_first: bool) -> None:
    torch.manual_seed(0)
    layer = nn.TransformerEncoderLayer(
        8, 2, 16, 0.0, "gelu", norm_first=norm_first, batch_first=True, dtype=torch.float64
    )
    theirs = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)
    for weight in theirs.parameters():
        nn.init.normal_(weight, std=0.3)
    place = "pre" if norm_first else "post"
    sizes = TransformerSizes(d=8, depth=2, heads=2, d_ff=16, norm_place=place, eps=1e-5)
    projections = {"image": nn.Linear(5, 8), "text": nn.Linear(4, 8)}
    ours = EarlyFusion(projections, Transformer(sizes, final_norm=False)).double()
    with torch.no_grad():
        for block, other in zip(ours.transformer.blocks, theirs.layers, strict=True):
            block.attention.qkv.weight.copy_(other.self_attn.in_proj_weight)
            block.attention.qkv.bias.copy_(other.self_attn.in_proj_bias)
            block.attention.out.load_state_dict(other.self_attn.out_proj.state_dict())
            block.attention_part.norm.load_state_dict(other.norm1.state_dict())
            block.feed_forward.up.load_state_dict(other.linear1.state_dict())
            block.feed_forward.down.load_state_dict(other.linear2.state_dict())
            block.feed_forward_part.norm.load_state_dict(other.norm2.state_dict())
    image, text = torch.randn(2, 6, 5, dtype=torch.float64), torch.randn(2, 3, 4, dtype=torch.float64)
    real = torch.ones(2, 6, dtype=torch.bool)
    real[1, 4:] = False
    there = torch.cat([real, real.new_ones(2, 3)], dim=1)
    kinds = ours.kinds.weight
    joined = torch.cat([projections["image"](image) + kinds[0], projections["text"](text) + kinds[1]], dim=1)
    wanted = theirs(joined, src_key_padding_mask=~there)
    found = ours({"image": Stream(tokens=image, real=real), "text": Stream(tokens=text)})
    torch.testing.assert_close(found.values[there], wanted[there], **EXACT)


@pytest.mark.row("S0-17")
def test_full_bilinear_is_torchs() -> None:
    fuse = BilinearFusion({"image": 5, "text": 4}, 6, one=False)
    image, text = torch.randn(3, 5), torch.randn(3, 4)
    theirs = nn.Bilinear(5, 4, 6)
    theirs.load_state_dict(fuse.product.state_dict())
    found = fuse({"image": vector(image), "text": vector(text)}).values
    assert torch.equal(found, theirs(image, text))


@pytest.mark.row("S0-17")
def test_low_rank_tensor_is_pykales(golden: Golden) -> None:
    theirs, _ = golden("fusion")
    widths = {"a": 5, "b": 4, "c": 3}
    fuse = LowRankTensor(widths, 6, rank=2).double()
    with torch.no_grad():
        for i, name in enumerate(widths):
            fuse.factors[name].copy_(theirs[f"tensor_factor{i}"].roll(-1, dims=1))  # their 1 stands in front
        fuse.rank_weights.copy_(theirs["tensor_weights"][0])
        fuse.bias.copy_(theirs["tensor_bias"][0])
    found = fuse({name: vector(theirs[f"tensor_x{i}"]) for i, name in enumerate(widths)})
    torch.testing.assert_close(found.values, theirs["tensor_out"], **EXACT)


@pytest.mark.row("S0-18")
@pytest.mark.parametrize("sparse", [False, True])
@pytest.mark.parametrize("name", ["gcn", "gat", "gat_mean"])
def test_graph_layers_are_those_of_torch_geometric(golden: Golden, name: str, *, sparse: bool) -> None:
    theirs, _ = golden("fusion")
    nodes, edges = theirs["graph_nodes"][None].requires_grad_(), theirs["graph_edges"]
    match name:
        case "gcn":
            layer = GraphConvolution(5, 4)
        case "gat":
            layer = GraphAttention(5, 8, heads=2)
        case _:
            layer = GraphAttention(5, 4, heads=3, average=True, slope=0.1)
    layer = layer.double()
    with torch.no_grad():
        layer.linear.weight.copy_(theirs[f"graph_{name}_lin.weight"])
        layer.bias.copy_(theirs[f"graph_{name}_bias"])
        if isinstance(layer, GraphAttention):
            layer.hearing.copy_(theirs[f"graph_{name}_att_dst"][0])
            layer.heard.copy_(theirs[f"graph_{name}_att_src"][0])
    source, to = edges
    hears = torch.zeros(1, 7, 7, dtype=torch.bool)
    hears[0, to, source] = True
    found = layer(nodes, Edges(to=to, source=source) if sparse else hears).nodes
    torch.testing.assert_close(found[0], theirs[f"graph_{name}_out"], **EXACT)
    d_nodes, d_weight = torch.autograd.grad(found.square().sum(), [nodes, layer.linear.weight])
    torch.testing.assert_close(d_nodes[0], theirs[f"graph_{name}_d_nodes"], **EXACT)
    torch.testing.assert_close(d_weight, theirs[f"graph_{name}_d_weight"], **EXACT)


@pytest.mark.row("S3-17")
def test_decisions_are_merged_as_scikit_learn_merges_them(golden: Golden) -> None:
    theirs, _ = golden("fusion")
    logprobs, weights = theirs["vote_decisions"].log(), theirs["vote_weights"]  # the tree is certain at times: log 0
    everyone = torch.ones(logprobs.shape[:2], dtype=torch.bool)
    soft = average(logprobs, everyone, weights=weights)
    torch.testing.assert_close(soft.exp(), theirs["vote_soft"], **EXACT)
    assert torch.equal(soft.argmax(-1), theirs["vote_soft_classes"])
    assert torch.equal(vote(logprobs, everyone, weights=weights).argmax(-1), theirs["vote_hard_classes"])
    stack = Stacking(3, 3).double()
    with torch.no_grad():
        stack.out.weight.copy_(theirs["vote_stacked_weight"])
        stack.out.bias.copy_(theirs["vote_stacked_bias"])
    found = stack(theirs["vote_stacked_decisions"].log(), everyone).exp()
    torch.testing.assert_close(found, theirs["vote_stacked"], **EXACT)
