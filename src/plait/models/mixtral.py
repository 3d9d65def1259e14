"""Decoders of transformers with experts (Mixtral), whose layers become :class:`plait.models.moe.MixtureOfExperts`.

Weights and their names stay, so that the decoder is saved and read by transformers as before. What is gained: a
capacity, a balance by document, and experts that several processes hold.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from jaxtyping import Int
from torch import Tensor, nn

from plait.models.moe import Choices, MixtureOfExperts
from plait.models.transformer import ACTIVATIONS, TransformerSizes

_THEIRS = "MixtralSparseMoeBlock"


def take_experts(decoder: nn.Module, *, capacity: float | None = None) -> int:
    """Put a :class:`plait.models.moe.MixtureOfExperts` with the same weights in place of each layer with experts.

    One that is computed in another way (noise on its inputs, an unknown activation) is left as it is.

    Args:
        decoder: Of transformers.
        capacity: See :class:`plait.models.moe.MixtureOfExperts`.

    Returns:
        How many.
    """
    config: Any = getattr(decoder, "config", None)
    found = [name for name, module in decoder.named_modules() if type(module).__name__ == _THEIRS]
    if not found or config.hidden_act not in ACTIVATIONS or config.router_jitter_noise:
        return 0
    sizes = TransformerSizes(
        d=config.hidden_size,
        depth=1,
        heads=config.num_attention_heads,
        d_ff=config.intermediate_size,
        activation=config.hidden_act,
        gated=True,
        bias=False,
    )
    for name in found:
        theirs: Any = decoder.get_submodule(name)
        with torch.device("meta"):
            ours = MixtureOfExperts(
                sizes, experts=config.num_local_experts, top_k=config.num_experts_per_tok, capacity=capacity
            )
        ours.gate.weight = theirs.gate.weight
        for weight in ("gate_up_proj", "down_proj"):
            ours.experts.register_parameter(weight, getattr(theirs.experts, weight))
        owner, _, own = name.rpartition(".")
        setattr(decoder.get_submodule(owner), own, ours.train(theirs.training))
    return len(found)


def mixtures(model: nn.Module) -> list[MixtureOfExperts]:
    """All layers with experts, in the order of their names."""
    return [module for module in model.modules() if isinstance(module, MixtureOfExperts)]


@contextmanager
def routing(model: nn.Module, segment_ids: Int[Tensor, "b t"]) -> Iterator[list[Choices]]:
    """Inside, layers with experts that train know the documents of what they read.

    Args:
        model: Reads the rows.
        segment_ids: Documents of each row; 0 is padding.

    Yields:
        What the router of each layer did, once the model has run; nothing of a model that does not train.
    """
    layers = mixtures(model) if model.training else []
    found: list[Choices] = []
    for layer in layers:
        layer.documents, layer.choices = segment_ids, found
    try:
        yield found
    finally:
        for layer in layers:  # documents stay: a block may be computed again for its gradient
            layer.choices = None
