"""The FLOP formulas equal torch's own counter on a real (tiny, random) Hugging Face decoder."""

from __future__ import annotations

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode
from transformers import LlamaConfig, LlamaForCausalLM, MixtralConfig, MixtralForCausalLM

from plait.models.recompute import Recompute, recomputed
from plait.training.cost import DecoderShape, Lora, decoder_flops, generate_flops

ROWS, LENGTH = 3, 24
TOLERANCE = 0.002
"""Worst case here 0.1 %: the counter also sees the rotary angles, an outer product written as a matrix product."""


def tiny(**changes: object) -> LlamaForCausalLM:
    sizes: dict[str, object] = {
        "vocab_size": 160,
        "hidden_size": 64,
        "intermediate_size": 176,
        "num_hidden_layers": 3,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "tie_word_embeddings": True,
        "attn_implementation": "eager",  # the counter has no formula for CPU flash attention
    }
    torch.manual_seed(0)
    return LlamaForCausalLM(LlamaConfig(**(sizes | changes)))


def counted(model: torch.nn.Module, *, backward: bool, inputs: dict[str, torch.Tensor]) -> float:
    with FlopCounterMode(display=False) as counter:
        loss = model(**inputs, use_cache=False).logits.square().mean()
        if backward:
            loss.backward()
    return float(counter.get_total_flops())


def ids() -> torch.Tensor:
    return torch.arange(ROWS * LENGTH).reshape(ROWS, LENGTH) % 160


@pytest.mark.parametrize(
    "changes",
    [{}, {"num_key_value_heads": 4}, {"num_key_value_heads": 1, "head_dim": 32}, {"tie_word_embeddings": False}],
    ids=["grouped", "multi-head", "multi-query-wide", "untied"],
)
def test_forward_equals_the_counter(changes: dict[str, object]) -> None:
    model = tiny(**changes)
    shape = DecoderShape.from_config(model.config)
    assert shape.params == sum(p.numel() for p in model.parameters())
    with torch.no_grad():
        found = counted(model, backward=False, inputs={"input_ids": ids()})
    assert decoder_flops(shape, rows=ROWS, length=LENGTH, gradients="none") == pytest.approx(found, rel=TOLERANCE)


@pytest.mark.row("S4-61")
def test_everything_trained_costs_six_n_d() -> None:
    model = tiny()
    found = counted(model, backward=True, inputs={"input_ids": ids()})
    expected = decoder_flops(DecoderShape.from_config(model.config), rows=ROWS, length=LENGTH, gradients="full")
    assert expected == pytest.approx(found, rel=TOLERANCE)


def test_frozen_with_gradient_to_the_inputs_costs_four_n_d() -> None:
    model = tiny().requires_grad_(False)
    embeds = torch.randn(ROWS, LENGTH, 64, requires_grad=True)
    found = counted(model, backward=True, inputs={"inputs_embeds": embeds})
    assert embeds.grad is not None
    shape = DecoderShape.from_config(model.config)
    expected = decoder_flops(shape, rows=ROWS, length=LENGTH, gradients="through")
    assert expected == pytest.approx(found, rel=TOLERANCE)
    assert expected < 0.75 * decoder_flops(shape, rows=ROWS, length=LENGTH, gradients="full")


@pytest.mark.parametrize("how", ["full", "selective"])
@pytest.mark.parametrize("trained", [True, False])
def test_recomputation_costs_a_forward_pass_of_the_blocks_or_nothing(how: Recompute, trained: bool) -> None:
    model = tiny().requires_grad_(trained)
    embeds = torch.randn(ROWS, LENGTH, 64, requires_grad=True)
    with recomputed(model, how):
        found = counted(model, backward=True, inputs={"inputs_embeds": embeds})
    shape = DecoderShape.from_config(model.config)
    expected = decoder_flops(shape, rows=ROWS, length=LENGTH, gradients="full" if trained else "through", recompute=how)
    assert expected == pytest.approx(found, rel=TOLERANCE)


# peft 0.21 reads a property that transformers 5.23 calls deprecated.
@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")
def test_adapters_add_six_times_their_weights() -> None:
    import peft

    lora = Lora(rank=8, targets=("q_proj", "v_proj", "o_proj", "down_proj"))
    base = tiny()
    shape = DecoderShape.from_config(base.config)
    model = peft.get_peft_model(base, peft.LoraConfig(r=lora.rank, target_modules=list(lora.targets)))
    assert lora.params(shape) == sum(p.numel() for p in model.parameters() if p.requires_grad)
    embeds = torch.randn(ROWS, LENGTH, 64, requires_grad=True)
    found = counted(model, backward=True, inputs={"inputs_embeds": embeds})
    expected = decoder_flops(shape, rows=ROWS, length=LENGTH, gradients="through", lora=lora)
    assert expected == pytest.approx(found, rel=TOLERANCE)


def test_logits_at_a_few_positions_cost_only_those() -> None:
    model = tiny()
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        model(input_ids=ids(), use_cache=False, logits_to_keep=2)
    expected = decoder_flops(
        DecoderShape.from_config(model.config), rows=ROWS, length=LENGTH, gradients="none", head_positions=2 * ROWS
    )
    assert expected == pytest.approx(counter.get_total_flops(), rel=TOLERANCE)


def test_greedy_decoding_with_a_cache() -> None:
    model = tiny().eval()
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        made = model.generate(
            ids(),
            attention_mask=torch.ones_like(ids()),
            do_sample=False,
            max_new_tokens=9,
            min_new_tokens=9,
            pad_token_id=0,
        )
    assert made.shape == (ROWS, LENGTH + 9)
    expected = generate_flops(DecoderShape.from_config(model.config), rows=ROWS, prompt=LENGTH, new=9)
    assert expected == pytest.approx(counter.get_total_flops(), rel=TOLERANCE)


def test_a_decoder_with_experts_counts_all_of_them_and_computes_some() -> None:
    config = MixtralConfig(
        vocab_size=50,
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        num_local_experts=5,
        num_experts_per_tok=2,
    )
    with torch.device("meta"):
        weights = sum(weight.numel() for weight in MixtralForCausalLM(config).parameters())
    shape = DecoderShape.from_config(config)
    assert shape.params == weights
    idle = 2 * 3 * 3 * 16 * 24
    assert shape.linear_params == weights - idle - 2 * 50 * 16 - 5 * 16
