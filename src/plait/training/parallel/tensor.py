"""Tensor parallelism: processes that get the same batch divide the matrices of a language model between them.

Of two matrices that follow each other the first is cut by its outputs, the second by its inputs: each process computes
its own heads of an attention, its own part of a feed-forward network, and one sum over the processes completes the
pair; backward, one more. The vocabulary is cut, too: of the table of embeddings and of the output head each process
has its own words, and of the scores it never sees the others' (:mod:`plait.models.fused_head`).

Shoeybi et al., Megatron-LM, https://arxiv.org/abs/1909.08053, section 3. Which matrix is cut how is the plan that
transformers has for each family (``base_model_tp_plan``); torch's tensor parallelism cuts it.
"""

# torch's annotations are partial: its members count as partially unknown.
# pyright: reportUnknownMemberType=false

from __future__ import annotations

import fnmatch
from collections.abc import Iterator, Mapping
from functools import partial
from typing import Any

from torch import Tensor, nn
from torch.distributed import ProcessGroup
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import Replicate, Shard
from torch.distributed.tensor.parallel import (
    ColwiseParallel,
    ParallelStyle,
    RowwiseParallel,
    parallelize_module,
)

from plait.core import collectives
from plait.core.errors import ConfigError
from plait.models.fused_head import fuses

_REMEDY = "set trainer.parallel.tensor to 1"


def divide(model: nn.Module, ranks: DeviceMesh) -> None:
    """Cut the language models in ``model`` for the processes of ``ranks``, in place.

    Weights that are cut become ``DTensor``. Towers and connectors stay whole in every process.

    Args:
        model: Whose language models are of Hugging Face.
        ranks: One-dimensional.

    Raises:
        ConfigError: There is no language model that could be cut, or its heads cannot be dealt out evenly.
    """
    bases = dict(planned(model))
    if not bases:
        raise ConfigError(
            f"{type(model).__name__} has no language model whose family says how it is cut (base_model_tp_plan)",
            place="trainer.parallel.tensor",
            remedy=f"{_REMEDY}, or use a decoder of LLaMA's kin",
        )
    for base in bases.values():
        _check(base.config, ranks.size())
        _blocks(base, ranks)
        _vocabulary(model, base, ranks)


def planned(model: nn.Module) -> Iterator[tuple[str, Any]]:
    """Language models of Hugging Face that say how they are cut, by name: without their heads."""
    for name, module in model.named_modules():
        plan = getattr(getattr(module, "config", None), "base_model_tp_plan", None)
        if plan and isinstance(getattr(module, "layers", None), nn.ModuleList):
            yield name, module


def _check(config: Any, parts: int) -> None:
    for name in ("num_attention_heads", "num_key_value_heads", "intermediate_size"):
        count = getattr(config, name, None)
        if count is not None and count % parts:
            raise ConfigError(
                f"{name} is {count}, which cannot be dealt out evenly to {parts} processes",
                place="trainer.parallel.tensor",
                remedy="set it to a divisor",
            )


def _blocks(base: Any, ranks: DeviceMesh) -> None:
    plan: Mapping[str, str] = base.config.base_model_tp_plan
    matched: set[str] = set()
    for name, module in list(base.named_modules()):
        for pattern, how in plan.items():
            if fnmatch.fnmatchcase(name, pattern):
                matched.add(pattern)
                _cut(base, module, ranks, name=name, how=how)
    if missing := plan.keys() - matched:
        raise ConfigError(
            f"{type(base).__name__} has no {min(missing)}, which its family's plan cuts",
            place="trainer.parallel.tensor",
            remedy=_REMEDY,
        )


def _cut(base: nn.Module, module: nn.Module, ranks: DeviceMesh, *, name: str, how: str) -> None:
    if how == "replicated_with_grad_allreduce":  # it works on this process's heads: its gradient is a part of the sum
        for weight in module.parameters():
            if weight.requires_grad:
                weight.register_hook(partial(_summed, group=ranks.get_group()))
        return
    if how not in ("colwise", "rowwise"):
        raise ConfigError(
            f"{type(base).__name__} has {name} cut {how!r}, which is not done here",
            place="trainer.parallel.tensor",
            remedy=_REMEDY,
        )
    for path, style in _styles(module, how).items():
        linear = module.get_submodule(path) if path else module
        if type(linear) is not nn.Linear:
            raise ConfigError(
                f"{type(base).__name__} has at {name} a {type(linear).__name__}, not a plain linear layer",
                place="trainer.parallel.tensor",
                remedy=_REMEDY,
            )
        parallelize_module(linear, ranks, style)


def _styles(module: nn.Module, how: str) -> dict[str, ParallelStyle]:
    """How the matrices of one linear layer are cut: its own, and those of an adapter beside it (LoRA).

    Of an adapter, the matrix on the side that is not cut stays whole.
    """
    style = ColwiseParallel if how == "colwise" else RowwiseParallel
    if not hasattr(module, "base_layer"):
        return {"": style()}
    beside = module.lora_B if how == "colwise" else module.lora_A
    assert isinstance(beside, nn.ModuleDict)
    if getattr(module, "lora_magnitude_vector", None) or getattr(module, "lora_embedding_A", None):
        raise ConfigError(
            f"an adapter of another kind than plain LoRA at a {type(module).__name__}",
            place="trainer.parallel.tensor",
            remedy=_REMEDY,
        )
    side = "lora_B" if how == "colwise" else "lora_A"
    return {"base_layer": style(), **{f"{side}.{name}": style() for name in beside}}


def _summed(gradient: Tensor, *, group: ProcessGroup) -> Tensor:
    return collectives.all_reduce_sum(gradient.contiguous(), group)


def _vocabulary(model: nn.Module, base: Any, ranks: DeviceMesh) -> None:
    """Cut the embeddings and the head by words, where the head is a plain matrix."""
    owner = next((m for m in model.modules() if getattr(m, "base_model", None) is base and m is not base), None)
    head = getattr(owner, "lm_head", None)
    table = base.get_input_embeddings()
    if head is None or not fuses(head) or type(table) is not nn.Embedding:
        return
    tied = head.weight is table.weight
    parallelize_module(table, ranks, RowwiseParallel(input_layouts=Replicate(), output_layouts=Replicate()))
    if tied:
        head.weight = table.weight
    else:
        parallelize_module(head, ranks, ColwiseParallel(output_layouts=Shard(-1)))
