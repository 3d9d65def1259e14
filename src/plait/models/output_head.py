"""The output head: scores of the next token in float32, whatever number format the decoder has."""

from __future__ import annotations

from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn


class Float32Head:
    """A decoder's head, computed in float32 from its own weights.

    Scores of SmolLM2 are around 20, where bfloat16 has steps of 0.125: two answers that nearly tie get the same score,
    and which one is said is then a matter of their ids. The product alone is widened; the weights keep their values.
    (MiniMax-M1, https://arxiv.org/abs/2506.13585, keeps its head in float32, too: training and serving agree better.)

    A frozen 16-bit head is turned into float32 once and kept, 4 bytes a weight, until another one or one that learns
    comes; a head that learns is turned at each call, so that its gradient arrives. Weights that are written through
    ``.data`` behind torch's back are not noticed. Copies and pickles of this object start empty.
    """

    def __init__(self) -> None:
        self._kept: tuple[Tensor, int, Tensor] | None = None  # the head's weight, its version, and its copy

    def __reduce__(self) -> tuple[Any, ...]:
        return type(self), ()

    def __call__(self, head: nn.Module, hidden: Float[Tensor, "n d"]) -> Float[Tensor, "n v"]:
        """Scores of every word.

        Args:
            head: The decoder's; anything but a plain linear layer (one with an adapter, say) is called as it is.
            hidden: Last hidden states.
        """
        if type(head) is not nn.Linear or head.weight.dtype == torch.float64:
            self._kept = None
            return head(hidden)
        with torch.autocast(hidden.device.type, enabled=False):
            bias = None if head.bias is None else head.bias.float()
            return nn.functional.linear(hidden.float(), self._weight(head.weight), bias)

    def _weight(self, weight: Tensor) -> Tensor:
        if weight.dtype == torch.float32 or weight.requires_grad or weight.is_inference():
            self._kept = None
            return weight.float()
        if self._kept is not None:
            # The old weight is held, so no other one can have got its memory.
            source, version, copy = self._kept
            if source.data_ptr() == weight.data_ptr() and version == weight._version:
                return copy
        with torch.inference_mode(mode=False), torch.no_grad():  # what is made in that mode can never train
            copy = weight.detach().float()
            self._kept = weight.detach(), weight._version, copy
        return copy
