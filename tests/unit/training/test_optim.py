from __future__ import annotations

import numpy as np
import pytest
import torch
from pydantic import TypeAdapter
from torch import nn

from plait.core.errors import ConfigError
from plait.training.optim import SGD, AdamW, Optimizer, Rates
from plait.training.roles import Roles


class Model(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.vision = nn.Sequential(nn.Conv2d(3, 4, 2), nn.BatchNorm2d(4))
        self.connector = nn.Linear(4, 4)
        self.connector2 = nn.Linear(4, 4, bias=False)
        self.decoder = nn.ModuleDict({"embed": nn.Embedding(7, 4), "norm": nn.LayerNorm((2, 4))})
        self.temperature = nn.Parameter(torch.tensor(2.0))


def named(model: nn.Module) -> dict[str, nn.Parameter]:
    return {name: weight for name, weight in model.named_parameters() if weight.requires_grad}


def by_name(optimizer: torch.optim.Optimizer, key: str) -> dict[str, object]:
    return {name: group[key] for group in optimizer.param_groups for name in group["param_names"]}


def test_only_matrices_and_embeddings_decay():
    model = Model()
    decay = by_name(AdamW(weight_decay=0.1).build(named(model), Roles.of(model), rates=Rates()), "weight_decay")
    assert set(decay) == set(named(model))  # each weight in exactly one group
    assert {n for n, d in decay.items() if d} == {
        "vision.0.weight",
        "connector.weight",
        "connector2.weight",
        "decoder.embed.weight",
    }


@pytest.mark.parametrize("kind", ["llama", "bert"])
def test_decay_split_is_that_of_the_transformers_trainer(kind):
    from transformers import BertConfig, BertModel, LlamaConfig, LlamaForCausalLM
    from transformers.trainer_pt_utils import get_parameter_names

    sizes = {
        "vocab_size": 32,
        "hidden_size": 8,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "intermediate_size": 16,
    }
    model = LlamaForCausalLM(LlamaConfig(**sizes)) if kind == "llama" else BertModel(BertConfig(**sizes))
    decay = by_name(AdamW(weight_decay=0.1).build(named(model), Roles.of(model), rates=Rates()), "weight_decay")
    # As transformers 5.23 Trainer.get_decay_parameter_names does.
    theirs = get_parameter_names(
        model, [nn.LayerNorm], [r"bias", r"layernorm", r"rmsnorm", r"(?:^|\.)norm(?:$|\.)", r"_norm(?:$|\.)"]
    )
    assert {n for n, d in decay.items() if d} == set(theirs)


@pytest.mark.row("S4-62")
def test_adamw_takes_the_steps_of_its_paper():
    generator = np.random.default_rng(0)
    start, grads = generator.normal(size=(3, 2)), generator.normal(size=(6, 3, 2))
    weight = nn.Parameter(torch.tensor(start))
    spec = AdamW(weight_decay=0.2, betas=(0.8, 0.9), eps=1e-6)
    optimizer = spec.build({"w": weight}, rates=Rates(lr=0.1))
    x, m, v = start.copy(), np.zeros_like(start), np.zeros_like(start)
    for t, grad in enumerate(grads, 1):
        weight.grad = torch.tensor(grad)
        optimizer.step()
        m, v = 0.8 * m + 0.2 * grad, 0.9 * v + 0.1 * grad**2
        x = x - 0.1 * (m / (1 - 0.8**t) / (np.sqrt(v / (1 - 0.9**t)) + 1e-6) + 0.2 * x)
        np.testing.assert_allclose(weight.detach().numpy(), x, rtol=1e-12)


def test_sgd_is_torchs():
    ours, theirs = nn.Parameter(torch.ones(2, 2)), nn.Parameter(torch.ones(2, 2))
    mine = SGD(momentum=0.9).build({"w": ours}, rates=Rates(lr=0.1))
    reference = torch.optim.SGD([theirs], lr=0.1, momentum=0.9)
    for _ in range(3):
        ours.grad, theirs.grad = ours.detach() * 0.3, theirs.detach() * 0.3
        mine.step()
        reference.step()
    assert torch.equal(ours, theirs)


def test_rates_by_part_longest_prefix_wins_at_dots():
    model = Model()
    given = Rates(lr=1e-3, parts={"connector": 1e-2, "decoder": 1e-4, "decoder.norm": 0.0})
    rates = by_name(AdamW().build(named(model), Roles.of(model), rates=given), "peak_lr")
    assert rates["connector.weight"] == 1e-2
    assert rates["connector2.weight"] == 1e-3  # not under "connector"
    assert rates["decoder.embed.weight"] == 1e-4
    assert rates["decoder.norm.weight"] == 0.0
    assert rates["temperature"] == 1e-3


def test_groups_do_not_depend_on_hashing_or_order():
    model = Model()
    forward = AdamW().groups(named(model), rates=Rates(parts={"decoder": 1e-4, "connector": 1e-2}))
    again = AdamW().groups(named(model), rates=Rates(parts={"connector": 1e-2, "decoder": 1e-4}))
    assert [[n for n, _ in g["params"]] for g in forward] == [[n for n, _ in g["params"]] for g in again]


@pytest.mark.parametrize(("field", "value"), [("parts", {"conector": 1e-2}), ("no_decay", ("conector",))])
def test_a_prefix_that_matches_nothing_is_named(field, value):
    with pytest.raises(ConfigError, match="'conector' matches none of 11 trainable weights") as error:
        AdamW().build(named(Model()), rates=Rates(**{field: value}))
    assert "connector" in error.value.remedy
    assert error.value.place == f"rates.{field}"


def test_nothing_to_train_is_an_error():
    with pytest.raises(ConfigError, match="no weight is trainable"):
        AdamW().build({}, rates=Rates())


def test_chosen_by_kind():
    chosen = TypeAdapter(Optimizer).validate_python({"kind": "sgd", "momentum": 0.5})
    assert chosen == SGD(momentum=0.5)


@pytest.mark.parametrize(("field", "value"), [("lr", 0.0), ("lr", float("nan")), ("parts", {"connector": -1.0})])
def test_a_rate_that_cannot_be_is_refused(field, value):
    with pytest.raises(ConfigError) as error:
        Rates(**{field: value})
    assert error.value.place == field
