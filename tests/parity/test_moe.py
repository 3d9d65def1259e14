"""Mixture of experts = Mixtral's block with the same weights; dense to sparse changes nothing at first."""

from dataclasses import replace

import pytest
import torch
from transformers import MixtralConfig
from transformers.models.mixtral.modeling_mixtral import MixtralSparseMoeBlock, load_balancing_loss_func

from plait.core.errors import ConfigError
from plait.models.moe import MixtureOfExperts, Routed, balance_loss, upcycled
from plait.models.transformer import FeedForward, Transformer, TransformerSizes

SIZES = TransformerSizes(d=16, depth=1, heads=2, d_ff=24, activation="silu", gated=True, bias=False)


def pair(experts: int, top_k: int) -> tuple[MixtureOfExperts, MixtralSparseMoeBlock]:
    config = MixtralConfig(hidden_size=16, intermediate_size=24, num_local_experts=experts, num_experts_per_tok=top_k)
    config._experts_implementation = "eager"
    theirs = MixtralSparseMoeBlock(config)
    torch.manual_seed(0)
    ours = MixtureOfExperts(SIZES, experts=experts, top_k=top_k)
    with torch.no_grad():
        for weight in theirs.parameters():
            weight.normal_(std=0.3)
        ours.load_state_dict(theirs.state_dict())
    return ours, theirs


@pytest.mark.parametrize(("experts", "top_k"), [(4, 2), (8, 1), (3, 3)])
def test_values_gradients_and_balance_are_mixtrals(experts: int, top_k: int) -> None:
    ours, theirs = pair(experts, top_k)
    x = torch.randn(2, 9, 16)
    routed: list[Routed] = []
    found, wanted = ours(x, routed=routed), theirs(x)
    torch.testing.assert_close(found, wanted, atol=1e-5, rtol=1e-4)
    logits = theirs.gate(x)[0]
    loss = load_balancing_loss_func((logits,), experts, top_k)
    torch.testing.assert_close(balance_loss(routed[0]), loss, atol=1e-6, rtol=1e-5)
    (found.square().sum() + balance_loss(routed[0])).backward()
    (wanted.square().sum() + loss).backward()
    torch.testing.assert_close(ours.gate.weight.grad, theirs.gate.weight.grad, atol=1e-4, rtol=1e-3)
    for name, weight in theirs.experts.named_parameters():
        torch.testing.assert_close(ours.experts.get_parameter(name).grad, weight.grad, atol=1e-4, rtol=1e-3)


def test_padding_does_not_count_and_sums_add_up_to_the_whole() -> None:
    ours, theirs = pair(4, 2)
    x = torch.randn(4, 6, 16)
    real = torch.arange(6)[None] < torch.tensor([6, 2, 5, 1])[:, None]
    whole: list[Routed] = []
    ours(x, documents=real.long(), routed=whole)
    wanted = load_balancing_loss_func((theirs.gate(x)[0],), 4, 2, attention_mask=real)
    torch.testing.assert_close(balance_loss(whole[0]), wanted, atol=1e-6, rtol=1e-5)
    parts: list[Routed] = []
    for rows in (slice(0, 1), slice(1, 4)):
        ours(x[rows], documents=real[rows].long(), routed=parts)
    torch.testing.assert_close(balance_loss(parts[0] + parts[1]), balance_loss(whole[0]))


def test_a_dense_network_becomes_a_mixture_that_computes_the_same() -> None:
    torch.manual_seed(0)
    dense = FeedForward(16, 24, activation="silu", gated=True, bias=False)
    x = torch.randn(3, 5, 16)
    sparse = upcycled(dense, SIZES, experts=4, top_k=2)
    torch.testing.assert_close(sparse(x), dense(x), atol=1e-6, rtol=1e-5)
    torch.testing.assert_close(
        balance_loss(Routed(torch.full((4,), 10.0), torch.full((4,), 5.0), torch.tensor(20.0), torch.tensor(0.0))),
        torch.tensor(2.0),
    )


def test_impossible_numbers_are_refused() -> None:
    with pytest.raises(ConfigError, match="top_k is 5 of 4 experts"):
        MixtureOfExperts(SIZES, experts=4, top_k=5)


def test_a_transformer_with_experts_in_every_other_block() -> None:
    torch.manual_seed(0)
    sizes = replace(SIZES, depth=4)
    model = Transformer(sizes, feed_forward=lambda i: MixtureOfExperts(sizes, experts=4) if i % 2 else None)
    routed: list[Routed] = []
    x = torch.randn(2, 7, 16)
    found = model(x, routed=routed)
    assert [int(r.chosen.sum()) for r in routed] == [28, 28]
    torch.testing.assert_close(found, model(x))
    (found.square().sum() + sum(balance_loss(r) for r in routed)).backward()
    assert all(p.grad is not None for name, p in model.named_parameters() if "gate" in name)
