"""Layers of Mixtral computed here are transformers' own; documents, balance and capacity reach them through a batch."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from benchmarks import exactness
from benchmarks.layouts import source
from torch import Tensor
from transformers import MixtralConfig, MixtralForCausalLM

from plait.models.composition import Mixture
from plait.models.mixtral import mixtures, take_experts
from plait.models.multimodal import MultimodalLM
from plait.objectives.language import NextToken
from plait.training.computed import computed
from plait.training.gradient import Sums, accumulate
from plait.training.settings import Settings


def decoder(**more: Any) -> MixtralForCausalLM:
    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2}
    counts = {"num_key_value_heads": 1, "num_local_experts": 4, "num_experts_per_tok": 2, "vocab_size": 50}
    return MixtralForCausalLM(MixtralConfig(**sizes, **counts, **more)).eval()


@pytest.mark.parametrize("activation", ["silu", "gelu"])
def test_a_decoder_with_our_layers_scores_and_is_saved_as_before(activation: str, tmp_path: Path) -> None:
    theirs, ours = decoder(hidden_act=activation), decoder(hidden_act=activation)
    names = [name for name, _ in ours.named_parameters()]
    assert take_experts(ours) == 2
    assert [name for name, _ in ours.named_parameters()] == names
    ids = torch.randint(50, (2, 9), generator=torch.Generator().manual_seed(0))
    with torch.inference_mode():
        wanted = theirs(ids).logits
        torch.testing.assert_close(ours(ids).logits, wanted, atol=1e-5, rtol=1e-4)
    ours.save_pretrained(tmp_path)
    read = MixtralForCausalLM.from_pretrained(tmp_path).eval()
    with torch.inference_mode():
        torch.testing.assert_close(read(ids).logits, wanted)


def test_what_is_computed_in_another_way_is_left_as_it_is() -> None:
    noisy = decoder(router_jitter_noise=0.1)
    assert take_experts(noisy) == 0
    assert mixtures(noisy) == []


TIGHT = Mixture(experts=4, top_k=2, capacity=0.75, balance=0.5)


def step(*, pieces: int = 1, packed: bool = True, recompute: str = "none") -> tuple[Sums, Mapping[str, Tensor]]:
    """A step's sums, and the gradient of all that learns."""
    model = exactness.model(by_document=True, mixture=TIGHT)
    model.decoder.requires_grad_(requires_grad=True)
    objective = NextToken(choices=3 * TIGHT.top_k)
    settings = Settings(steps=1, compute=exactness.Compute(device="cpu", dtype="float32", threads=1, why=()))
    weights = {"balance": TIGHT.balance, "dropped": 0.0}
    with computed(model, Settings(**{**vars_of(settings), "recompute": recompute}), events=exactness.Events()):
        sums = accumulate(model, objective, source(pieces=pieces, packed=packed).step_batches(0), weights=weights)
    return sums, {name: weight.grad for name, weight in model.named_parameters() if weight.grad is not None}


def vars_of(settings: Settings) -> dict[str, Any]:
    return {name: getattr(settings, name) for name in ("steps", "compute")}


@pytest.mark.parametrize(
    "how", [{"pieces": 3}, {"packed": False}, {"packed": False, "pieces": 2}, {"pieces": 2, "recompute": "full"}]
)
def test_balance_and_capacity_do_not_depend_on_how_a_batch_is_cut(how: dict[str, Any]) -> None:
    (whole, wanted), (cut, found) = step(), step(**how)
    assert cut.counts == whole.counts
    assert cut.counts["balance"] == 6
    for name, term in whole.terms.items():
        assert abs(cut.terms[name] - term) < 1e-12, name
    assert 0 < whole.terms["dropped"] < 1
    assert whole.terms["balance"] >= 3 * TIGHT.top_k * 0.9
    assert found.keys() == wanted.keys()
    for name, gradient in wanted.items():
        torch.testing.assert_close(found[name], gradient, atol=1e-12, rtol=1e-8)


def test_the_weight_of_balance_is_that_of_its_gradient() -> None:
    """And what is dropped has none."""
    model = exactness.model(by_document=True, mixture=TIGHT)
    gates = [layer.gate.weight.requires_grad_() for layer in mixtures(model)]
    (batch,) = source().step_batches(0)
    sums = NextToken(choices=6)(model, batch)
    loss = sums["next_token"] / batch.predicting.sum() + 0.5 * sums["balance"] / 6
    wanted = torch.autograd.grad(loss, gates)
    accumulate(model, NextToken(choices=6), [batch], weights={"balance": 0.5, "dropped": 0.0})
    for gate, gradient in zip(gates, wanted, strict=True):
        torch.testing.assert_close(gate.grad, gradient)


def test_a_model_without_experts_says_so() -> None:
    model: MultimodalLM = exactness.model(by_document=True)
    with pytest.raises(TypeError, match="choices of experts are counted"):
        NextToken(choices=4)(model, source().step_batches(0)[0])
