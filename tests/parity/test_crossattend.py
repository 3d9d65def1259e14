"""Gated cross-attention = Idefics' layer; at the start it changes no bit; text sees the latest picture only."""

from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file
from torch import nn
from transformers import (
    GPT2Config,
    GPT2LMHeadModel,
    IdeficsConfig,
    LlamaConfig,
    LlamaForCausalLM,
    Qwen2Config,
    Qwen2ForCausalLM,
)
from transformers.models.idefics.modeling_idefics import IdeficsGatedCrossAttentionLayer

from plait.adapters.lora import Lora, attach, save_adapter
from plait.core.errors import ConfigError, DataError
from plait.core.tensors import Patches
from plait.models.crossattend import GatedCrossAttention, MediaView, install, latest_item, layers_of, plain, remove
from plait.models.transformer import TransformerSizes

SIZES = TransformerSizes(d=32, depth=1, heads=4, d_source=12, norm="rms", activation="silu", gated=True, bias=False)


def decoder(kind: str) -> nn.Module:
    torch.manual_seed(0)
    common = {
        "vocab_size": 40,
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 3,
        "num_attention_heads": 4,
    }
    match kind:
        case "llama":
            made = LlamaForCausalLM(LlamaConfig(**common, num_key_value_heads=2))
        case "qwen2":
            made = Qwen2ForCausalLM(Qwen2Config(**common, num_key_value_heads=2))
        case _:
            made = GPT2LMHeadModel(
                GPT2Config(vocab_size=40, n_embd=32, n_layer=3, n_head=4, bos_token_id=0, eos_token_id=1)
            )
    return made.eval()


def view(batch: int = 2, text: int = 6, tokens: int = 5) -> MediaView:
    mask = torch.zeros(batch, 1, text, tokens, dtype=torch.bool)
    mask[:, :, 2:, :3] = True  # the first two positions see nothing
    return MediaView(source=torch.randn(batch, tokens, 12), mask=mask)


@pytest.mark.row("S2-11")
def test_layer_is_that_of_idefics() -> None:
    config = IdeficsConfig(hidden_size=32, intermediate_size=48, num_attention_heads=4, qk_layer_norms=False,
                           vision_config={"embed_dim": 12}, alpha_initializer="zeros", alpha_type="float")  # fmt: skip
    config._attn_implementation = "eager"
    theirs = IdeficsGatedCrossAttentionLayer(config).eval()
    ours = GatedCrossAttention(
        TransformerSizes(**{name: getattr(SIZES, name) for name in SIZES.__slots__} | {"d_ff": 48})
    )
    torch.manual_seed(1)
    with torch.no_grad():
        for weight in theirs.parameters():
            weight.copy_(torch.randn_like(weight) * 0.3 + (0.5 if weight.ndim == 1 else 0.0))
        cross, mlp = theirs.cross_attn, theirs.mlp
        ours.attention.q.weight.copy_(cross.q_proj.weight)
        ours.attention.kv.weight.copy_(torch.cat([cross.k_proj.weight, cross.v_proj.weight]))
        ours.attention.out.weight.copy_(cross.o_proj.weight)
        ours.feed_forward.up.weight.copy_(torch.cat([mlp.gate_proj.weight, mlp.up_proj.weight]))
        ours.feed_forward.down.weight.copy_(mlp.down_proj.weight)
        ours.norm.weight.copy_(theirs.input_layernorm.weight)
        ours.feed_forward_norm.weight.copy_(theirs.post_attention_layernorm.weight)
        ours.gate.copy_(theirs.alpha_cross_attn)
        ours.feed_forward_gate.copy_(theirs.alpha_dense)
    x, seen = torch.randn(2, 6, 32), view()
    added = torch.zeros(seen.mask.shape).masked_fill(~seen.mask, torch.finfo(torch.float32).min)
    gate = seen.mask.any(-1)[:, 0].long()
    wanted = theirs(x, image_hidden_states=seen.source, image_attention_mask=added, cross_attention_gate=gate)
    found = ours(x, seen)
    torch.testing.assert_close(found[:, 2:], wanted[:, 2:], atol=1e-5, rtol=1e-4)
    assert torch.equal(found[:, :2], x[:, :2])  # see nothing; theirs pass the feed-forward network nevertheless
    found[:, 2:].square().sum().backward()
    wanted[:, 2:].square().sum().backward()
    torch.testing.assert_close(ours.gate.grad, theirs.alpha_cross_attn.grad, atol=1e-4, rtol=1e-3)
    torch.testing.assert_close(ours.attention.q.weight.grad, cross.q_proj.weight.grad, atol=1e-4, rtol=1e-3)


