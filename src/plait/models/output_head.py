"""The output head: scores of the next token in float32, whatever number format the decoder has."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.distributed.tensor import DTensor

_WORDS = 2_048
"""Words of the vocabulary that are widened at once."""


_CHANGES = ("final_logit_softcapping", "logit_scale", "logits_scaling")
# What Gemma 2, Cohere and Granite do to their scores beyond the head.


def changed_scores(config: Any) -> list[str]:
    """Settings of a decoder's configuration that change scores after the head, which is not done here."""
    return [name for name in _CHANGES if getattr(config, name, None) not in (None, 1, 1.0)]


def float32_scores(head: nn.Module, hidden: Float[Tensor, "n d"]) -> Float[Tensor, "n v"]:
    """Scores of every word: a decoder's head, computed in float32 from its own weights.

    Scores of SmolLM2 are around 20, where bfloat16 has steps of 0.125: two answers that nearly tie get the same score,
    and which one is said is then a matter of their ids. The product alone is widened; the weights keep their values.
    (MiniMax-M1, https://arxiv.org/abs/2506.13585, keeps its head in float32, too: training and serving agree better.)

    A frozen 16-bit head is widened some words at a time, forward and backward, so that no float32 copy of it exists; a
    head that learns is widened whole, so that its gradient arrives.

    Args:
        head: The decoder's; anything but a plain linear layer (one with an adapter, say), and a float64 one, is called
            as it is.
        hidden: Last hidden states.
    """
    if type(head) is not nn.Linear:
        return head(hidden)
    weight, bias = _whole(head.weight), None if head.bias is None else _whole(head.bias)
    if weight.dtype == torch.float64:
        return nn.functional.linear(hidden, weight, bias)
    with torch.autocast(hidden.device.type, enabled=False):
        bias = None if bias is None else bias.float()
        learns = weight.requires_grad or (bias is not None and bias.requires_grad)
        if weight.dtype == torch.float32 or learns:
            return nn.functional.linear(hidden.float(), weight.float(), bias)
        scores: Tensor = _Product.apply(hidden.float(), weight)  # pyright: ignore[reportAssignmentType]
        return scores if bias is None else scores + bias


def _whole(tensor: Tensor) -> Tensor:
    """Gathered, where several processes have its words divided between them."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


class _Product(torch.autograd.Function):
    """``hidden @ weight.T`` with float32 ``hidden`` and a frozen ``weight`` of another format."""

    @staticmethod
    def forward(ctx: Any, hidden: Float[Tensor, "n d"], weight: Tensor) -> Float[Tensor, "n v"]:
        ctx.save_for_backward(weight)
        scores = hidden.new_empty(len(hidden), len(weight))
        for words, wide in Widened(weight, like=hidden):
            torch.mm(hidden, wide.T, out=scores[:, words])
        return scores

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *gradients: Any) -> tuple[Tensor, None]:  # pyright: ignore[reportIncompatibleMethodOverride]
        (weight,) = ctx.saved_tensors
        (of_scores,) = gradients
        of_hidden = of_scores.new_zeros(len(of_scores), weight.shape[1])
        for words, wide in Widened(weight, like=of_hidden):
            of_hidden.addmm_(of_scores[:, words], wide)
        return of_hidden, None


class Widened:
    """The weights of some words after the other in the format of ``like``, all in the same memory.

    Weights that have it come as they are, in one piece.
    """

    def __init__(self, weight: Float[Tensor, "v d"], *, like: Tensor) -> None:
        self.weight = weight
        self.room = None
        if weight.dtype != like.dtype:
            self.room = like.new_empty(min(_WORDS, len(weight)), weight.shape[1])

    def __iter__(self) -> Iterator[tuple[slice, Float[Tensor, "w d"]]]:
        """Which words, and their weights."""
        if self.room is None:
            yield slice(0, len(self.weight)), self.weight
            return
        for start in range(0, len(self.weight), _WORDS):
            part = self.weight[start : start + _WORDS]
            yield slice(start, start + len(part)), self.room[: len(part)].copy_(part)
