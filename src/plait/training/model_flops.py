"""Floating-point operations that a model asks for in a training step, for MFU: without padding, without recomputing.

MFU is that over what the device could do in the time (Chowdhery et al., PaLM, https://arxiv.org/abs/2204.02311,
appendix B). Work on padding, on masked pairs of positions, and what is computed twice to save memory are no part of it,
so that they show as lost.
"""

# torch's annotations are partial: its members count as partially unknown.
# pyright: reportUnknownMemberType=false

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from plait.core.tensors import Batch, Patches
from plait.models.dual import DualEncoder
from plait.models.multimodal import MultimodalLM
from plait.models.views import ViewEncoder
from plait.training.cost import DecoderShape, Gradients, linear_flops

_ALIKE = 0.02
"""How far the weights that sizes tell may be from those that are there: biases, and no other kind of block."""


def shape_of(decoder: nn.Module) -> DecoderShape | None:
    """Sizes of a decoder in memory, adapters left out; None where its weights are not those of a Llama-like one."""
    try:
        shape = DecoderShape.from_config(getattr(decoder, "config", None))
    except (AttributeError, TypeError):
        return None
    own = {id(w): w.numel() for name, w in decoder.named_parameters() if "lora_" not in name and ".reads." not in name}
    return shape if abs(sum(own.values()) / shape.params - 1) <= _ALIKE else None


def decoder_flops_of(
    batch: Batch, shape: DecoderShape, *, gradients: Gradients, adapters: int = 0, passed: int = 0
) -> float:
    """A batch of documents through a decoder and back.

    Args:
        batch: Padding is not counted, nor attention between documents; within one all pairs are, as in ``6 N D``
            accounts, though the half above the diagonal is masked.
        shape: Of the decoder.
        gradients: Of its own weights.
        adapters: Weights of adapters, which every token passes and which learn.
        passed: Further weights of the kind: layers that read inside the decoder.
    """
    lengths = document_lengths(batch.segment_ids)
    tokens, pairs = int(lengths.sum()), float((lengths.double() ** 2).sum())
    attention = 4.0 * shape.layers * pairs * shape.d_attention * (1 if gradients == "none" else 3)
    return (
        linear_flops(shape.linear_params, tokens, gradients)
        + linear_flops(shape.vocab * shape.d_model, int(batch.predicting.sum()), gradients)
        + linear_flops(adapters + passed, tokens, "full")
        + attention
    )


def document_lengths(segment_ids: Tensor) -> Tensor:
    """Positions of each document of ``b t`` segments, padding left out, in no order that matters."""
    rows = torch.arange(len(segment_ids), device=segment_ids.device)[:, None]
    width = int(segment_ids.max()) + 1 if segment_ids.numel() else 1
    counts = torch.bincount((rows * width + segment_ids).flatten(), minlength=len(segment_ids) * width)
    return counts.view(-1, width)[:, 1:].flatten()


def multimodal_flops(model: MultimodalLM) -> Callable[[Batch], float] | None:
    """What a batch costs a decoder that reads media, with the weights that learn now; None where sizes are unknown.

    Towers are left out: they are frozen, and encode before the step.
    """
    shape = shape_of(model.decoder)
    if shape is None:
        return None
    learns = {name: weight.numel() for name, weight in model.decoder.named_parameters() if weight.requires_grad}
    adapters = sum(count for name, count in learns.items() if "lora_" in name)
    inside = sum(weight.numel() for name, weight in model.decoder.named_parameters() if ".reads." in name)
    own = any("lora_" not in name and ".reads." not in name for name in learns)
    media = MediaFlops(dict(model.connectors.items()))

    def flops(batch: Batch) -> float:
        of_text = decoder_flops_of(
            batch, shape, gradients="full" if own else "through", adapters=adapters, passed=inside
        )
        return of_text + media(batch)

    return flops


