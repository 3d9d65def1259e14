"""SmolLM2 from GGUF = what transformers' own GGUF reader gives; the tokenizer = SmolLM2's."""

from __future__ import annotations

import hashlib

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from plait.core.files import sha256_file

pytestmark = pytest.mark.real


@pytest.fixture(scope="module")
def smollm(packages):
    from plait.assembly.smollm import load_smollm

    packages("smollm2")
    return load_smollm()


def test_every_weight_is_that_of_the_transformers_reader(golden, smollm, packages):
    _, record = golden("smollm")
    (path,) = packages("smollm2").rglob("*.gguf")
    assert sha256_file(path) == record["weights_sha256"]
    state = smollm.model.state_dict()
    ours = {
        name: hashlib.sha256(v.contiguous().view(torch.int16).numpy().tobytes()).hexdigest()
        for name, v in state.items()
    }
    assert ours == record["weights_bfloat16"]
    assert all(v.isfinite().all() for v in state.values())


@torch.inference_mode()
def test_logits_are_those_of_the_transformers_reader(golden, packages):
    from plait.assembly.smollm import load_smollm

    tensors, record = golden("smollm")
    exact = load_smollm(dtype="float32")
    token_ids = exact.tokenizer(record["prompt"], return_tensors="pt").input_ids
    assert token_ids.equal(tensors["token_ids"])
    logits = exact.model(token_ids).logits[0, :, :512]
    torch.testing.assert_close(logits, tensors["logits"], atol=2e-3, rtol=0)  # worst measured: 0 here, of up to 20


@pytest.mark.row("S4-45")
@torch.inference_mode()
def test_it_answers(smollm):
    tokenizer, model = smollm.tokenizer, smollm.model
    assert sum(p.numel() for p in model.parameters()) == 134_515_008
    assert model.dtype == torch.bfloat16
    assert model.lm_head.weight is model.model.embed_tokens.weight
    turns = [{"role": "user", "content": "What is the capital of France?"}]
    prompt = tokenizer.apply_chat_template(turns, add_generation_prompt=True, return_tensors="pt", return_dict=True)
    out = model.generate(**prompt, max_new_tokens=16, do_sample=False)[0, prompt["input_ids"].shape[1] :]
    assert "Paris" in tokenizer.decode(out)
    assert out[-1] == tokenizer.eos_token_id, "it stops by itself: the template and the end token are the trained ones"


def test_template_and_special_tokens(smollm):
    tokenizer = smollm.tokenizer
    assert (tokenizer.bos_token, tokenizer.eos_token, tokenizer.pad_token) == (
        "<|im_start|>",
        "<|im_end|>",
        "<|im_end|>",
    )
    assert tokenizer.convert_tokens_to_ids(["<|endoftext|>", "<|im_start|>", "<|im_end|>"]) == [0, 1, 2]
    assert (len(tokenizer), tokenizer.model_max_length) == (49_152, 8192)
    assert tokenizer("<|im_start|>user<|im_end|>").input_ids[0::2] == [1, 2], "special tokens are never split"
    turns = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Ho"}]
    assert tokenizer.apply_chat_template(turns, tokenize=False) == (
        "<|im_start|>system\nYou are a helpful AI assistant named SmolLM, trained by Hugging Face<|im_end|>\n"
        "<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\nHo<|im_end|>\n"
    )


def test_digits_stand_alone_before_words_are_split(smollm):
    """The published tokenizer splits digits first; a GPT-2 split alone leaves one of two spaces to the digit."""
    tokenizer = smollm.tokenizer
    pieces = tokenizer.backend_tokenizer.pre_tokenizer.pre_tokenize_str("ab  12")
    assert [p for p, _ in pieces] == ["ab", "ĠĠ", "1", "2"]
    assert tokenizer.convert_ids_to_tokens(tokenizer("x  2024").input_ids) == ["x", "ĠĠ", "2", "0", "2", "4"]


LOST = "\x04\x06\x13\x14\x16\x1d"
"""Control characters without a token; upstream's vocabulary lacks them, and with them planes 4 to 11 (unassigned)."""


def has_tokens(text: str) -> bool:
    return "<|" not in text and not any(c in LOST or 0x40000 <= ord(c) < 0xC0000 for c in text)


@settings(max_examples=60, deadline=None)
@given(text=st.text(max_size=30).filter(has_tokens))
def test_text_survives_the_tokenizer(smollm, text):
    ids = smollm.tokenizer(text).input_ids
    assert smollm.tokenizer.decode(ids) == text
    assert not set(ids) & set(range(17)), "no text becomes a special token"


def test_what_the_vocabulary_cannot_say_is_known(smollm):
    gone = [c for c in map(chr, range(0x250)) if smollm.tokenizer.decode(smollm.tokenizer(c).input_ids) != c]
    assert gone == list(LOST)


def test_nothing_of_the_quantized_file_is_left_in_the_config(smollm):
    config = smollm.model.config
    assert not hasattr(config, "quantization_config")
    assert (config.num_hidden_layers, config.hidden_size, config.num_key_value_heads) == (30, 576, 3)
    assert config.rope_parameters["rope_theta"] == 100_000
