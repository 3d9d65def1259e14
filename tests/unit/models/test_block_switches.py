"""Biases of queries and values without one of keys; dropout inside the feed-forward; blocks left out of a step."""

from __future__ import annotations

import pytest
import torch

from plait.models.attention import Attention, AttentionSizes
from plait.models.transformer import Transformer, TransformerSizes

TINY = {"d": 8, "depth": 3, "heads": 2}


@pytest.mark.parametrize("source", [False, True])
def test_without_a_bias_of_keys_everything_is_as_with_one_of_zeros(source: bool) -> None:
    torch.manual_seed(0)
    sizes = {"d": 8, "heads": 4, "kv_heads": 2, "d_source": 6 if source else 0}
    whole = Attention(AttentionSizes(**sizes)).double()
    keyless = Attention(AttentionSizes(**sizes, key_bias=False)).double()
    joined = whole.kv if source else whole.qkv
    before = 0 if source else 8
    with torch.no_grad():
        joined.bias[before : before + 4] = 0
        state = whole.state_dict()
        bias = state.pop("kv.bias" if source else "qkv.bias")
        keyless.load_state_dict(state | {"qv_bias": torch.cat([bias[:before], bias[before + 4 :]])}, strict=True)
    x = torch.randn(2, 5, 8, dtype=torch.float64)
    other = torch.randn(2, 3, 6, dtype=torch.float64) if source else None
    found, wanted = (attention(x, source=other).values for attention in (keyless, whole))
    torch.testing.assert_close(found, wanted)
    found.square().sum().backward()
    wanted.square().sum().backward()
    gradient = joined.bias.grad
    torch.testing.assert_close(keyless.qv_bias.grad, torch.cat([gradient[:before], gradient[before + 4 :]]))
    # Why there is none: what it adds to all scores of a query alike, the softmax forgets.
    assert gradient[before : before + 4].abs().max() < 1e-12


def test_without_any_bias_there_is_none() -> None:
    assert {
        name for name, _ in Attention(AttentionSizes(d=8, heads=2, bias=False, key_bias=False)).named_parameters()
    } == {
        "qkv.weight",
        "out.weight",
        "out.bias",
    }


def test_inner_dropout_is_its_own() -> None:
    blocks = Transformer(TransformerSizes(**TINY, dropout=0.2, inner_dropout=0.5)).blocks
    assert {(block.feed_forward.dropout, block.feed_forward_part.dropout) for block in blocks} == {(0.5, 0.2)}
    blocks = Transformer(TransformerSizes(**TINY, dropout=0.2)).blocks
    assert {block.feed_forward.dropout for block in blocks} == {0.2}


def test_blocks_are_left_out_while_training_only() -> None:
    torch.manual_seed(0)
    model = Transformer(TransformerSizes(**TINY, layer_drop=0.5))
    x = torch.randn(1, 4, 8)
    assert torch.equal(model.eval()(x), model(x))
    model.train()
    kept = []
    for block in model.blocks:
        block.register_forward_hook(lambda *_: kept.append(1))
    for _ in range(60):
        model(x)
    assert 63 < len(kept) < 117  # of 180; 4 deviations are 27
    sure = Transformer(TransformerSizes(**TINY, layer_drop=1.0)).train()
    assert torch.equal(sure(x), sure.norm(x))
