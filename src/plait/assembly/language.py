"""Causal language models: the packaged SmolLM2, a local Hugging Face folder, or a new one of any listed family."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from plait.assembly.hf_folder import load_folder, reading
from plait.assembly.local import SMOLLM2, digest, find_decoder, fingerprint, quiet
from plait.assembly.smollm import LanguageModel, load_smollm, smollm_folder
from plait.core.errors import CheckpointError
from plait.core.events import Events
from plait.models.composition import Decoder, NewDecoder
from plait.models.documents import read_by_document
from plait.models.mixtral import take_experts
from plait.models.output_head import changed_scores

if TYPE_CHECKING:
    from transformers import PreTrainedModel

CHATML = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\\n' + message['content'] + '<|im_end|>\\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
)
"""ChatML as SmolLM2 was tuned on, without the system text that its own template adds: 18 tokens a sample less."""


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
    return _ready(found)


def language_of(spec: Decoder, *, dtype: str, events: Events | None = None) -> LanguageModel:
    """The decoder that settings describe: loaded in ``dtype``, or drawn from torch's generator in float32.

    Raises:
        ConfigError: No such decoder.
        ResourceError: Its package is not fetched or damaged.
        CheckpointError: The folder holds no usable model or tokenizer.
    """
    if isinstance(spec, NewDecoder):
        return new_language(spec, events=events)
    return load_language(spec.name, dtype=dtype, events=events)


def new_language(spec: NewDecoder, *, events: Events | None = None) -> LanguageModel:
    """A decoder from scratch in float32, its weights drawn from torch's generator; nothing trainable yet.

    Args:
        spec: Family and sizes.
        events: Where a one-time conversion of the tokenizer's package is said.

    Raises:
        ConfigError: No such tokenizer.
        ResourceError: Its package is not fetched or damaged.
        CheckpointError: The folder holds no usable tokenizer.
    """
    from transformers import AutoModelForCausalLM, AutoTokenizer

    folder = find_decoder(spec.tokenizer)
    packaged = spec.tokenizer == SMOLLM2
    if packaged:
        folder = smollm_folder(events=events)
    with reading(folder, "tokenizer", "AutoTokenizer loads"):
        tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True)
    if packaged:
        tokenizer.chat_template = CHATML
    with quiet():
        model = AutoModelForCausalLM.from_config(_config(spec, tokenizer))
    key = digest({"decoder": spec.model_dump(mode="json", exclude_none=True), "tokenizer": fingerprint(folder)})
    made = LanguageModel(model=model.eval(), tokenizer=tokenizer, folder=folder, key=key)
    return _ready(made, capacity=spec.mixture.capacity if spec.mixture else None)


def _ready(found: LanguageModel, *, capacity: float | None = None) -> LanguageModel:
    take_experts(found.model, capacity=capacity)
    found.model.requires_grad_(requires_grad=False)
    read_by_document(found.model)
    return found


def _config(spec: NewDecoder, tokenizer: Any) -> Any:
    from transformers import AutoConfig

    # The names that all families understand: GPT-2 maps them to its own.
    common: dict[str, Any] = {
        "vocab_size": len(tokenizer),
        "hidden_size": spec.d,
        "num_hidden_layers": spec.depth,
        "num_attention_heads": spec.heads,
        "max_position_embeddings": spec.context,
        "tie_word_embeddings": spec.tied,
        "bos_token_id": tokenizer.bos_token_id,
        "eos_token_id": tokenizer.eos_token_id,
        "pad_token_id": tokenizer.pad_token_id,
    }
    if spec.model_type == "gpt2":
        return AutoConfig.for_model("gpt2", **common, n_inner=spec.d_ff or None)
    more: dict[str, Any] = {
        "intermediate_size": spec.d_ff or 4 * spec.d,
        "num_key_value_heads": spec.kv_heads or spec.heads,
    }
    if spec.model_type != "qwen2":  # the others may have heads of a width of their own
        more["head_dim"] = spec.d // spec.heads
    if spec.mixture is not None:
        more |= {"num_local_experts": spec.mixture.experts, "num_experts_per_tok": spec.mixture.top_k}
        more["router_aux_loss_coef"] = spec.mixture.balance
    return AutoConfig.for_model(spec.model_type, **common, **more)


def load_trained(folder: Path, *, tokenizer: Any, dtype: str) -> LanguageModel:
    """A decoder out of a checkpoint, in eval mode, its weights frozen.

    Raises:
        CheckpointError: The folder holds no usable model.
    """
    return _ready(
        LanguageModel(model=_load_model(folder, dtype), tokenizer=tokenizer, folder=folder, key=fingerprint(folder))
    )


def _load_folder(folder: Path, dtype: str) -> LanguageModel:
    from transformers import AutoTokenizer

    key = fingerprint(folder)
    with reading(folder, "tokenizer", "AutoTokenizer loads"):
        tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True)
    return LanguageModel(model=_load_model(folder, dtype), tokenizer=tokenizer, folder=folder, key=key)


def _load_model(folder: Path, dtype: str) -> PreTrainedModel:
    from transformers import AutoModelForCausalLM

    loaded = load_folder(AutoModelForCausalLM, folder, dtype=dtype, what="causal language model")
    loaded.check()
    model = loaded.model
    if not hasattr(model, "lm_head"):
        raise CheckpointError(
            f"{type(model).__name__} has no lm_head",
            place=str(folder),
            remedy="use a decoder of the Llama, Qwen or Mistral kind",
        )
    scaled = changed_scores(model.config)
    if scaled:
        raise CheckpointError(
            f"{type(model).__name__} changes its scores after the head ({', '.join(scaled)}), which Plait does not do",
            place=str(folder),
            remedy="use a decoder without these settings, such as Llama, Qwen or Mistral",
        )
    return model.eval()
