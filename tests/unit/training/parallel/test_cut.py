"""Which decoders can be cut into stages, what each stage keeps, and what is refused; without other processes."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
import transformers
from torch import nn

from plait.core.errors import ConfigError
from plait.models.connectors.projection import Mlp
from plait.models.multimodal import MultimodalLM
from plait.objectives.language import NextToken
from plait.training.parallel.cut import check, keep_only, owners, stages_of
from plait.training.settings import Settings
from plait.training.trainer import Parallel, Trainer

SIZES: dict[str, Any] = {
    "vocab_size": 20,
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 4,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "head_dim": 8,
    "pad_token_id": 0,
}


def model(kind: str, **more: Any) -> MultimodalLM:
    torch.manual_seed(0)
    config = transformers.AutoConfig.for_model(kind, **(SIZES | more))
    decoder = transformers.AutoModelForCausalLM.from_config(config)
    return MultimodalLM({}, {"image": Mlp(4, 8, 16)}, decoder, placeholder=20).train()


@pytest.mark.row("S2-30")
@pytest.mark.parametrize("kind", ["llama", "mistral", "qwen2", "qwen3", "gemma2", "gemma3_text", "smollm3"])
@pytest.mark.parametrize("tied", [True, False])
def test_each_weight_is_on_one_stage_but_a_tied_table_and_the_first_and_last_have_their_ends(
    kind: str, tied: bool
) -> None:
    whole = check(model(kind, tie_word_embeddings=tied), NextToken())
    parts = stages_of(whole, 3, (1, 2, 1))
    held = owners(whole, parts)
    weights = dict(whole.named_parameters())
    table = "decoder.model.embed_tokens.weight"
    assert held[table] == ((0, 2) if tied else (0,))
    assert all(len(stages) == 1 for name, stages in held.items() if name != table)
    assert held["decoder.model.norm.weight"] == (2,)
    assert {held[name] for name in weights if name.startswith("connectors")} == {(0,)}
    for name, stages in held.items():
        if name.startswith("decoder.model.layers."):
            assert stages == ((0, 1, 1, 2)[int(name.split(".")[3])],)
    for stage, part in enumerate(parts):
        twin = copy.deepcopy(whole, {id(weight): weight for weight in weights.values()})
        own = {name for name, stages in held.items() if stage in stages}
        keep_only(twin, part, {id(weights[name]) for name in own})
        assert dict(twin.named_parameters()).keys() == own


@pytest.mark.parametrize(
    ("kind", "more", "reason"),
    [
        ("mixtral", {"num_local_experts": 2}, "mixture of experts"),
        ("opt", {"ffn_dim": 8, "word_embed_proj_dim": 16}, "between embeddings and blocks"),
    ],
)
def test_decoders_whose_blocks_need_more_are_refused(kind: str, more: dict[str, Any], reason: str) -> None:
    with pytest.raises(ConfigError, match=reason):
        check(model(kind, **more), NextToken())


def test_blocks_that_take_more_than_hidden_states_are_refused_by_the_name_of_it() -> None:
    whole = model("llama")

    class Other(type(whole.decoder.model.layers[0])):  # as of Gemma 3n
        def forward(self, hidden_states: torch.Tensor, per_layer_input: Any = None, **kwargs: Any) -> torch.Tensor:
            return super().forward(hidden_states, **kwargs)

    whole.decoder.model.layers[1].__class__ = Other
    with pytest.raises(ConfigError, match="take per_layer_input, beside hidden states"):
        check(whole, NextToken())
    with pytest.raises(ConfigError, match="Linear cannot be cut"):
        check(nn.Linear(2, 2), NextToken())


@pytest.mark.parametrize(
    ("settings", "reason"),
    [
        ({"parallel": {"pipeline": 2, "zero": 2}}, "pipeline is 2 and zero is 2"),
        ({"parallel": {"pipeline": 2, "zero": 1, "offload": True}}, "pipeline and offload"),
        ({"parallel": {"pipeline": 2, "context": 2}}, "pipeline and context"),
        ({"parallel": {"pipeline": 2, "tensor": 2}, "optimizer": {"kind": "muon"}}, "cannot work on pieces"),
        ({"parallel": {"pipeline_blocks": [2, 2]}}, "pipeline is 1"),
        ({"parallel": {"pipeline": 2, "pipeline_blocks": [4]}}, "must be 2 numbers"),
        ({"parallel": {"pipeline": 2, "pipeline_blocks": [4, 0]}}, "must be 2 numbers"),
        ({"parallel": {"pipeline": 2}, "compile": True}, "compile is true"),
        ({"parallel": {"pipeline": 2}, "async_save": True}, "async_save is true"),
    ],
)
def test_settings_that_do_not_go_together_are_refused(settings: dict[str, Any], reason: str) -> None:
    with pytest.raises(ValueError, match=reason):
        Trainer.model_validate(settings)


def test_the_loop_refuses_them_too() -> None:
    from benchmarks.layouts import compute_in

    with pytest.raises(ConfigError, match="compile is true"):
        Settings(steps=1, compute=compute_in("float32"), parallel=Parallel(pipeline=2), compile=True)
