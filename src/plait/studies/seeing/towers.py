"""The four encoders at equal operations, what they cost, and what encoders of published sizes cost."""

from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from functools import cache
from typing import Any

import torch
from torch import nn

from plait.models import specs
from plait.models.build import build_encoder
from plait.models.measure import account
from plait.models.position.absolute import SinCosGrid
from plait.models.towers.hybrid import HybridTower, OnCells, attention_stage, early_convolutions
from plait.models.towers.resnet import ResNet, ResNetSizes
from plait.models.towers.swin import Swin, SwinSizes
from plait.models.towers.vit import VisionTransformer, ViTSizes
from plait.models.transformer import Transformer, TransformerSizes
from plait.studies.encoders import EncoderName
from plait.studies.seeing.scenes import FINE, SIDE

GRID = SIDE // FINE
"""Cells a side of the finest map of every tower."""


@dataclass(frozen=True, slots=True, kw_only=True)
class TowerCost:
    """What a tower costs.

    Attributes:
        encoder: Its name.
        size: Pixels a side.
        weights: Numbers that learn.
        flops: Of one picture forward, two for each multiply-add.
        tokens: That come out.
    """

    encoder: str
    size: int
    weights: int
    flops: int
    tokens: int


def _cnn() -> ResNet:
    return ResNet(ResNetSizes(depths=(2, 2), widths=(28, 56), bottleneck=False, d_stem=28))


def _vit(size: int = SIDE) -> VisionTransformer:
    inner = TransformerSizes(d=32, depth=4, heads=4)
    grid = (size // FINE, size // FINE)
    return VisionTransformer(
        ViTSizes(transformer=inner, patch=FINE, grid=grid, position="sincos", class_token=False, pool="mean")
    )


def _swin() -> Swin:
    return Swin(SwinSizes(d=32, depths=(2, 3), heads=(4, 8), window=4, patch=FINE, drop_path=0.0))


def _hybrid() -> HybridTower:
    cells = OnCells(Transformer(TransformerSizes(d=32, depth=3, heads=4)), absolute=SinCosGrid(32))
    return HybridTower([early_convolutions((24, 48), 32), attention_stage(cells)])


_TOWERS: Mapping[EncoderName, Callable[[], nn.Module]] = {"cnn": _cnn, "vit": _vit, "swin": _swin, "hybrid": _hybrid}


def tower(name: EncoderName) -> nn.Module:
    """A tower for pictures of 32 pixels, its weights drawn from torch's generator."""
    return _TOWERS[name]()


@cache
def tower_cost(name: EncoderName) -> TowerCost:
    """What a tower of this study costs.

    Example:
        >>> tower_cost("vit").flops, tower_cost("vit").weights
        (8585216, 52448)
    """
    return _counted(name, _TOWERS[name], SIDE)


def _counted(name: str, build: Callable[[], nn.Module], size: int) -> TowerCost:
    found = account(build, size)
    return TowerCost(encoder=name, size=size, weights=found.parameters, flops=found.flops, tokens=found.tokens)


PUBLISHED: Mapping[str, tuple[specs.Part, float, str]] = {
    "resnet-50": (specs.ResNet(depth=50), 4.1, "https://arxiv.org/abs/2010.11929; torchvision's table: 4.09"),
    "swin-t": (specs.Swin(), 4.5, "https://arxiv.org/abs/2103.14030, table 1"),
    "vit-s/16": (specs.ViT(), 4.6, "https://arxiv.org/abs/2012.12877, table 5"),
    "vit-b/16": (specs.ViT(d=768, heads=12), 17.6, "https://arxiv.org/abs/2012.12877; timm"),
}
"""Encoders of published sizes: settings, published billions of multiply-adds at 224 pixels, where from."""


def published_costs() -> list[dict[str, Any]]:
    """Counted beside published, at 224 pixels."""
    found: list[dict[str, Any]] = []
    for name, (_, gmacs, source) in PUBLISHED.items():
        cost = _known(name)
        found.append({**asdict(cost), "gmacs": cost.flops / 2e9, "published_gmacs": gmacs, "source": source})
    return found


@cache
def _known(name: str) -> TowerCost:
    return _counted(name, lambda: build_encoder(PUBLISHED[name][0]), 224)


def growing_costs(sizes: tuple[int, ...]) -> list[dict[str, Any]]:
    """Operations of ViT-Ti's width with patches of 4 pixels and of Swin-T's first stage, at growing pictures.

    Both see cells of 4 pixels and have one width, so that only the attention differs: over the whole map, or in windows
    of 7 x 7 cells. Sizes are multiples of 28, so that no window is filled up.
    """
    return [asdict(_grown(name, size)) for size in sizes for name in ("vit", "swin")]


@cache
def _grown(name: str, size: int) -> TowerCost:
    if name == "swin":
        return _counted(name, lambda: Swin(SwinSizes(d=96, depths=(2,), heads=(3,))), size)
    inner, grid = TransformerSizes(d=96, depth=2, heads=3), (size // FINE, size // FINE)
    vit = ViTSizes(transformer=inner, patch=FINE, grid=grid, class_token=False, pool="mean")
    return _counted(name, lambda: VisionTransformer(vit), size)


def block_macs(cells: int, d: int, *, seen: int) -> int:
    """Multiply-adds of a block by formula: ``12 n d^2 + 2 n s d``, where each of n cells sees s.

    Equations 1 and 2 of the Swin paper, and ``8 n d^2`` for the feed-forward network of four times the width.

    Example:
        >>> block_macs(64, 32, seen=64) * 4 * 2 + 2 * 64 * 48 * 32  # the ViT of the study, embedding and all
        8585216
    """
    return 12 * cells * d**2 + 2 * cells * seen * d


def maps(encoder: nn.Module, pixels: torch.Tensor) -> list[torch.Tensor]:
    """What a tower gives to the neck: its maps from the finest of 8 x 8 cells on, ``b d rows columns``."""
    if isinstance(encoder, VisionTransformer):
        return [encoder.features(pixels).mT.unflatten(2, (GRID, GRID))]
    if isinstance(encoder, Swin):
        first = encoder.stages(pixels)
        return [first[0], encoder.norm(first[1].permute(0, 2, 3, 1)).permute(0, 3, 1, 2)]
    if isinstance(encoder, ResNet):
        return encoder.stages(pixels)
    assert isinstance(encoder, HybridTower)
    return encoder.stages(pixels)[-1:]
