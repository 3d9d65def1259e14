"""Number formats while training: which operations run in bfloat16, and where the true weights are kept.

Trainable weights are always float32 masters: near 1 a bfloat16 weight cannot move by less than 0.4 %, so small updates
would round away (Micikevicius et al., "Mixed Precision Training", ICLR 2018). Forward and backward run under autocast,
which casts what gains and keeps what would lose. bfloat16 has float32's range, so the loss needs no scaling. Frozen
weights keep the format they came in.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterable

import torch

from plait.core.errors import ConfigError


def autocast(device: str, dtype: str) -> contextlib.AbstractContextManager[object]:
    """What to run a forward under.

    Args:
        device: Device type, such as ``cpu``.
        dtype: ``float32`` (as is) or ``bfloat16`` (see :func:`plait.core.device.choose_dtype`).

    Raises:
        ConfigError: Another dtype (float16 would need loss scaling), or the device cannot autocast.
    """
    if dtype == "float32":
        return contextlib.nullcontext()
    if dtype != "bfloat16":
        raise ConfigError(f"cannot train in {dtype}", place="dtype", remedy="choose float32 or bfloat16")
    if not torch.amp.is_autocast_available(device):
        raise ConfigError(f"{device} has no automatic bfloat16", place="dtype", remedy="choose float32")
    return torch.autocast(device, dtype=torch.bfloat16)


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
