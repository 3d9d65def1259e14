"""What a connector costs, counted on torch's meta device: no weight is drawn and no product computed."""

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch.utils.flop_counter import FlopCounterMode

from plait.core.tensors import Patches
from plait.models import specs
from plait.models.build import build_connector, build_reading


@dataclass(frozen=True, slots=True, kw_only=True)
class ConnectorAccount:
    """What one picture, sound or video costs in a connector.

    Attributes:
        parameters: Weights, of layers that read inside the decoder too.
        tokens: That the connector makes of one.
        slots: Places that these take in the text: one for all of them where they are read inside the decoder.
        flops: Operations of one forward pass; without the layers inside the decoder.
        inside: Weights of the layers inside the decoder, which every text token passes.
    """

    parameters: int
    tokens: int
    slots: int
    flops: int
    inside: int


def connector_account(
    spec: specs.Connector, *, cells: tuple[int, ...], d_in: int, d_out: int, layers: int
) -> ConnectorAccount:
    """Count what a picture of so many cells costs.

    Args:
        spec: Of the connector.
        cells: Rows and columns of the tower's features; of a video, frames before them.
        d_in: Their width.
        d_out: Width of the decoder.
        layers: Of the decoder.

    Example:
        LLaVA-1.5's projector on CLIP ViT-L/14 at 336 pixels, for a decoder of width 4,096:

        >>> spec = specs.Mlp(norm=False)
        >>> found = connector_account(spec, cells=(24, 24), d_in=1024, d_out=4096, layers=32)
        >>> f"{found.parameters:,} weights, {found.tokens} tokens, {found.flops / 1e9:.1f} GFLOP"
        '20,979,712 weights, 576 tokens, 24.2 GFLOP'
    """
    with torch.device("meta"):
        words = (torch.zeros(2, d_out), torch.zeros(d_out, d_out)) if isinstance(spec, specs.Words) else None
        connector: Any = build_connector(spec, d_in=d_in, d_out=d_out, words=words).eval()
        reading: list[Any] = []
        if isinstance(spec, specs.GatedCrossAttention):
            reading = build_reading(spec, d_in=d_in, d=d_out, layers=layers)
        grid = torch.tensor([[1, *cells][-3:]], device="cpu")
        features = Patches(values=torch.zeros(math.prod(cells), d_in), grid=grid)
        connector.requires_grad_(
            requires_grad=False
        )  # the counter wants all inputs of modules to have a gradient, or none
        with FlopCounterMode(display=False) as counter:
            connector(features)
    tokens = int(connector.grid_out(grid).prod())
    inside = sum(weight.numel() for layer in reading if layer is not None for weight in layer.parameters())
    return ConnectorAccount(
        parameters=sum(weight.numel() for weight in connector.parameters()) + inside,
        tokens=tokens,
        slots=1 if reading else tokens,
        flops=counter.get_total_flops(),
        inside=inside,
    )
