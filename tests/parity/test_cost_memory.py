"""The activation formula equals what autograd keeps, and the sum of all parts the RSS of a real training process."""

from __future__ import annotations

import dataclasses
import gc
import json
import subprocess
import sys
from pathlib import Path
from typing import Any, Literal

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from plait.models.documents import documents_for, read_by_document
from plait.models.packing import packed_masks
from plait.models.recompute import Recompute, recomputed
from plait.training.cost import DecoderShape, Lora, decoder_activations, head_bytes
from plait.training.peak import in_turn, peak_memory
from plait.training.plan import survey
from plait.training.precision import autocast, hold_masters

ROWS, LENGTH = 4, 20


def built(*, layers: int, dtype: str, attention: str, gradients: str, lora: Lora | None) -> torch.nn.Module:
    """As Plait trains: frozen weights in the working format, trained ones float32 under autocast."""
    torch.manual_seed(0)
    model: torch.nn.Module = LlamaForCausalLM(config(layers, "eager" if attention == "documents" else attention))
    if attention == "documents":
        assert read_by_document(model)
    if gradients == "through":
        model.requires_grad_(False).to(getattr(torch, dtype))
    if lora is not None:
        import peft

        model = peft.get_peft_model(model, peft.LoraConfig(r=lora.rank, target_modules=list(lora.targets)))  # type: ignore[arg-type]
        hold_masters(p for p in model.parameters() if p.requires_grad)
    return model


