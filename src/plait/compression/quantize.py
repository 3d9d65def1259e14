"""A decoder to 8-bit weights: adapters are merged in float32, then every linear layer but the head is rounded once."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import torch
from torch import nn

from plait.adapters.lora import merge
from plait.assembly.multimodal import Multimodal, holds_media
from plait.core.errors import CheckpointError, NumericsError
from plait.models.crossattend import plain
from plait.models.quantized import Int8Linear, quantized_layers, swap

if TYPE_CHECKING:
    from transformers import PreTrainedModel


@dataclass(frozen=True, slots=True, kw_only=True)
class Quantized:
    """What was made, and how far its weights are from those before.

    Attributes:
        built: The model with 8-bit layers and without adapter.
        layers: How many layers were quantized.
        merged: Into how many of them an adapter was merged.
        error: Root of the mean square of all weights' errors over that of the weights.
        largest_error: Largest error of a weight in units of its scale; at most one half.
    """

    built: Multimodal
    layers: int
    merged: int
    error: float
    largest_error: float


def quantize_decoder(built: Multimodal) -> Quantized:
    """Quantize the decoder of a model, in place. Embeddings, the head that shares them, and norms stay as they are.

    Raises:
        CheckpointError: The decoder is quantized already, which would round it twice.
        NumericsError: A weight is not finite.
    """
    decoder = built.language.model
    if found := quantized_layers(decoder):
        raise CheckpointError(
            f"{len(found)} layers of the decoder have 8-bit weights already",
            place="decoder",
            remedy="quantize the model that was tuned or aligned",
        )
    with plain(decoder):  # what reads media inside it stays as it is
        return _quantize(decoder, replace(built, lora=None))


def _quantize(decoder: PreTrainedModel, built: Multimodal) -> Quantized:
    dtype = decoder.dtype
    # In bfloat16 a merged weight would be rounded before it is quantized.
    decoder.float()
    merged = merge(decoder)
    squares = errors = largest = 0.0
    layers = [name for name, module in decoder.named_modules() if isinstance(module, nn.Linear) and name != "lm_head"]
    if not layers:
        raise CheckpointError(
            f"{type(decoder).__name__} has no linear layers that can be quantized",
            place="decoder",
            remedy="use a decoder of the Llama, Qwen or Mistral kind",
        )
    for name in layers:
        linear = decoder.get_submodule(name)
        assert isinstance(linear, nn.Linear)
        try:
            layer = Int8Linear.of(linear)
        except ValueError as error:
            raise NumericsError(str(error), place=name, remedy="use a checkpoint whose weights are finite") from error
        off = layer.weight.float() * layer.weight_scale[:, None] - linear.weight.detach()
        squares += float(linear.weight.detach().double().square().sum())
        errors += float(off.double().square().sum())
        largest = max(largest, float((off.abs() / layer.weight_scale[:, None]).max()))
        swap(decoder, name, layer)
    for module in decoder.modules():
        if not isinstance(module, Int8Linear):
            for weight in module.parameters(recurse=False):
                weight.data = weight.data.to(dtype)
    decoder.eval()
    decoder.requires_grad_(requires_grad=False)
    return Quantized(
        built=built,
        layers=len(layers),
        merged=merged,
        error=(errors / max(squares, torch.finfo(torch.float64).tiny)) ** 0.5,
        largest_error=largest,
    )


def part_bytes(built: Multimodal) -> dict[str, int]:
    """Bytes of the tensors that a model consists of, by part; what two parts share counts once. The tower is left out.

    Parts: ``linear layers`` (of the decoder, with their scales), ``embeddings and norms``, ``adapter``, ``connector``.
    """
    parts: dict[str, int] = dict.fromkeys(("linear layers", "embeddings and norms", "adapter", "connector"), 0)
    seen: set[int] = set()
    decoder = built.language.model
    with plain(decoder):
        state, modules = decoder.state_dict(keep_vars=True), list(decoder.named_modules())
    linear = {
        f"{name}."
        for name, module in modules
        if isinstance(module, nn.Linear | Int8Linear) and name.rpartition(".")[2] != "lm_head" and "lora_" not in name
    }
    for name, tensor in state.items():
        if tensor.data_ptr() in seen:
            continue
        seen.add(tensor.data_ptr())
        owner = name.rpartition(".")[0] + "."
        part = "adapter" if "lora_" in name else "linear layers" if owner in linear else "embeddings and norms"
        parts[part] += tensor.numel() * tensor.element_size()
    own = [value for name, value in built.own_state().items() if holds_media(name)]
    parts["connector"] = sum(value.numel() * value.element_size() for value in own)
    return parts
