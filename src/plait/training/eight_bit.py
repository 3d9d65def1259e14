"""AdamW with block-wise 8-bit moments: Dettmers et al. (arXiv 2110.02861).

A moment is cut into blocks of :data:`~plait.training.optim.BLOCK` numbers. Each block is divided by its largest
absolute value, and every number is rounded to the nearest of 256 values of a dynamic tree: a decimal exponent from 1e-7
to 1, and the bits that it leaves for the fraction. The map and the blocks are those of bitsandbytes.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional
from torch.optim.optimizer import Optimizer as TorchOptimizer

from plait.training.optim import BLOCK, SMALL

_EXPONENTS = 7


@functools.cache
def dynamic_map(*, signed: bool) -> Tensor:
    """The 256 values that codes stand for, ascending in [-1, 1] or [0, 1]; float32.

    With ``e`` (from 0) of 7 decimal exponents, ``2 ** e`` fractions (twice as many without a sign) are the middles of
    equal parts of [0.1, 1], times ``10 ** (e - 6)``; then 0 and 1. Section 2.2 and appendix F of the paper.
    """
    values = [torch.tensor([0.0, 1.0])]
    for exponent in range(_EXPONENTS):
        count = 2**exponent if signed else 2 ** (exponent + 1)
        edges = torch.linspace(0.1, 1, count + 1)
        middles = (edges[:-1] + edges[1:]) / 2 * 10.0 ** (exponent - _EXPONENTS + 1)
        values += [middles, -middles] if signed else [middles]
    return torch.cat(values).sort().values


@functools.cache
def _search(*, signed: bool) -> tuple[Tensor, Tensor]:
    """What finds the nearest code without a search: by the upper 16 bits of a float32, and the middles between codes.

    Floats that share their sign, exponent and 7 bits of fraction lie between two neighboring middles, or around one:
    the first code and one comparison decide. A binary search takes ten times as long.
    """
    table = dynamic_map(signed=signed)
    middles = (table[:-1] + table[1:]) / 2
    bits = torch.arange(-(2**15), 2**15, dtype=torch.int64) << 16
    ends = [(bits + low).to(torch.int32).view(torch.float32).nan_to_num() for low in (0, 2**16 - 1)]
    first, last = (torch.bucketize(end.clamp(-1, 1), middles, out_int32=True) for end in ends)
    return torch.minimum(first, last), torch.cat([middles, torch.tensor([math.inf])])


def quantize(values: Tensor, *, signed: bool) -> tuple[Tensor, Tensor]:
    """Codes and scales of a tensor.

    Args:
        values: Any shape; float32.
        signed: Whether values below 0 occur.

    Returns:
        One code a number in the order of the indices (uint8), and one scale a block (float32).
    """
    flat = values.reshape(-1)
    blocks = functional.pad(flat, (0, -flat.numel() % BLOCK)).view(-1, BLOCK)
    scales = blocks.abs().amax(1)
    firsts, middles = (part.to(values.device) for part in _search(signed=signed))
    shares = (blocks / scales.clamp_min(1e-38)[:, None]).view(-1)
    codes = firsts.index_select(0, (shares.view(torch.int32) >> 16) + 2**15)
    codes += shares > middles.index_select(0, codes)
    return codes.to(torch.uint8)[: flat.numel()], scales


def dequantize(codes: Tensor, scales: Tensor, *, signed: bool) -> Tensor:
    """The numbers of :func:`quantize`, rounded, flat; float32."""
    table = dynamic_map(signed=signed).to(codes.device)
    return table.index_select(0, codes.int()) * scales.repeat_interleave(BLOCK)[: codes.numel()]


class AdamW8bitUpdate(TorchOptimizer):
    """AdamW whose moments are kept in 8 bits, and computed with in float32.

    Args:
        groups: Named weights with their rates and decay.
        betas: Memory of the gradient's mean and of its square.
        eps: Added to the root of the second moment.
    """

    def __init__(self, groups: list[dict[str, Any]], *, betas: tuple[float, float], eps: float) -> None:
        super().__init__(groups, {"betas": betas, "eps": eps, "weight_decay": 0.0})

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> None:  # pyright: ignore[reportIncompatibleMethodOverride]
        """One update of every weight that has a gradient."""
        for group in self.param_groups:
            for weight in group["params"]:
                if weight.grad is not None:
                    self._update(weight, group)

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Take over a state; torch's alone would turn codes into floats."""
        super().load_state_dict(state_dict)
        numbered = [weight for group in self.param_groups for weight in group["params"]]
        for number, saved in state_dict["state"].items():
            weight = numbered[number]
            self.state[weight] = {
                key: value.to(weight.device) if isinstance(value, Tensor) and key != "step" else value
                for key, value in saved.items()
            }

    def _update(self, weight: Tensor, group: dict[str, Any]) -> None:
        first, second = group["betas"]
        assert weight.grad is not None
        state = self.state[weight]
        mean, square = self._moments(weight, state)
        grad = weight.grad.float()
        mean.lerp_(grad, 1 - first)
        square.lerp_(grad.square(), 1 - second)
        state["step"] += 1
        count = int(state["step"])
        weight.mul_(1 - group["lr"] * group["weight_decay"])
        root = square.sqrt() / math.sqrt(1 - second**count) + group["eps"]
        weight.addcdiv_(mean, root, value=-group["lr"] / (1 - first**count))
        if weight.numel() >= SMALL:
            state["mean"], state["mean_scales"] = quantize(mean, signed=True)
            state["square"], state["square_scales"] = quantize(square, signed=False)

    def _moments(self, weight: Tensor, state: dict[str, Any]) -> tuple[Tensor, Tensor]:
        """Both in float32 and the weight's shape; those of a small weight are the kept ones."""
        if not state:
            state["step"] = torch.tensor(0.0)
            mean, square = (torch.zeros_like(weight, dtype=torch.float32) for _ in range(2))
            if weight.numel() < SMALL:
                state["mean"], state["square"] = mean, square
            return mean, square
        if weight.numel() < SMALL:
            return state["mean"], state["square"]
        mean = dequantize(state["mean"], state["mean_scales"], signed=True)
        square = dequantize(state["square"], state["square_scales"], signed=False)
        return mean.view(weight.shape), square.view(weight.shape)
