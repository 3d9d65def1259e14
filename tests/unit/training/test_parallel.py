"""What of holding a model in pieces needs no second process; the rest is in ``test_fit_ranks.py``."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from transformers import OPTConfig, OPTForCausalLM

from plait.core import mesh
from plait.core.errors import ConfigError
from plait.core.grid import Grid
from plait.objectives.language import NextToken
from plait.training.norm import clip
from plait.training.parallel.layout import Whole
from plait.training.parallel.twin import Sharded, lay_out
from plait.training.trainer import Parallel, Trainer


def opt(*, layerdrop: float) -> nn.Module:
    sizes = {"vocab_size": 16, "hidden_size": 8, "word_embed_proj_dim": 8, "ffn_dim": 8, "num_attention_heads": 2}
    return OPTForCausalLM(OPTConfig(**sizes, num_hidden_layers=1, max_position_embeddings=8, layerdrop=layerdrop))


def test_one_process_holds_the_whole_model_whatever_is_set() -> None:
    model = opt(layerdrop=0.0)
    found = lay_out(model, NextToken(), Parallel(zero=3), device="cpu")
    assert type(found) is Whole
    assert found.model is model


def test_blocks_left_out_by_chance_are_refused_by_name() -> None:
    with pytest.raises(ConfigError, match="layer_drop leaves blocks out by chance") as error:
        Sharded(opt(layerdrop=0.5), NextToken(), Parallel(zero=3), grid=Grid(), device="cpu")
    assert "layerdrop in a decoder's config.json" in error.value.remedy


@pytest.mark.parametrize("kind", ["adafactor", "adamw-8bit", "muon"])
def test_optimizers_that_need_whole_weights_are_refused(kind: str) -> None:
    with pytest.raises(ValueError, match=f"optimizer.kind is {kind}, which cannot work on pieces"):
        Trainer.model_validate({"optimizer": {"kind": kind}, "parallel": {"zero": 1}})


@pytest.mark.parametrize("largest", [0.5, 1e9, None])
def test_clipping_is_torchs_bit_for_bit(largest: float | None) -> None:
    torch.manual_seed(0)
    weights = [nn.Parameter(torch.randn(3, 4)), nn.Parameter(torch.randn(5))]
    for weight in weights:
        weight.grad = torch.randn_like(weight)
    ours = [weight.grad.clone() for weight in weights if weight.grad is not None]
    norm = torch.nn.utils.clip_grad_norm_(weights, largest if largest is not None else torch.inf)
    assert clip({f"part{at}.weight": grad for at, grad in enumerate(ours)}, largest).total == float(norm)
    assert all(
        torch.equal(one, weight.grad) for one, weight in zip(ours, weights, strict=True) if weight.grad is not None
    )


def test_an_own_fault_about_a_connector_is_no_lost_process() -> None:
    assert not any(word in "size mismatch for connector.down.weight" for word in mesh._BROKEN)
