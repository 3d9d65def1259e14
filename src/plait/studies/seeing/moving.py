"""What happens to features when a picture moves: exactly, of layers and towers before any training."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from plait.models.towers.vit import Absolute, VisionTransformer, ViTSizes
from plait.models.transformer import TransformerSizes
from plait.studies.encoders import EncoderName
from plait.studies.seeing.scenes import FINE, SIDE
from plait.studies.seeing.towers import GRID, maps, tower


def moved_apart(features: Callable[[Tensor], Tensor], pixels: Tensor, *, by: int, cell: int) -> float:
    """How far the features of a moved picture are from the moved features, as a share of the features' norm.

    Args:
        features: Pictures to maps.
        pixels: They are rolled to the right, what leaves comes in again on the left.
        by: Pixels.
        cell: Pixels of a cell of the map; divides ``by``.
    """
    with torch.inference_mode():
        still, moved = features(pixels), features(pixels.roll(by, dims=-1))
        still = still.roll(by // cell, dims=-1)
        return float((moved - still).norm() / (still - still.mean((0, 2, 3), keepdim=True)).norm())


def equivariances(seed: int = 0) -> list[dict[str, Any]]:
    """Of convolutions with circular padding and with zeros, of ViTs with and without positions, and of two towers.

    Moved by one pixel where cells are pixels, else by one cell.
    """
    torch.manual_seed(seed)
    pixels = torch.rand(8, 3, SIDE, SIDE)
    inner = TransformerSizes(d=32, depth=4, heads=4)

    def vit(position: Absolute) -> Callable[[Tensor], Tensor]:
        sizes = ViTSizes(
            transformer=inner, patch=FINE, grid=(GRID, GRID), class_token=False, pool="mean", position=position
        )
        made = VisionTransformer(sizes).eval()
        return lambda x: made.features(x).mT.unflatten(2, (GRID, GRID))

    def of_study(name: EncoderName) -> Callable[[Tensor], Tensor]:
        made = tower(name).eval()
        return lambda x: maps(made, x)[0]

    tried: list[tuple[str, Callable[[Tensor], Tensor], int, int]] = [
        ("convolution, circular padding", nn.Conv2d(3, 16, 3, padding=1, padding_mode="circular"), 1, 1),
        ("convolution, zero padding", nn.Conv2d(3, 16, 3, padding=1), 1, 1),
        ("vit, no positions", vit("none"), FINE, FINE),
        ("vit, learned positions", vit("learned"), FINE, FINE),
        ("vit, sines and cosines", vit("sincos"), FINE, FINE),
        ("cnn of the study, finest map", of_study("cnn"), FINE, FINE),
        ("hybrid of the study", of_study("hybrid"), FINE, FINE),
    ]
    return [
        {"what": name, "pixels": by, "change": moved_apart(features, pixels, by=by, cell=cell)}
        for name, features, by, cell in tried
    ]
