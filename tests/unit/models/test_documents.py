"""Attention by document: every token is found once, and values and gradients are those of the block-diagonal mask."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM

from plait.models import documents
from plait.models.attention import positions
from plait.models.documents import NAME, Documents, documents_for, read_by_document
from plait.models.packing import packed_masks

COMMON: dict[str, Any] = {
    "vocab_size": 50,
    "hidden_size": 24,
    "intermediate_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": 64,
}
GROUPED = COMMON | {"num_key_value_heads": 2}
FAMILIES: dict[str, dict[str, Any]] = {
    "llama": GROUPED,
    "mistral": GROUPED | {"sliding_window": None},
    "qwen2": GROUPED,
    "qwen3": GROUPED | {"head_dim": 6},
    "gpt2": {"vocab_size": 50, "n_embd": 24, "n_layer": 2, "n_head": 4, "n_positions": 64}
    | dict.fromkeys(("attn_pdrop", "embd_pdrop", "resid_pdrop"), 0.0),
    "gpt_neox": COMMON,
    "opt": {"vocab_size": 50, "hidden_size": 24, "ffn_dim": 32, "num_hidden_layers": 2, "num_attention_heads": 4}
    | {"max_position_embeddings": 64, "word_embed_proj_dim": 24, "dropout": 0.0},
    "deepseek_v3": COMMON  # values of another width than keys
    | {"num_key_value_heads": 4, "q_lora_rank": 8, "kv_lora_rank": 8, "qk_rope_head_dim": 4, "qk_nope_head_dim": 4}
    | {"v_head_dim": 6, "n_routed_experts": 2, "first_k_dense_replace": 2, "moe_intermediate_size": 8},
    "gemma2": GROUPED | {"head_dim": 6},  # caps its scores
    "doge": GROUPED | {"keep_window_size": 4},  # changes its mask in each layer
}
OWN = ("gemma2", "doge")
"""Families that stay with their own attention."""
SEGMENTS = torch.tensor([[1] * 5 + [2] * 9 + [0] * 2, [1] * 16, [1, 2, 3] + [4] * 4 + [0] * 9, [0] * 16])


@st.composite
def packed(draw: st.DrawFn) -> Tensor:
    rows = [draw(st.lists(st.integers(1, 9), max_size=4)) for _ in range(draw(st.integers(1, 4)))]
    width = max(1, *(sum(row) for row in rows)) + draw(st.integers(0, 3))
    found = torch.zeros(len(rows), width, dtype=torch.long)
    for number, row in enumerate(rows):
        ids = [segment for segment, length in enumerate(row, 1) for _ in range(length)]
        found[number, : len(ids)] = torch.tensor(ids, dtype=torch.long)
    return found


@settings(max_examples=60, deadline=None)
@given(segment_ids=packed())
def test_every_token_is_in_one_document_in_order(segment_ids: Tensor) -> None:
    found = Documents.of(segment_ids)
    width = segment_ids.shape[1]
    documents = [
        places[keep].tolist()
        for batch, real in zip(found.places, found.real, strict=True)
        for places, keep in zip(batch, real, strict=True)
    ]
    assert (
        sorted(place for document in documents for place in document) == segment_ids.flatten().nonzero()[:, 0].tolist()
    )
    for document in documents:
        assert document == list(range(document[0], document[0] + len(document)))
        assert len({(place // width, int(segment_ids.flatten()[place])) for place in document}) == 1
    assert found.longest == max(map(len, documents), default=0)
    computed = sum(batch.shape[0] * batch.shape[1] ** 2 for batch in found.places)
    assert computed <= sum(len(document) ** 2 for document in documents) / 0.75**2  # little is computed in vain


def decoder(family: str) -> Any:
    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config(AutoConfig.for_model(family, **FAMILIES[family])).double().train()


def run(model: Any, *, told: bool = False) -> tuple[Tensor, dict[str, Tensor]]:
    """Hidden states of the tokens, and gradients of a random sum of them; the model may be told the documents."""
    model.zero_grad()
    masks = packed_masks(model, SEGMENTS, torch.float64)
    ids = torch.randint(50, SEGMENTS.shape, generator=torch.Generator().manual_seed(1))
    hidden = model.base_model(
        inputs_embeds=model.get_input_embeddings()(ids),
        attention_mask=masks,
        position_ids=positions(SEGMENTS),
        use_cache=False,
        **(documents_for(model, SEGMENTS, masks) if told else {}),
    ).last_hidden_state[SEGMENTS != 0]
    (
        hidden * torch.randn(hidden.shape, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    ).sum().backward()
    return hidden.detach(), {name: w.grad.clone() for name, w in model.named_parameters() if w.grad is not None}


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """A layer that attends by document adds an entry."""
    found: list[int] = []
    plain = documents.attend_documents

    def counted(*args: Any, **kwargs: Any) -> Tensor:
        found.append(1)
        return plain(*args, **kwargs)

    monkeypatch.setattr(documents, "attend_documents", counted)
    return found


@pytest.mark.parametrize("family", FAMILIES)
def test_values_and_gradients_are_those_of_a_mask(family: str, calls: list[int]) -> None:
    dense, by_document = decoder(family), decoder(family)
    # Eager attention of transformers rounds its softmax to float32 even here.
    dense.set_attn_implementation("eager" if family in OWN else "sdpa")
    assert read_by_document(by_document)
    wanted, gradients = run(dense)
    found, same = run(by_document, told=True)
    assert len(calls) == (0 if family in OWN else 2)  # in both layers, or in none
    assert torch.allclose(found, wanted, rtol=0, atol=1e-12)
    assert gradients.keys() == same.keys()
    for name, gradient in gradients.items():
        assert torch.allclose(same[name], gradient, rtol=0, atol=1e-11), name
    dense.set_attn_implementation("eager")
    assert run(by_document)[0].equal(run(dense)[0])  # without documents: its own attention


def test_no_scores_between_documents_are_kept() -> None:
    """Live bytes of backward: with a mask each row keeps t x t scores a head, by document each keeps its own square."""

    def kept(model: Any, *, told: bool) -> int:
        sizes: dict[int, int] = {}

        def pack(tensor: Tensor) -> Tensor:
            if tensor.ndim >= 3 and tensor.shape[-1] == tensor.shape[-2] and tensor.shape[-1] > 6:
                sizes[tensor.untyped_storage().data_ptr()] = tensor.numel()
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            run(model, told=told)
        return sum(sizes.values())

    model = decoder("gpt2")
    read_by_document(model)
    assert kept(model, told=True) < kept(model, told=False) / 2


def test_a_window_shorter_than_a_document_keeps_the_mask() -> None:
    torch.manual_seed(0)
    config = AutoConfig.for_model("mistral", **GROUPED | {"sliding_window": 4})
    model = AutoModelForCausalLM.from_config(config).double().train()
    model.set_attn_implementation("eager")
    wanted, _ = run(model)
    read_by_document(model)
    assert run(model, told=True)[0].equal(wanted)


def test_a_family_that_attends_in_its_own_way_stays_as_it_is() -> None:
    config = AutoConfig.for_model("bloom", vocab_size=50, hidden_size=24, n_layer=1, n_head=4)
    model = AutoModelForCausalLM.from_config(config)
    assert not read_by_document(model)
    assert model.config._attn_implementation == "eager"
    assert documents_for(model, SEGMENTS, packed_masks(model, SEGMENTS, torch.float32)) == {}
    assert NAME not in model.config.to_json_string()


def test_what_is_saved_names_no_attention_of_ours(tmp_path: Any) -> None:
    model = decoder("llama")
    read_by_document(model)
    model.save_pretrained(tmp_path)
    assert NAME not in (tmp_path / "config.json").read_text(encoding="utf-8")