@pytest.mark.row("S2-11")
@pytest.mark.parametrize("kind", ["llama", "qwen2", "gpt2"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_at_the_start_the_frozen_decoder_is_unchanged_bit_for_bit(kind: str, dtype: torch.dtype) -> None:
    model = decoder(kind).to(dtype).requires_grad_(False)
    ids = torch.randint(0, 40, (2, 6))
    before = model(input_ids=ids).logits
    tensors = {id(p) for p in model.parameters()}
    reads = [GatedCrossAttention(SIZES), None, GatedCrossAttention(SIZES)]
    install(model, reads)
    seen = view()
    after = model(input_ids=ids, media=seen).logits
    assert torch.equal(after, before)
    assert torch.equal(model(input_ids=ids).logits, before)  # without media, too
    after.float().square().sum().backward()
    assert all(p.grad is None for p in model.parameters() if id(p) in tensors)
    gates = [read.gate.grad for read in reads if read is not None]
    assert all(grad is not None and grad.abs() > 0 for grad in gates)
    with torch.no_grad():
        for read in reads:
            if read is not None:
                read.gate.fill_(1.0)
                read.feed_forward_gate.fill_(1.0)
    moved = model(input_ids=ids, media=seen).logits
    assert torch.equal(moved[:, :2], before[:, :2])  # nothing seen yet
    assert not torch.equal(moved[:, 2:], before[:, 2:])
    assert remove(model) == reads
    assert torch.equal(model(input_ids=ids).logits, before)


@pytest.mark.row("S2-11")
@settings(max_examples=40, deadline=None)
@given(data=st.data())
def test_text_sees_the_latest_item_of_its_own_sample(data: st.DataObject) -> None:
    """Against the plain loop over positions."""
    rows = data.draw(st.integers(1, 3))
    marks, segments, grids, item_row = [], [], [], []
    for row in range(rows):
        length = 12
        segment = sorted(
            data.draw(st.lists(st.integers(0, 2), min_size=length, max_size=length)), key=lambda s: (s == 0, s)
        )
        flags = [data.draw(st.booleans()) and s > 0 for s in segment]
        marks.append(flags)
        segments.append(segment)
        for _ in range(sum(flags)):
            grids.append([1, 1, data.draw(st.integers(1, 3))])
            item_row.append(row)
    grid = torch.tensor(grids, dtype=torch.long).view(-1, 3)
    media = Patches(values=torch.arange(int(grid.prod(1).sum()), dtype=torch.float32)[:, None], grid=grid)
    seen = latest_item(media, item_row=torch.tensor(item_row, dtype=torch.long), marks=torch.tensor(marks),
                       segment_ids=torch.tensor(segments))  # fmt: skip
    starts = grid.prod(1).cumsum(0) - grid.prod(1)
    number = 0
    for row in range(rows):
        items = [number + i for i in range(sum(marks[row]))]
        number += len(items)
        for at in range(12):
            before = [i for i in range(at + 1) if marks[row][i]]
            wanted: list[float] = []
            if before and segments[row][at] != 0 and segments[row][before[-1]] == segments[row][at]:
                item = items[len(before) - 1]
                wanted = [float(starts[item]) + i for i in range(int(grid[item].prod()))]
            found = seen.source[row, seen.mask[row, 0, at], 0].tolist() if seen.mask.shape[-1] else []
            assert found == wanted


def test_what_does_not_fit_is_refused() -> None:
    model = decoder("llama")
    with pytest.raises(ConfigError, match="1 entries for 3 layers"):
        install(model, [None])
    with pytest.raises(ConfigError, match="no layer reads media"):
        install(model, [None] * 3)
    install(model, [GatedCrossAttention(SIZES), None, None])
    with pytest.raises(ConfigError, match="reads media already"):
        install(model, [GatedCrossAttention(SIZES), None, None])
    with pytest.raises(ConfigError, match="Linear keeps its layers in no place"):
        layers_of(nn.Linear(1, 1))
    with pytest.raises(ConfigError, match="width of the media"):
        GatedCrossAttention(TransformerSizes(d=8, depth=1, heads=2))
    media = Patches(values=torch.rand(2, 4), grid=torch.tensor([[1, 1, 2]]))
    with pytest.raises(DataError, match="row 0 has 2 marks and 1 media items"):
        latest_item(
            media, item_row=torch.tensor([0]), marks=torch.tensor([[True, True]]), segment_ids=torch.ones(1, 2).long()
        )


def test_text_in_pieces_with_a_cache_reads_the_same_media() -> None:
    model = decoder("llama")
    reads = [GatedCrossAttention(SIZES), None, None]
    torch.nn.init.ones_(reads[0].gate)
    install(model, reads)
    seen = view(batch=1)
    ids = torch.randint(0, 40, (1, 6))
    whole = model(input_ids=ids, media=seen).logits
    first = model(input_ids=ids[:, :5], media=MediaView(source=seen.source, mask=seen.mask[:, :, :5]), use_cache=True)
    last = model(input_ids=ids[:, 5:], media=seen, past_key_values=first.past_key_values)  # the last rows of the mask
    torch.testing.assert_close(last.logits[:, 0], whole[:, 5], atol=1e-5, rtol=1e-4)


def test_without_its_cross_attentions_a_decoder_saves_and_takes_adapters_as_ever(tmp_path: Path) -> None:
    model = decoder("llama")
    wanted = {name: value.clone() for name, value in model.state_dict().items()}
    reads = [GatedCrossAttention(SIZES), None, None]
    install(model, reads)
    lora = Lora(rank=2, alpha=4.0, targets=("q_proj",))
    with pytest.raises(ConfigError, match="reads media inside"):
        attach(model, lora)
    with plain(model):
        model.save_pretrained(tmp_path)
        names = attach(model, lora)
        save_adapter(model, lora, tmp_path / "adapter", base="x")
    again, report = LlamaForCausalLM.from_pretrained(tmp_path, output_loading_info=True)
    assert not report["missing_keys"]
    assert not report["unexpected_keys"]
    assert all(torch.equal(value, wanted[name]) for name, value in again.state_dict().items())
    assert all("lora_" in name and ".layer." not in name for name in names)
    assert all(p.requires_grad for p in reads[0].parameters())  # not frozen with the decoder
    held = load_file(tmp_path / "adapter" / "adapter_model.safetensors")
    assert all(".layer." not in name for name in held)
    model(input_ids=torch.randint(0, 40, (2, 6)), media=view()).logits.sum().backward()
    assert reads[0].gate.grad is not None
