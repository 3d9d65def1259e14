"""What both sides of ``sft_vs_trl.py`` begin with: equal adapters, so that their loss curves can be compared."""

from __future__ import annotations

import math
import zlib

import torch
from torch import nn


def start_adapters(model: nn.Module) -> int:
    """Draw every LoRA's A from its own place in the decoder (U(-1/sqrt(in), 1/sqrt(in)), as peft does); B stays 0.

    Returns:
        How many were drawn.
    """
    drawn = 0
    for name, weight in model.named_parameters():
        if ".lora_A." in name:
            place = name[name.index("layers.") :].split(".lora_A.")[0]
            generator = torch.Generator().manual_seed(zlib.crc32(place.encode()))
            bound = 1 / math.sqrt(weight.shape[1])
            values = torch.rand(weight.shape, generator=generator) * 2 * bound - bound
            weight.data.copy_(values)
            drawn += 1
    return drawn