def dual_flops(model: DualEncoder, *, pairs: int, width: int) -> Callable[[Batch], float]:
    """What a batch costs a dual encoder: heads, the towers that learn, and every picture beside every text.

    Args:
        model: With the weights that learn now.
        pairs: Of a step, in all processes and micro-batches.
        width: Of the shared space.
    """
    picture = nn.Sequential(model.tower, _Pooled(model.image)) if model.tower is not None else _Pooled(model.image)
    words = _Pooled(model.text)
    text = words if model.text_tower is None else nn.Sequential(model.text_tower, words)
    parts: dict[str, nn.Module] = {"image": picture, "text": text}
    media = MediaFlops(parts | ({"audio": _Pooled(model.audio)} if model.audio is not None else {}))

    def flops(batch: Batch) -> float:
        return media(batch) + 6.0 * len(batch.sample_ids) * pairs * width  # forward, and both sides' gradients

    return flops


def view_flops(model: ViewEncoder, *, share: float = 1.0) -> Callable[[Batch], float]:
    """What a batch of views costs: tower and head, forward and back.

    Args:
        model: With the weights that learn now.
        share: Of that; 2/3 where one of two views goes forward alone.
    """
    media = MediaFlops({"image": nn.Sequential(model.tower, _Pooled(model.head))})
    return lambda batch: share * media(batch)


class _Pooled(nn.Module):
    """A head on the mean of an item's rows."""

    def __init__(self, head: nn.Module) -> None:
        super().__init__()
        self.head = head

    def forward(self, media: Patches) -> Tensor:
        """Of one item."""
        return self.head(media.values.mean(0, keepdim=True))


class MediaFlops:
    """Operations of what media pass on their way into a model, forward and back, counted once for each size.

    Counted by torch on the meta device: nothing is computed, and no random number drawn.

    Args:
        modules: By modality; read :class:`plait.core.tensors.Patches`. Their weights learn or not as they are now.
    """

    def __init__(self, modules: Mapping[str, nn.Module]) -> None:
        self._modules = {name: _on_meta(module) for name, module in modules.items()}
        self._known: dict[tuple[str, tuple[int, ...], int], float] = {}

    def __call__(self, batch: Batch) -> float:
        """Of all items of a batch."""
        found = 0.0
        for modality, media in batch.media.items():
            if modality in self._modules:
                sizes = media.grid.tolist()
                found += sum(self._one(modality, tuple(size), media.values.shape[1]) for size in sizes)
        return found

    def _one(self, modality: str, grid: tuple[int, ...], width: int) -> float:
        key = (modality, grid, width)
        if key not in self._known:
            rows = int(torch.tensor(grid).prod())
            patches = Patches(values=torch.zeros(rows, width, device="meta"), grid=torch.tensor([grid]))
            self._known[key] = counted(lambda: self._modules[modality](patches))
        return self._known[key]


def counted(work: Callable[[], Any]) -> float:
    """Operations of what ``work`` computes, and of its gradient if anything in it learns."""
    with FlopCounterMode(display=False) as counter:
        found = [one for one in _tensors(work()) if one.requires_grad]
        if found:
            torch.stack([one.sum() for one in found]).sum().backward()
    return float(counter.get_total_flops())


def _tensors(found: Any) -> list[Tensor]:
    if isinstance(found, Tensor):
        return [found]
    if isinstance(found, Patches):
        return [found.values]
    return [tensor for one in found for tensor in _tensors(one)] if isinstance(found, tuple | list) else []


def _on_meta(module: nn.Module) -> nn.Module:
    """A copy without numbers; dropout off."""
    memo: dict[int, Any] = {}
    for weight in module.parameters():
        empty = torch.empty_like(weight, device="meta", dtype=torch.float32)
        memo[id(weight)] = nn.Parameter(empty, requires_grad=weight.requires_grad)
    memo |= {id(buffer): torch.empty_like(buffer, device="meta") for buffer in module.buffers()}
    return copy.deepcopy(module, memo).eval()
