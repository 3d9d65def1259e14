"""LoRA on a decoder's linear layers, through peft and in its file format.

``W x + (alpha / rank) B A x`` with B = 0 at the start, so that the adapted model begins as the base model; A is drawn
from torch's generator. Hu et al., https://arxiv.org/abs/2106.09685.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import nn

from plait.core.errors import CheckpointError, ConfigError, PlaitError
from plait.core.snapshot import save_tensors

if TYPE_CHECKING:
    from peft import LoraConfig

WEIGHTS = "adapter_model.safetensors"
CONFIG = "adapter_config.json"
_PREFIX = "base_model.model."
"""What peft writes before the names of a wrapped model's tensors."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Lora:
    """Which matrices get an adapter, and how wide.

    Attributes:
        rank: Rows of A and columns of B.
        alpha: ``alpha / rank`` scales the product.
        targets: Last names of the linear layers, such as ``q_proj``.
        dropout: Share of inputs of A dropped while training.
    """

    rank: int = 16
    alpha: float = 32.0
    targets: tuple[str, ...] = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
    dropout: float = 0.0


def attach(decoder: nn.Module, lora: Lora) -> tuple[str, ...]:
    """Put adapters into a model, in place; its own weights are frozen.

    Returns:
        Names of the tensors that train now.

    Raises:
        ConfigError: A target matches no linear layer, or the decoder reads media inside
            (:func:`plait.models.crossattend.plain` takes that out while adapters are attached or saved).
    """
    if any(".reads." in name for name, _ in decoder.named_parameters()):
        raise ConfigError(
            "the decoder reads media inside: freezing it would freeze what reads, and its names are not those that an "
            "adapter is saved by",
            place="adapters.lora.attach",
            remedy="attach inside `with plait.models.crossattend.plain(decoder):`",
        )
    check_targets(decoder, lora)
    from peft import inject_adapter_in_model

    with _quiet():
        inject_adapter_in_model(_config(lora, base=""), decoder)
    for name, weight in decoder.named_parameters():
        weight.requires_grad_("lora_" in name)
    return tuple(name for name, weight in decoder.named_parameters() if weight.requires_grad)


def check_targets(decoder: nn.Module, lora: Lora) -> None:
    """See that every target names a linear layer; cheap, so that it can be asked before anything trains.

    Raises:
        ConfigError: A target matches none.
    """
    linears = {name.rpartition(".")[2] for name, module in decoder.named_modules() if isinstance(module, nn.Linear)}
    if missing := [target for target in lora.targets if target not in linears]:
        raise ConfigError(
            f"no linear layer is called {', '.join(missing)}; there are {', '.join(sorted(linears))}",
            place="lora.targets",
            remedy="choose among these names",
        )


def save_adapter(decoder: nn.Module, lora: Lora, folder: Path, *, base: str) -> None:
    """Write the adapter as peft does, so that ``PeftModel.from_pretrained(base_model, folder)`` reads it.

    Args:
        decoder: With adapters attached.
        lora: How they were attached.
        folder: Made if it is not there.
        base: Name of the base model, kept in the configuration for people.

    Raises:
        OSError: The disk is full or not writable.
        safetensors.SafetensorError: Likewise.
    """
    from peft import get_peft_model_state_dict

    folder.mkdir(exist_ok=True)
    state = {_PREFIX + name: value for name, value in get_peft_model_state_dict(decoder).items()}
    save_tensors(state, folder / WEIGHTS, metadata={"format": "pt"})
    with _quiet():
        _config(lora, base=base).save_pretrained(str(folder))


