"""The GGUF conversion on a tiny model written here, in the layout that llama.cpp writes."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from gguf import GGMLQuantizationType, GGUFWriter, quantize
from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM

from plait.assembly import smollm
from plait.core.errors import CheckpointError, NumericsError

SPECIAL = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
NAMES = {
    "input_layernorm": "attn_norm",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "post_attention_layernorm": "ffn_norm",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
}


def bytes_as_letters() -> list[str]:
    """The 256 stand-ins of GPT-2's byte-level alphabet, in byte order."""
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = iter(range(256, 400))
    return [chr(b) if b in printable else chr(next(others)) for b in range(256)]


def model() -> LlamaForCausalLM:
    """Weights that bfloat16 holds exactly, kept in float32."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=261,
        hidden_size=64,
        intermediate_size=96,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        tie_word_embeddings=True,
        rms_norm_eps=1e-5,
        rope_parameters={"rope_type": "default", "rope_theta": 50_000.0},
    )
    made = LlamaForCausalLM(config).eval()
    for weight in made.parameters():
        weight.data = weight.data.bfloat16().float()
    return made


def gguf_name(name: str) -> str:
    outside = {"model.embed_tokens.weight": "token_embd.weight", "model.norm.weight": "output_norm.weight"}
    if name in outside:
        return outside[name]
    _, _, layer, rest = name.split(".", 3)
    return f"blk.{layer}.{NAMES[rest.removesuffix('.weight')]}.weight"


def halves_to_interleaved(weight: np.ndarray, heads: int) -> np.ndarray:
    """What llama.cpp's converter does to q and k."""
    rows, columns = weight.shape
    return weight.reshape(heads, 2, rows // heads // 2, columns).swapaxes(1, 2).reshape(rows, columns)


def write_gguf(path, source: LlamaForCausalLM, *, pre: str = "smollm", quantized: bool = False) -> None:
    path.parent.mkdir(parents=True)
    config = source.config
    writer = GGUFWriter(path, "llama")
    writer.add_block_count(config.num_hidden_layers)
    writer.add_context_length(128)
    writer.add_embedding_length(config.hidden_size)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_rope_freq_base(50_000.0)
    writer.add_vocab_size(config.vocab_size)
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre(pre)
    writer.add_token_list([*SPECIAL, *bytes_as_letters(), "ab", "ĠĠ"])
    writer.add_token_types([3] * 3 + [1] * 258)
    writer.add_token_merges(["a b", "Ġ Ġ"])
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    writer.add_unk_token_id(0)
    writer.add_pad_token_id(2)
    writer.add_chat_template("{% for m in messages %}<|im_start|>{{ m.content }}<|im_end|>{% endfor %}")
    for name, weight in source.model.state_dict(prefix="model.").items():
        values = weight.float().numpy()
        if "q_proj" in name:
            values = halves_to_interleaved(values, config.num_attention_heads)
        elif "k_proj" in name:
            values = halves_to_interleaved(values, config.num_key_value_heads)
        if quantized and values.ndim == 2:
            kind = GGMLQuantizationType.Q8_0 if "embed" in name else GGMLQuantizationType.Q4_1
            writer.add_tensor(gguf_name(name), quantize(values, kind), raw_dtype=kind)
        else:
            writer.add_tensor(gguf_name(name), values)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def convert(folder, source: LlamaForCausalLM, **settings):
    write_gguf(folder / "package" / smollm._GGUF, source, **settings)
    target = folder / "target"
    target.mkdir()
    smollm._convert(folder / "package", target)
    return target


@torch.inference_mode()
def test_weights_and_configuration_come_back(tmp_path):
    source = model()
    target = convert(tmp_path, source)
    assert LlamaForCausalLM.from_pretrained(target).dtype == torch.bfloat16
    back = LlamaForCausalLM.from_pretrained(target, dtype=torch.float32)
    for name, weight in source.state_dict().items():
        assert weight.equal(back.state_dict()[name]), name
    token_ids = torch.randint(0, 261, (2, 9))
    torch.testing.assert_close(back(token_ids).logits, source(token_ids).logits, atol=1e-6, rtol=0)
    assert (back.config.eos_token_id, back.config.pad_token_id, back.config.max_position_embeddings) == (2, 2, 128)
    assert back.generation_config.eos_token_id == 2


def test_four_bit_blocks_are_within_half_a_step(tmp_path):
    """Q4_1 keeps a minimum and 15 equal steps a block of 32 weights; rounding is off by half a step at most."""
    source = model()
    back = LlamaForCausalLM.from_pretrained(convert(tmp_path, source, quantized=True), dtype=torch.float32)
    wanted = source.model.layers[1].mlp.up_proj.weight.detach().view(-1, 32)
    found = back.model.layers[1].mlp.up_proj.weight.detach().view(-1, 32)
    step = (wanted.amax(1) - wanted.amin(1)) / 15
    error = (found - wanted).abs().amax(1)
    assert (error <= 0.5 * step + 0.01 * wanted.abs().amax(1)).all()  # float16 of the step, then bfloat16
    assert error.max() > 0.1 * step.min(), "it was quantized at all"


def test_the_tokenizer_has_digits_merges_specials_and_template(tmp_path):
    target = convert(tmp_path, model())
    tokenizer = AutoTokenizer.from_pretrained(target, local_files_only=True)
    tokens = tokenizer.convert_ids_to_tokens(tokenizer("ab  12<|im_end|>").input_ids)
    assert tokens == ["ab", "ĠĠ", "1", "2", "<|im_end|>"]
    assert tokenizer.decode(tokenizer("é 笑 😎").input_ids) == "é 笑 😎"
    turns = [{"role": "user", "content": "ab"}]
    assert tokenizer.apply_chat_template(turns, tokenize=False) == "<|im_start|>ab<|im_end|>"
    assert (tokenizer.eos_token_id, tokenizer.pad_token_id, tokenizer.model_max_length) == (2, 2, 128)


def test_another_kind_of_tokenizer_is_refused(tmp_path):
    with pytest.raises(CheckpointError, match=r"of kind \('gpt2', 'llama-bpe'\), expected \('gpt2', 'smollm'\)"):
        convert(tmp_path, model(), pre="llama-bpe")


def test_weights_that_are_not_finite_are_refused(tmp_path):
    broken = model()
    broken.model.layers[1].mlp.up_proj.weight.data[3, 4] = torch.inf
    with pytest.raises(NumericsError, match=r"model\.layers\.1\.mlp\.up_proj\.weight is not finite"):
        convert(tmp_path, broken)
