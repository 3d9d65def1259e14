"""Matrices divided between processes compute what the whole ones do, with as few sums as there can be."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from peft import LoraConfig, inject_adapter_in_model
from tests.rank_script import cases_of
from torch import nn
from torch.distributed.device_mesh import DeviceMesh
from transformers import (
    ApertusConfig,
    ApertusForCausalLM,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    MixtralConfig,
    MixtralForCausalLM,
)

from plait.core.errors import ConfigError
from plait.training.parallel.tensor import divide
from plait.training.trainer import Parallel, Trainer

SCRIPT = Path(__file__).with_name("tensor_ranks.py")
SMALL: dict[str, Any] = {"hidden_size": 16, "num_hidden_layers": 1, "vocab_size": 8, "intermediate_size": 16}


@pytest.fixture(scope="module")
def cases() -> dict[str, Any]:
    """What the processes of all cases say."""
    return cases_of(SCRIPT)


@pytest.mark.row("S2-29")
def test_families_give_the_losses_and_gradients_of_one_process(cases: dict[str, Any]) -> None:
    found = cases["families"]
    for name, ranks in found.items():
        for loss, gradient, norm, held in ranks:
            assert loss <= 1e-12, name
            assert gradient <= (1e-5 if name.startswith("Gemma") else 1e-12), name  # its norms are in float32
            assert norm <= 1e-12, name
            assert held <= (0.6 if name.endswith("2") else 0.35), name
    assert len(found) == 11


@pytest.mark.row("S2-29")
def test_a_block_sums_twice_forward_and_twice_backward(cases: dict[str, Any]) -> None:
    found = cases["count"]
    numbers = 2 * 9 * 16  # of hidden states
    for layers, ranks in found.items():
        for forward, backward in ranks:
            assert forward == [numbers] * (1 + 2 * int(layers))  # the embeddings' first
            assert backward == [numbers] * (2 * int(layers))


@pytest.mark.row("S2-29")
def test_a_divided_vocabulary_gives_the_same_logprobs_and_gradients(cases: dict[str, Any]) -> None:
    found = cases["words"]
    assert all(apart <= 1e-14 for ranks in found.values() for apart in ranks), found
    assert len(found) == 4


@pytest.mark.row("S2-29")
def test_norms_of_heads_have_the_gradient_of_all_heads_also_in_pieces() -> None:
    apart = cases_of(SCRIPT, "in_pieces")["in_pieces"]["apart"]
    assert all(one <= 1e-12 for one in apart), apart
    assert len(apart) == 4


class Ranks(DeviceMesh):
    """So many processes, of which none is there."""

    def __init__(self, count: int) -> None:
        self.count = count

    def size(self, mesh_dim: int | None = None) -> int:
        return self.count


@pytest.mark.parametrize(
    ("model", "said"),
    [
        (lambda: nn.Linear(2, 2), "Linear has no language model whose family says how it is cut"),
        (
            lambda: GPT2LMHeadModel(GPT2Config(n_embd=16, n_layer=1, n_head=2, vocab_size=8)),
            "GPT2LMHeadModel has no language model whose family says how it is cut",
        ),
        (
            lambda: LlamaForCausalLM(LlamaConfig(**SMALL, num_attention_heads=4, num_key_value_heads=2)),
            "num_key_value_heads is 2, which cannot be dealt out evenly to 4 processes",
        ),
        (
            lambda: MixtralForCausalLM(MixtralConfig(**SMALL, num_attention_heads=4, num_key_value_heads=4)),
            "MixtralModel has layers.0.mlp.experts cut 'moe_tp_experts', which is not done here",
        ),
        (
            lambda: inject_adapter_in_model(
                LoraConfig(target_modules=["q_proj"], use_dora=True),
                LlamaForCausalLM(LlamaConfig(**SMALL, num_attention_heads=4, num_key_value_heads=4)),
            ),
            "an adapter of another kind than plain LoRA at a Linear",
        ),
        (
            lambda: ApertusForCausalLM(ApertusConfig(**SMALL, num_attention_heads=4, num_key_value_heads=4)),
            "ApertusModel has at layers.0.mlp.act_fn a XIELUActivation with weights",
        ),
    ],
)
def test_what_cannot_be_divided_is_refused_before_anything_is_cut(model: Any, said: str) -> None:
    built = model()
    before = [id(weight) for weight in built.parameters()]
    with pytest.raises(ConfigError, match=said) as error:
        divide(built, Ranks(4))
    assert error.value.place == "trainer.parallel.tensor"
    assert [id(weight) for weight in built.parameters()] == before


def test_settings_that_need_whole_weights_are_refused() -> None:
    for other in ({"optimizer": {"kind": "muon"}}, {"compile": True}, {"async_save": True}):
        with pytest.raises(ValueError, match=r"take trainer\.parallel out"):
            Trainer.model_validate({"parallel": {"tensor": 2}, **other})


def test_processes_that_cannot_be_divided_so_are_refused() -> None:
    with pytest.raises(ConfigError, match="6 processes cannot be divided into tensor 4") as error:
        Parallel(tensor=4).grid(0, 6)
    assert "start a multiple of 4 processes" in error.value.remedy
