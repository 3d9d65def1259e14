"""Layer-wise decay: the depth of every weight, read from the model, and the rates that follow."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from plait.models.specs import Swin, ViT
from plait.training.optim import AdamW, Rates
from plait.training.roles import Roles, layers_above

SIZES = {"hidden_size": 8, "num_hidden_layers": 3, "num_attention_heads": 2, "intermediate_size": 16}


def llama() -> nn.Module:
    from transformers import LlamaConfig, LlamaForCausalLM

    return LlamaForCausalLM(LlamaConfig(vocab_size=32, tie_word_embeddings=False, **SIZES))


def rates(model: nn.Module, given: Rates) -> dict[str, float]:
    optimizer = AdamW().build(dict(model.named_parameters()), Roles.of(model), rates=given)
    return {name: group["peak_lr"] for group in optimizer.param_groups for name in group["param_names"]}


@pytest.mark.row("S3-27")
def test_a_decoders_rates_are_lr_times_decay_to_the_layers_above():
    found = rates(llama(), Rates(lr=1e-3, layer_decay=0.5))
    assert len(found) == 3 + 3 * 9
    for name, rate in found.items():
        above = 4 if "embed_tokens" in name else 3 - int(name.split(".")[2]) if ".layers." in name else 0
        assert rate == 1e-3 * 0.5**above, name


@pytest.mark.row("S3-27")
@pytest.mark.parametrize("kind", ["bert", "vit", "clip", "gpt2"])
def test_other_families_of_transformers(kind):
    import transformers as tf

    model = {
        "bert": lambda: tf.BertForMaskedLM(tf.BertConfig(vocab_size=32, **SIZES)),
        "vit": lambda: tf.ViTForImageClassification(tf.ViTConfig(image_size=16, patch_size=8, **SIZES)),
        "clip": lambda: tf.CLIPVisionModel(tf.CLIPVisionConfig(image_size=16, patch_size=8, **SIZES)),
        "gpt2": lambda: tf.GPT2LMHeadModel(tf.GPT2Config(vocab_size=32, n_embd=8, n_layer=3, n_head=2)),
    }[kind]()
    above = layers_above(model)
    for name, _ in model.named_parameters():
        layer = next((int(part) for part in name.split(".") if part.isdigit()), None)
        first = "embeddings." in name or "wte" in name or "wpe" in name or "pre_layrnorm" in name
        assert above.get(name, 0) == (3 - layer if layer is not None else 4 if first else 0), name


@pytest.mark.row("S3-27")
def test_towers_of_our_own():
    from plait.models.build import build_encoder

    vit = build_encoder(ViT(size=16, patch=8, d=16, depth=3, heads=2))
    above = layers_above(vit)
    for name, _ in vit.named_parameters():
        if ".blocks." in f".{name}":
            assert above[name] == 3 - int(name.split("blocks.")[1].split(".")[0]), name
    assert {above[name] for name in above if "blocks." not in name} == {4}
    assert "norm.weight" not in above or above["norm.weight"] == 0


def test_stages_are_counted_through():
    from plait.models.build import build_encoder

    swin = build_encoder(Swin(size=32, patch=4, d=8, depths=(2, 3), heads=(1, 2), window=4))
    found = {name: count for name, count in layers_above(swin).items() if "blocks." in name}
    by_block = {tuple(int(p) for p in name.split(".") if p.isdigit())[:2]: count for name, count in found.items()}
    assert by_block == {(0, 0): 5, (0, 1): 4, (1, 0): 3, (1, 1): 2, (1, 2): 1}


def test_two_stacks_count_apart_and_what_is_in_none_is_at_the_top():
    class Both(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.decoder = llama()
            self.connector = nn.Sequential(nn.Linear(8, 8), nn.GELU(), nn.Linear(8, 8))
            self.tower = nn.Module()
            self.tower.stem = nn.Linear(3, 8)
            self.tower.blocks = nn.ModuleList(nn.Sequential(nn.Linear(8, 8), nn.GELU()) for _ in range(2))

    above = layers_above(Both())
    assert above["decoder.model.embed_tokens.weight"] == 4
    assert above["tower.stem.weight"] == 3
    assert above["tower.blocks.0.0.weight"] == 2
    assert not any(name.startswith(("connector", "decoder.lm_head", "decoder.model.norm")) for name in above)


def test_a_head_of_single_operations_is_no_stack():
    class Head(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layers = nn.Sequential(nn.Linear(4, 4), nn.GELU(), nn.Linear(4, 4))

    assert layers_above(Head()) == {}


def test_parts_and_layers_multiply_and_one_changes_nothing():
    model = llama()
    found = rates(model, Rates(lr=1e-3, parts={"model.layers.0": 1e-2}, layer_decay=0.5))
    assert found["model.layers.0.mlp.up_proj.weight"] == 1e-2 * 0.5**3
    assert set(rates(model, Rates(lr=1e-3)).values()) == {1e-3}
    assert len(AdamW().groups(dict(model.named_parameters()), Roles.of(model), rates=Rates())) == 2


def test_embeddings_are_tables_and_heads_over_the_vocabulary():
    assert Roles.of(llama()).embeddings == {"model.embed_tokens.weight", "lm_head.weight"}
    assert Roles.of(nn.Embedding(3, 4)).embeddings == {"weight"}


@pytest.mark.row("S3-27")
def test_an_adapter_learns_at_its_layers_rate():
    from plait.adapters.lora import Lora, attach

    model = llama().requires_grad_(requires_grad=False)
    attach(model, Lora(rank=2, alpha=4.0, targets=("q_proj",)))
    weights = {name: weight for name, weight in model.named_parameters() if weight.requires_grad}
    groups = AdamW().groups(weights, Roles.of(model), rates=Rates(lr=1.0, layer_decay=0.5))
    found = {name: group["peak_lr"] for group in groups for name, _ in group["params"]}
    assert len(found) == 6
    assert {name.split("layers.")[1][0]: rate for name, rate in found.items()} == {"0": 0.125, "1": 0.25, "2": 0.5}
    assert torch.tensor(list(found.values())).sum() == 2 * 0.875
