"""Causal language models by name: the packaged SmolLM2, or a local Hugging Face folder."""

from __future__ import annotations

from pathlib import Path

from plait.assembly.local import SMOLLM2, find_decoder, fingerprint, quiet
from plait.assembly.smollm import LanguageModel, load_smollm
from plait.core.errors import CheckpointError
from plait.core.events import Events

CHATML = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\\n' + message['content'] + '<|im_end|>\\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
)
"""ChatML as SmolLM2 was tuned on, without the system text that its own template adds: 18 tokens a sample less."""

_SCORE_SETTINGS = ("final_logit_softcapping", "logit_scale", "logits_scaling")
# What Gemma 2, Cohere and Granite do to their scores beyond the head.


def load_language(name: str, *, dtype: str, events: Events | None = None) -> LanguageModel:
    """Load a decoder with its tokenizer, in eval mode, its weights frozen.

    Args:
        name: ``smollm2``, or a local Hugging Face folder of a causal language model with a chat template.
        dtype: A name of torch's.
        events: Where a one-time conversion is said.

    Raises:
        ConfigError: No such decoder.
        ResourceError: The package is not fetched or damaged.
        CheckpointError: The folder holds no usable model.
    """
    folder = find_decoder(name)
    if name == SMOLLM2:
        found = load_smollm(dtype=dtype, events=events)
        found.tokenizer.chat_template = CHATML
    else:
        found = _load_folder(folder, dtype)
    found.model.requires_grad_(requires_grad=False)
    # Rows are short here; torch's fused attention for CPUs is slower on them in the backward pass.
    found.model.set_attn_implementation("eager")
    return found


def _load_folder(folder: Path, dtype: str) -> LanguageModel:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    key = fingerprint(folder)
    try:
        with quiet():
            model = AutoModelForCausalLM.from_pretrained(
                folder, local_files_only=True, use_safetensors=True, dtype=dtype
            )
            tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True)
    except (OSError, ValueError, KeyError) as error:
        raise CheckpointError(
            f"no causal language model can be read: {error}",
            place=str(folder),
            remedy="give a folder that transformers' AutoModelForCausalLM and AutoTokenizer load",
        ) from error
    if not hasattr(model, "lm_head"):
        raise CheckpointError(
            f"{type(model).__name__} has no lm_head",
            place=str(folder),
            remedy="use a decoder of the Llama, Qwen or Mistral kind",
        )
    scaled = [name for name in _SCORE_SETTINGS if getattr(model.config, name, None) not in (None, 1, 1.0)]
    if scaled:
        raise CheckpointError(
            f"{type(model).__name__} changes its scores after the head ({', '.join(scaled)}), which Plait does not do",
            place=str(folder),
            remedy="use a decoder without these settings, such as Llama, Qwen or Mistral",
        )
    return LanguageModel(model=model.eval(), tokenizer=tokenizer, folder=folder, key=key)