def asked(model: torch.nn.Module, embeds: torch.Tensor, dtype: str, attention: str) -> dict[str, Any]:
    """What the model is called with: padded rows, or rows of two documents."""
    common: dict[str, Any] = {"inputs_embeds": embeds, "use_cache": False, "logits_to_keep": 1}
    if attention == "documents":
        segments = torch.arange(1, 3).repeat_interleave(LENGTH // 2).repeat(ROWS, 1)
        masks = packed_masks(model, segments, getattr(torch, dtype))
        return common | {"attention_mask": masks} | documents_for(model, segments, masks)
    mask = torch.ones(ROWS, LENGTH, dtype=torch.long)
    mask[0, -3:] = 0  # real batches are padded; without padding Hugging Face drops the mask
    return common | {"attention_mask": mask}


def kept_for_backward(*, layers: int, dtype: str, attention: str, gradients: str, lora: Lora | None) -> int:
    """Bytes of distinct storages that autograd saves in a forward pass, weights themselves left out."""
    model = built(layers=layers, dtype=dtype, attention=attention, gradients=gradients, lora=lora)
    weights = {p.untyped_storage().data_ptr() for p in model.parameters()}
    kept: dict[int, torch.UntypedStorage] = {}  # holds them, so that no address is used twice

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in weights:
            kept[storage.data_ptr()] = storage
        return tensor

    embeds = torch.randn(ROWS, LENGTH, 96, requires_grad=True)
    if attention == "documents":  # as it comes from the connector
        embeds = embeds.to(next(model.parameters()).dtype)
    given = asked(model, embeds, dtype, attention)
    with autocast("cpu", dtype), torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        model(**given)
    return sum(storage.nbytes() for storage in kept.values())


def config(layers: int, attention: str) -> LlamaConfig:
    return LlamaConfig(
        vocab_size=64,
        hidden_size=96,
        intermediate_size=256,
        num_hidden_layers=layers,
        num_attention_heads=6,
        num_key_value_heads=2,
        attn_implementation=attention,
    )


LORAS = {
    "none": None,
    "q,v": Lora(rank=4, targets=("q_proj", "v_proj")),
    "all": Lora(rank=4, targets=("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")),
}


# peft 0.21 reads a property that transformers 5.23 calls deprecated.
@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")
@pytest.mark.row("S4-61")
@pytest.mark.row("S4-C09")
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("attention", ["eager", "sdpa", "documents"])
@pytest.mark.parametrize(
    ("gradients", "lora"), [("through", "none"), ("full", "none"), ("through", "q,v"), ("through", "all")]
)
def test_a_block_keeps_what_the_formula_says(dtype: str, attention: str, gradients: str, lora: str) -> None:
    adapters = LORAS[lora]
    found = [
        kept_for_backward(layers=n, dtype=dtype, attention=attention, gradients=gradients, lora=adapters)
        for n in (1, 3)
    ]
    shape = DecoderShape.from_config(config(2, attention))
    expected = decoder_activations(
        shape,
        rows=ROWS,
        length=LENGTH,
        dtype=dtype,
        gradients=gradients,
        attention=LENGTH // 2 if attention == "documents" else attention,
        lora=adapters,  # type: ignore[arg-type]
    )
    assert expected == pytest.approx(found[1] - found[0], rel=0.001)  # two blocks' worth


def alive_after_forward(
    *, layers: int, dtype: str, attention: str, gradients: str, lora: Lora | None, how: Recompute
) -> int:
    """Bytes given out by torch's allocator in a forward pass and not taken back; autograd does not see all that
    selective recomputation keeps."""
    model = built(layers=layers, dtype=dtype, attention=attention, gradients=gradients, lora=lora)
    embeds = torch.randn(ROWS, LENGTH, 96, dtype=next(model.parameters()).dtype, requires_grad=True)
    given = asked(model, embeds, dtype, attention)
    kept: list[object] = []

    def forward() -> None:
        with autocast("cpu", dtype):
            kept.append(model(**given))

    with recomputed(model, how):
        forward()
        gc.collect()  # what earlier tests left must not be given back now
        with torch.profiler.profile(profile_memory=True) as profile:
            forward()
    events = profile.profiler.kineto_results.events()  # pyright: ignore[reportOptionalMemberAccess]
    return sum(event.nbytes() for event in events if event.name() == "[memory]")


@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")
@pytest.mark.row("S4-61")
@pytest.mark.parametrize("how", ["full", "selective"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("attention", ["eager", "sdpa", "documents"])
@pytest.mark.parametrize(
    ("gradients", "lora"), [("through", "none"), ("full", "none"), ("through", "q,v"), ("through", "all")]
)
def test_a_recomputed_block_keeps_what_the_formula_says(
    how: Recompute, dtype: str, attention: str, gradients: str, lora: str
) -> None:
    kind: dict[str, Any] = {"dtype": dtype, "attention": attention, "gradients": gradients, "lora": LORAS[lora]}
    found = [alive_after_forward(layers=n, how=how, **kind) for n in (1, 3)]
    shape = DecoderShape.from_config(config(2, attention))
    kind["attention"] = LENGTH // 2 if attention == "documents" else attention
    several = [
        decoder_activations(dataclasses.replace(shape, layers=n), rows=ROWS, length=LENGTH, recompute=how, **kind)
        for n in (1, 3)
    ]
    assert several[1] - several[0] == pytest.approx(found[1] - found[0], rel=0.005)


TRAIN = """
import json, sys, torch
from plait.core import device
from transformers import LlamaConfig, LlamaForCausalLM
from plait.models.fused_head import token_logprobs
rows, length, head = json.loads(sys.argv[1])
torch.set_num_threads(1)
model = LlamaForCausalLM(LlamaConfig(
    vocab_size=8192, hidden_size=384, intermediate_size=1024, num_hidden_layers=12, num_attention_heads=6,
    num_key_value_heads=2, attn_implementation="eager"))
optimizer = torch.optim.AdamW(model.parameters())
ids = torch.arange(rows * length).reshape(rows, length)
for _ in range(2):
    hidden = model.model(input_ids=ids, use_cache=False).last_hidden_state.flatten(0, 1)
    if head == "full":
        torch.nn.functional.cross_entropy(model.lm_head(hidden).float(), ids.flatten()).backward()
    else:
        token_logprobs(model.lm_head, hidden, ids.flatten()).mean().neg().backward()
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)
print(json.dumps([device.peak_rss(), sum(p.numel() for p in model.parameters())]))
"""


@pytest.mark.row("S4-C09")
@pytest.mark.skipif(sys.platform != "linux", reason="HEAP is glibc's")
@pytest.mark.parametrize("head", ["full", "fused"])
def test_predicted_peak_is_near_the_measured_rss(head: Literal["full", "fused"], tmp_path: Path) -> None:
    """Two AdamW steps in a process of its own. Promised: 20 %. Seen: 5 to 8 % above."""
    rows, length = 8, 64
    command = [sys.executable, "-c", TRAIN, json.dumps([rows, length, head])]
    run = subprocess.run(command, capture_output=True, text=True, check=True)
    peak, params = json.loads(run.stdout.splitlines()[-1])
    shape = DecoderShape(layers=12, d_model=384, d_ff=1024, heads=6, kv_heads=2, vocab=8192, tied=False)
    assert shape.params == params
    machine = survey(tmp_path)
    live = decoder_activations(shape, rows=rows, length=length, dtype="float32", gradients="full", attention="eager")
    live += head_bytes(shape, rows * length, dtype="float32", gradients="full", head=head)
    parts = in_turn(peak_memory(machine, trainable=params, activations=live), early=4 * 8192 * 384)
    assert sum(parts.values()) == pytest.approx(peak, rel=0.20), {name: part >> 20 for name, part in parts.items()}
