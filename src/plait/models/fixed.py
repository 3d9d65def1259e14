"""Numbers that a module computes with and never learns: on the device of the data, never cast, never saved."""

import torch
from torch import Tensor


class Fixed:
    """A constant of a module that is no buffer of it.

    A buffer would be cast with the weights, and frequencies of a rotation in bfloat16 turn position 1,000 to somewhere
    else; it would also be lost when a model is built on the meta device.

    Args:
        values: On the CPU.
    """

    def __init__(self, values: Tensor) -> None:
        self.values = values
        self._copies: dict[torch.device, Tensor] = {}

    def on(self, device: torch.device) -> Tensor:
        """The values on a device; copied there once. Metal has no float64 and gets float32."""
        if device == self.values.device:
            return self.values
        if device not in self._copies:
            wide = self.values.dtype == torch.float64 and device.type == "mps"
            self._copies[device] = (self.values.float() if wide else self.values).to(device)
        return self._copies[device]
