"""A decoder with 8-bit layers in a folder of its own: it loads without the weights that it was made from.

``decoder.safetensors`` holds 8-bit weights with ``weight_scale`` beside them, and everything else in bfloat16 where
that loses nothing. What two parts share (the head and the word embeddings) is written once.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from plait.assembly.local import quiet
from plait.assembly.smollm import LanguageModel
from plait.core.errors import CheckpointError
from plait.core.files import sha256_file
from plait.models.documents import read_by_document
from plait.models.quantized import Int8Linear, quantized_layers, swap

DECODER = "decoder.safetensors"
_SCALE = ".weight_scale"


def save_decoder(decoder: nn.Module, folder: Path) -> dict[str, Any]:
    """Write ``decoder.safetensors``.

    Returns:
        What ``plait.json`` says of it: file, its sha256, number format and number of 8-bit layers.

    Raises:
        OSError: The disk is full or not writable.
        safetensors.SafetensorError: Likewise.
    """
    layers = quantized_layers(decoder)
    kept = {f"{layer}.{part}" for layer in layers for part in ("weight", "weight_scale", "bias")}
    state: dict[str, Tensor] = {}
    written: set[int] = set()
    for name, value in decoder.state_dict().items():
        if value.data_ptr() not in written:
            written.add(value.data_ptr())
            state[name] = value.cpu().contiguous() if name in kept else _narrow(value.cpu()).contiguous()
    save_file(state, folder / DECODER, metadata={"format": "pt"})
    return {"weights": DECODER, "key": sha256_file(folder / DECODER), "format": "int8", "layers": len(layers)}


def load_decoder(
    folder: Path, record: Mapping[str, Any], config: Mapping[str, Any], *, tokenizer: Any
) -> LanguageModel:
    """Read what :func:`save_decoder` wrote, in eval mode, nothing trainable.

    Args:
        folder: Of the checkpoint.
        record: What ``plait.json`` says of the decoder.
        config: The decoder's Hugging Face configuration as plain data.
        tokenizer: Of the checkpoint.

    Raises:
        CheckpointError: The file is missing, damaged or another one, or does not fit the configuration.
    """
    path = folder / DECODER
    if record["weights"] != DECODER or record["format"] != "int8":
        raise CheckpointError(
            f"weights {record['weights']!r} of format {record['format']!r}; expected {DECODER!r}, 'int8'",
            place=str(folder / "plait.json"),
            remedy="load it with the version of plait that wrote it",
        )
    found = sha256_file(path) if path.is_file() else ""
    if found != record["key"]:
        cause = f"has sha256 {found[:12]}, expected {str(record['key'])[:12]}" if found else "is missing"
        raise CheckpointError(f"{DECODER} {cause}", place=str(path), remedy="use an undamaged copy of the folder")
    try:
        state = load_file(path)
        dtype = getattr(torch, str(record["dtype"]))
        model = _empty(config, dtype)
        for layer in (name.removesuffix(_SCALE) for name in list(state) if name.endswith(_SCALE)):
            old = model.get_submodule(layer)
            swap(model, layer, Int8Linear(old.in_features, old.out_features, bias=old.bias is not None))
        _fill(model, state, dtype)
    except (SafetensorError, ValueError, KeyError, AttributeError, RuntimeError) as error:
        raise CheckpointError(
            f"the weights do not fit the configuration: {str(error).splitlines()[-1].strip()}",
            place=str(path),
            remedy="config.json and decoder.safetensors must come from the same checkpoint",
        ) from error
    model.eval()
    model.requires_grad_(requires_grad=False)
    read_by_document(model)
    return LanguageModel(model=model, tokenizer=tokenizer, folder=folder, key=found)


def _empty(config: Mapping[str, Any], dtype: torch.dtype) -> Any:
    """The model with weights that nobody has drawn or read; buffers that follow from the configuration are right."""
    from transformers import AutoConfig, AutoModelForCausalLM
    from transformers.initialization import no_init_weights

    settings = dict(config)
    with no_init_weights(), quiet():
        return AutoModelForCausalLM.from_config(
            AutoConfig.for_model(settings.pop("model_type"), **settings), dtype=dtype
        )


def _fill(model: Any, state: dict[str, Tensor], dtype: torch.dtype) -> None:
    kept = {f"{layer}.{part}" for layer in quantized_layers(model) for part in ("weight", "weight_scale", "bias")}
    state = {name: value if name in kept else value.to(dtype) for name, value in state.items()}
    shared = [name for name, weight in model.named_parameters() if weight is model.get_input_embeddings().weight]
    if model.config.tie_word_embeddings and "lm_head.weight" not in state:
        state["lm_head.weight"] = state[shared[0]]
    model.load_state_dict(state, strict=True, assign=True)
    model.tie_weights()


def _narrow(value: Tensor) -> Tensor:
    """In bfloat16 if every number is one."""
    narrow = value.to(torch.bfloat16)
    return narrow if value.is_floating_point() and bool((narrow.to(value.dtype) == value).all()) else value