def load_adapter(decoder: nn.Module, folder: Path) -> Lora:
    """Attach the adapter of a folder, in place, in the number format of the decoder's own weights.

    Raises:
        CheckpointError: A file is missing or damaged, it is no LoRA, or it does not fit the decoder.
    """
    lora = _read_config(folder)
    try:
        state = load_file(folder / WEIGHTS)
    except (OSError, SafetensorError) as error:
        raise CheckpointError(
            f"cannot be read: {error}", place=str(folder / WEIGHTS), remedy="use an undamaged copy"
        ) from error
    attach(decoder, lora)
    from peft import set_peft_model_state_dict

    state = {name.removeprefix(_PREFIX): value for name, value in state.items()}
    with _quiet():
        try:
            found = set_peft_model_state_dict(decoder, state)
        except RuntimeError as error:
            raise CheckpointError(
                f"the adapter does not fit the decoder: {str(error).splitlines()[-1].strip()}",
                place=str(folder),
                remedy="use the decoder it was trained on",
            ) from error
    missing = [name for name in found.missing_keys if "lora_" in name]
    if missing or found.unexpected_keys:
        odd = (missing + found.unexpected_keys)[0]
        raise CheckpointError(
            f"the adapter does not fit the decoder: {len(missing)} tensors are missing, "
            f"{len(found.unexpected_keys)} have no place, such as {odd}",
            place=str(folder),
            remedy="use the decoder it was trained on",
        )
    dtype = next((w.dtype for n, w in decoder.named_parameters() if "lora_" not in n), torch.float32)
    for name, weight in decoder.named_parameters():
        if "lora_" in name:
            weight.data = weight.data.to(dtype)
            weight.requires_grad = False
    return lora


def cast_inputs(decoder: nn.Module, *, enabled: bool) -> None:
    """Whether adapters turn their input into their own number format, as peft has them do.

    Under autocast that is waste: float32 adapters get a float32 copy of every activation, which autocast turns back
    at once. A quarter of a training step of SmolLM2-135M on a CPU.
    """
    from peft.tuners.lora import LoraLayer

    for module in decoder.modules():
        if isinstance(module, LoraLayer):
            module.cast_input_dtype_enabled = enabled


def merge(decoder: nn.Module) -> int:
    """Fold every adapter into its matrix, computed in float32 and rounded once, and take the adapters out.

    Returns:
        How many matrices changed.
    """
    from peft.tuners.lora import LoraLayer

    merged = 0
    for name, module in list(decoder.named_modules()):
        if isinstance(module, LoraLayer):
            base = module.get_base_layer()
            assert isinstance(base, nn.Linear)
            delta = torch.zeros_like(base.weight, dtype=torch.float32)
            for adapter in module.active_adapters:
                a, b = (part[adapter].get_parameter("weight").float() for part in (module.lora_A, module.lora_B))
                delta += module.scaling[adapter] * (b @ a)
            base.weight.data = (base.weight.data.float() + delta).to(base.weight.dtype)
            parent, _, last = name.rpartition(".")
            setattr(decoder.get_submodule(parent), last, base)
            merged += 1
    return merged


def _config(lora: Lora, *, base: str) -> LoraConfig:
    from peft import LoraConfig

    return LoraConfig(
        task_type="CAUSAL_LM",
        base_model_name_or_path=base,
        r=lora.rank,
        lora_alpha=lora.alpha,  # pyright: ignore[reportArgumentType] (peft takes a float as well)
        lora_dropout=lora.dropout,
        target_modules=list(lora.targets),
        inference_mode=bool(base),
    )


def _read_config(folder: Path) -> Lora:
    from plait.core.files import read_json

    path = folder / CONFIG
    try:
        record = read_json(path)
        if record["peft_type"] != "LORA":
            raise CheckpointError(f"peft_type is {record['peft_type']!r}", place=str(path), remedy="give a LoRA")
        return Lora(
            rank=record["r"],
            alpha=float(record["lora_alpha"]),
            targets=tuple(sorted(record["target_modules"])),
            dropout=float(record["lora_dropout"]),
        )
    except CheckpointError:
        raise
    except (PlaitError, OSError, KeyError, TypeError, ValueError) as error:
        raise CheckpointError(f"cannot be read: {error}", place=str(path), remedy="use an undamaged copy") from error


@contextmanager
def _quiet() -> Iterator[None]:
    """Without peft's warnings about how it speaks to transformers, which its users cannot act on."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)
        yield
