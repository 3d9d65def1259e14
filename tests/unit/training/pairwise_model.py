"""A small dual encoder that hears, pairs of which some have sounds, and gradients of a step: for tests of contrast."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import nn

from plait.core import mesh
from plait.data.pair_batches import PairBatches
from plait.models.dual import DualEncoder
from plait.training.gradient import Sums, accumulate

PAIRS, SOUNDS, WIDTH, SHARED = 14, 3, 6, 5


def head(dropout: float, norm: nn.Module | None = None) -> nn.Module:
    return nn.Sequential(
        nn.Linear(WIDTH, 8), norm or nn.LayerNorm(8), nn.GELU(), nn.Dropout(dropout), nn.Linear(8, SHARED)
    )


def dual(*, dropout: float = 0.0, seed: int = 0, dtype: torch.dtype = torch.float64, batch_norm: bool = False) -> Any:
    torch.manual_seed(seed)
    norm = nn.BatchNorm1d(8) if batch_norm else None
    return DualEncoder(head(dropout, norm), head(dropout), scale=5.0, audio=head(dropout)).to(dtype).train()


def pairs(*, seed: int = 0, dtype: torch.dtype = torch.float64, batch_size: int = PAIRS, **changes: int) -> PairBatches:
    """Batches of pairs; one in five has a sound, and some share a class."""
    generator = torch.Generator().manual_seed(seed)

    def features() -> torch.Tensor:
        return torch.randn(PAIRS, WIDTH, generator=generator, dtype=torch.float64).to(dtype)

    return PairBatches(
        image=features(),
        text=features(),
        texts_of=[(i,) for i in range(PAIRS)],
        classes=torch.arange(PAIRS) // 2,
        ids=[f"s{i}" for i in range(PAIRS)],
        batch_size=batch_size,
        seed=seed,
        audio=features(),
        sounds_of=[(i,) if i % 5 == 0 else () for i in range(PAIRS)],
        **changes,
    )


def gradients(model: nn.Module, objective: Any, micro: Sequence[Any], **options: Any) -> dict[str, torch.Tensor]:
    return gradients_and_sums(model, objective, micro, **options)[0]


def gradients_and_sums(
    model: nn.Module, objective: Any, micro: Sequence[Any], **options: Any
) -> tuple[dict[str, torch.Tensor], Sums]:
    modules = [("", model), *([("objective.", objective)] if isinstance(objective, nn.Module) else [])]
    named = {prefix + name: weight for prefix, module in modules for name, weight in module.named_parameters()}
    for weight in named.values():
        weight.grad = None
    hears = any("audio" in batch.media for batch in micro) or mesh.world() > 1
    weights = {"contrastive-text-audio": 0.3} if hears else {}
    sums = accumulate(model, objective, micro, weights=weights, **options)
    return {name: torch.zeros_like(w) if w.grad is None else w.grad.clone() for name, w in named.items()}, sums


def distance(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> float:
    """Norm of the difference over the norm of the other, all weights together."""
    gap = sum(float((one[n] - other[n]).double().square().sum()) for n in other)
    return math.sqrt(gap / sum(float(g.double().square().sum()) for g in other.values()))
