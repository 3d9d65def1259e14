"""Number formats while training: which operations run in 16 bits, and where the true weights are kept.

Trainable weights are always float32 masters: near 1 a bfloat16 weight cannot move by less than 0.4 %, so small updates
would round away (Micikevicius et al., "Mixed Precision Training", ICLR 2018). Forward and backward run under autocast,
which casts what gains and keeps what would lose. bfloat16 has float32's range, so the loss needs no scaling; small
gradients vanish in float16, so there the loss is scaled up by as much as fits (:class:`LossScale`). Frozen weights keep
the format they came in.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from plait.core.errors import ConfigError

HALF = {"bfloat16": torch.bfloat16, "float16": torch.float16}
"""Formats of autocast."""


def autocast(device: str, dtype: str) -> contextlib.AbstractContextManager[object]:
    """What to run a forward under.

    Args:
        device: Device type, such as ``cpu``.
        dtype: ``float32`` or ``float64`` (as is), ``bfloat16`` or ``float16``; see
            :func:`plait.core.device.choose_dtype`.

    Raises:
        ConfigError: Another dtype, or the device cannot autocast.
    """
    if dtype in ("float32", "float64"):
        return contextlib.nullcontext()
    if dtype not in HALF:
        raise ConfigError(f"cannot train in {dtype}", place="dtype", remedy="choose float32, bfloat16 or float16")
    if not torch.amp.is_autocast_available(device):
        raise ConfigError(f"{device} has no automatic {dtype}", place="dtype", remedy="choose float32")
    return torch.autocast(device, dtype=HALF[dtype])


@dataclass(slots=True, kw_only=True)
class LossScale:
    """Dynamic scale of the loss for float16: halved after an overflow, doubled after ``patience`` steps without one.

    Micikevicius et al., section 3.2; the rules and numbers of torch's ``GradScaler``. The scale is a power of 2, so
    that it rounds nothing.

    Attributes:
        scale: What the loss is multiplied with.
        good: Steps without overflow since the scale last changed.
        patience: After so many it doubles.
    """

    scale: float = 2.0**16
    good: int = 0
    patience: int = 2000

    def unscale(self, grads: Sequence[Tensor]) -> None:
        """Divide gradients by the scale, in place; there may be none."""
        if grads:
            torch._foreach_div_(list(grads), self.scale)

    def update(self, *, finite: bool) -> None:
        """Adapt the scale to a step whose gradients were finite or not."""
        self.good = self.good + 1 if finite else 0
        if not finite:
            self.scale /= 2
        elif self.good == self.patience:
            self.scale, self.good = self.scale * 2, 0


def hold_masters(weights: Iterable[torch.nn.Parameter]) -> int:
    """Turn half-precision weights into float32 in place, exactly; float32 and float64 stay.

    Returns:
        How many tensors were turned.
    """
    turned = 0
    for weight in weights:
        if weight.dtype in (torch.bfloat16, torch.float16):
            weight.data = weight.data.float()
            turned += 1
    return turned
