"""Tensor parallelism: processes that get the same batch divide the matrices of a language model between them.

Of two matrices that follow each other the first is cut by its outputs, the second by its inputs: each process computes
its own heads of an attention, its own part of a feed-forward network, and one sum over the processes completes the
pair; backward, one more. The vocabulary is cut, too: of the table of embeddings and of the output head each process
has its own words, and of the scores it never sees the others' (:mod:`plait.models.fused_head`).

Shoeybi et al., Megatron-LM, https://arxiv.org/abs/1909.08053, section 3. Which matrix is cut how is the plan that
transformers has for each family (``base_model_tp_plan``). Weights that are cut are torch's ``DTensor``, with which each
process computes on its own part: torch's styles of linear layers would sum the gradient of what queries, keys and
values are asked three times instead of once.
"""

# torch's annotations are partial: its members count as partially unknown.
# pyright: reportUnknownMemberType=false

from __future__ import annotations

import fnmatch
from collections.abc import Iterator, Mapping
from functools import partial
from typing import Any

from torch import nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import Shard

from plait.core.errors import ConfigError
from plait.models.fused_head import fuses
from plait.training.parallel.pairs import OF_HEADS, Pairs, place
from plait.training.parallel.sequence import SequencePairs, check_pieces


def divide(model: nn.Module, ranks: DeviceMesh, *, sequence: bool = False) -> frozenset[str]:
    """Cut the language models in ``model`` for the processes of ``ranks``, in place.

    Weights that are cut become ``DTensor``. Towers and connectors stay whole in every process.

    Args:
        model: Whose language models are of Hugging Face.
        ranks: One-dimensional.
        sequence: Whether each process has its piece of the positions between the matrices (:mod:`.sequence`).

    Returns:
        Names of weights that all processes have whole and use for their own positions alone: their gradients are to be
        summed. None without ``sequence``.

    Raises:
        ConfigError: There is no language model that could be cut, or its heads cannot be dealt out evenly; or its
            blocks may do something else across positions than attention.
    """
    bases = dict(planned(model))
    if not bases:
        raise ConfigError(
            f"{type(model).__name__} has no language model whose family says how it is cut (base_model_tp_plan)",
            place="trainer.parallel.tensor",
            remedy="set trainer.parallel.tensor to 1, or use a decoder of LLaMA's kin",
        )
    cuts = {
        name: _cuts(base, parts=ranks.size()) for name, base in bases.items()
    }  # all are looked at before one is cut
    for name, base in bases.items():
        known = {id(module) for module, _ in cuts[name]}
        if sequence:
            check_pieces(base, known)
        _check_whole(base, known)
    partly: set[int] = set()
    for name, base in bases.items():
        pairs = SequencePairs(ranks) if sequence else Pairs(ranks)
        for module, how in cuts[name]:
            pairs.cut(module, how)
        _vocabulary(model, base, pairs)
        if isinstance(pairs, SequencePairs):
            partly |= {id(weight) for weight in pairs.divide(base)}
    return frozenset(name for name, weight in model.named_parameters() if id(weight) in partly)


def planned(model: nn.Module) -> Iterator[tuple[str, Any]]:
    """Language models of Hugging Face that say how they are cut, by name: without their heads."""
    for name, module in model.named_modules():
        plan = getattr(getattr(module, "config", None), "base_model_tp_plan", None)
        if plan and isinstance(getattr(module, "layers", None), nn.ModuleList):
            yield name, module


def _cuts(base: Any, *, parts: int) -> list[tuple[nn.Module, str]]:
    """Modules that are cut, and how: ``colwise``, ``rowwise``, or :data:`OF_HEADS`."""
    for name in ("num_attention_heads", "num_key_value_heads", "intermediate_size"):
        count = getattr(base.config, name, None)
        if count is not None and count % parts:
            raise ConfigError(
                f"{name} is {count}, which cannot be dealt out evenly to {parts} processes",
                place="trainer.parallel.tensor",
                remedy="set it to a divisor",
            )
    plan: Mapping[str, str] = base.config.base_model_tp_plan
    found: list[tuple[nn.Module, str]] = []
    matched: set[str] = set()
    for name, module in base.named_modules():
        for pattern, how in plan.items():
            if not fnmatch.fnmatchcase(name, pattern):
                continue
            matched.add(pattern)
            if how == OF_HEADS:
                found.append((module, how))
                continue
            if how not in ("colwise", "rowwise"):
                raise _refused(f"{type(base).__name__} has {name} cut {how!r}, which is not done here")
            for path in _matrices(module, how):
                linear = module.get_submodule(path) if path else module
                if type(linear) is not nn.Linear:
                    kind = type(linear).__name__
                    raise _refused(f"{type(base).__name__} has at {name} a {kind}, not a plain linear layer")
                found.append((linear, how))
    if missing := plan.keys() - matched:
        raise _refused(f"{type(base).__name__} has no {min(missing)}, which its family's plan cuts")
    return found


def _check_whole(base: Any, cut: set[int]) -> None:
    """See that inside the parts of a block nothing learns on a process's share alone, for its gradient is not summed.

    What stands beside the parts of a block, such as its norms, computes the whole stream in every process.

    Args:
        base: A language model with ``layers``, of which nothing is cut yet.
        cut: Modules that are cut, or work on the heads of one that is, by ``id``.

    Raises:
        ConfigError: Something may.
    """
    for number, block in enumerate(base.layers):
        for part, top in block.named_children():
            if not any(id(module) in cut for module in top.modules()):
                continue
            for path, module in top.named_modules(prefix=part):
                weights = any(True for _ in module.parameters(recurse=False))
                if weights and id(module) not in cut and ".lora_" not in path:
                    kind = f"{type(base).__name__} has at layers.{number}.{path} a {type(module).__name__}"
                    raise _refused(f"{kind} with weights, of which its family's plan does not say how they are cut")


def _refused(cause: str) -> ConfigError:
    return ConfigError(cause, place="trainer.parallel.tensor", remedy="set trainer.parallel.tensor to 1")


def _matrices(module: nn.Module, how: str) -> list[str]:
    """Which matrices of a linear layer are cut: its own, and of an adapter (LoRA) the one on the same side."""
    if not hasattr(module, "base_layer"):
        return [""]
    if getattr(module, "lora_magnitude_vector", None) or not hasattr(module, "lora_A"):
        raise _refused(f"an adapter of another kind than plain LoRA at a {type(module).__name__}")
    side = "lora_B" if how == "colwise" else "lora_A"
    beside = getattr(module, side)
    assert isinstance(beside, nn.ModuleDict)
    return ["base_layer", *(f"{side}.{name}" for name in beside)]


def _vocabulary(model: nn.Module, base: Any, pairs: Pairs) -> None:
    """Cut the embeddings and the head by words, each where it is here and plain; one table that is both where both are.

    A stage of a pipeline may have one of them alone (:mod:`.cut`).
    """
    owner = next((m for m in model.modules() if getattr(m, "base_model", None) is base and m is not base), None)
    head = getattr(owner, "lm_head", None)
    table = base.get_input_embeddings()
    if head is None:
        return
    looked_up, scored = type(table) is nn.Embedding, fuses(head)
    tied = getattr(head, "weight", None) is table.weight
    if tied and not (looked_up and scored):
        return
    if looked_up:
        place(table, "weight", pairs.ranks, placement=Shard(0))
        table.__dict__["forward"] = partial(pairs.words, table)
    if tied:
        head.weight = table.weight
    elif scored:
        place(head, "weight", pairs.ranks, placement=Shard(0))
    if scored and head.bias is not None:
        place(head, "bias", pairs.ranks, placement=Shard(0))
