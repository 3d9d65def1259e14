"""A language model with media cut into the stages of a pipeline: which blocks are whose, and a model without the rest.

The first stage has towers, connectors and the table of embeddings, the last one norm and head, all of them blocks. A
stage keeps the whole structure of the model, so that masks and positions, which follow from the batch that all stages
have, are computed in each as in one process; blocks of others hand on what they get.
"""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from plait.core.errors import ConfigError
from plait.models.crossattend import layers_of
from plait.models.multimodal import MultimodalLM
from plait.training.parallel.deal import PLACE, dealt

_GIVEN = frozenset({"hidden_states", "attention_mask", "position_ids", "past_key_values", "use_cache", "kwargs"})
_GIVEN |= {"cache_position", "encoder_hidden_states", "encoder_attention_mask", "output_attentions", "past_key_value"}


def stages_of(model: MultimodalLM, stages: int, blocks: Sequence[int] = ()) -> list[range]:
    """Which blocks of the decoder each stage has: about equal work, or as many as are given.

    Raises:
        ConfigError: They are not as many as the decoder's.
    """
    learns = any(weight.requires_grad for weight in model.encoders.parameters())  # else it is run once, and kept
    media = _size(model.connectors) + (_size(model.encoders) if learns else 0)
    loads = [_size(layer) for layer in layers_of(model.decoder)]
    return dealt(loads, stages, blocks, before=media, after=_size(model.head))


def owners(model: MultimodalLM, parts: Sequence[range]) -> dict[str, tuple[int, ...]]:
    """The stages that hold each weight: one, or the first and the last, where the head is the table of embeddings."""
    layers, last = layers_of(model.decoder), len(parts) - 1
    holders: dict[int, set[int]] = {}

    def hold(modules: list[nn.Module], stage: int) -> None:
        for weight in (weight for module in modules for weight in module.parameters()):
            holders.setdefault(id(weight), set()).add(stage)

    for stage, part in enumerate(parts):
        hold([layers[number] for number in part], stage)
    inside = {id(module) for layer in layers for module in layer.modules()}
    tables = [part for part in model.decoder.modules() if isinstance(part, nn.Embedding) and id(part) not in inside]
    hold([model.encoders, model.connectors, *tables], 0)
    hold([model.head], last)
    return {name: tuple(sorted(holders.get(id(weight), {last}))) for name, weight in model.named_parameters()}


def keep_only(model: MultimodalLM, part: range, own: set[int]) -> None:
    """Take all out of a model that is another stage's, in place.

    Args:
        model: Its weights stay where they are: only modules are replaced.
        part: Blocks of this stage.
        own: Of its weights, by ``id``.
    """
    layers = layers_of(model.decoder)
    for number, layer in enumerate(layers):
        if number not in part:
            layers[number] = _Passed(layer)
    for path, module in list(model.named_modules()):
        weights = list(module.parameters(recurse=False))
        if weights and not any(id(weight) in own for weight in weights):
            parent, _, name = path.rpartition(".")
            setattr(model.get_submodule(parent), name, _Elsewhere(weights[0]))


class _Passed(nn.Module):
    """In the place of a block of another stage."""

    def __init__(self, block: nn.Module) -> None:
        super().__init__()
        plain = {name: value for name, value in vars(block).items() if isinstance(value, str | int | bool)}
        self.__dict__ |= {name: value for name, value in plain.items() if name not in self.__dict__}  # attention_type

    def forward(self, hidden_states: Tensor, *_: Any, **__: Any) -> Tensor:
        """What came."""
        return hidden_states


class _Elsewhere(nn.Module):
    """In the place of what another stage runs; it only knows device, number format and width."""

    def __init__(self, weight: Tensor) -> None:
        super().__init__()
        self.weight = torch.empty(0, dtype=weight.dtype, device=weight.device)
        self._width = weight.shape[-1] if weight.ndim else 1  # a scalar is no table

    def forward(self, ids: Tensor) -> Tensor:
        """Zeros, where a decoder looks up positions in a table: what comes from the stage before replaces their sum."""
        return self.weight.new_zeros(()).expand(*ids.shape, self._width)


def check(model: nn.Module, objective: object) -> MultimodalLM:
    """See that a model can be cut into stages.

    Raises:
        ConfigError: It cannot; says why.
    """

    def refused(why: str) -> ConfigError:
        return ConfigError(why, place=PLACE, remedy="set it to 1; trainer.parallel.zero divides any model")

    if not isinstance(model, MultimodalLM):
        raise refused(f"{type(model).__name__} cannot be cut into stages: only a decoder with connectors can")
    if model.inside:
        raise refused("media that are read inside the decoder would be needed by every stage")
    if isinstance(objective, nn.Module) and any(True for _ in objective.parameters()):
        raise refused(f"{type(objective).__name__} has weights of its own, or the model's, and is in no stage")
    if any("experts" in name for name, _ in model.decoder.named_modules()):
        raise refused("a mixture of experts has losses in every block, and they would not reach the last stage")
    layers = layers_of(model.decoder)
    if hasattr(model.decoder.base_model, "decoder"):  # OPT and its like, whose stack is model.decoder.layers
        raise refused(f"{type(model.decoder).__name__} has weights between embeddings and blocks")
    for layer in layers:
        takes = set(inspect.signature(type(layer).forward).parameters) - {"self"}
        other = sorted(name for name in takes - _GIVEN if not name.startswith(("position_embeddings", "_")))
        if other:
            raise refused(f"blocks of {type(model.decoder).__name__} take {', '.join(other)}, beside hidden states")
        if layer.state_dict().keys() - {name for name, _ in layer.named_parameters()} and layer.training:
            raise refused(f"blocks of {type(model.decoder).__name__} keep a running state")
    return model


def _size(module: nn.Module) -> int:
    return sum(weight.numel() for weight in module.parameters())
