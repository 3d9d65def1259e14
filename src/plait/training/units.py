"""What a step works on, over all processes: samples, tokens, padding, places of media, floating-point operations."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from plait.core import collectives
from plait.core.grid import Grid
from plait.core.tensors import Batch


@dataclass(frozen=True, slots=True, kw_only=True)
class Units:
    """Of one step.

    Attributes:
        samples: In it.
        tokens: Positions that are not padding.
        positions: All, padding included.
        media: Positions that stand for a modality, such as ``{"image": 384}``.
        flops: Floating-point operations that the model asks for; 0 if unknown.
    """

    samples: int
    tokens: int
    positions: int
    media: Mapping[str, int] = field(default_factory=dict[str, int])
    flops: float = 0.0

    def shares(self) -> dict[str, float]:
        """As shares of all positions, which with the text add up to 1: ``padding``, ``image_tokens`` and so on."""
        of = max(self.positions, 1)
        found = {"padding": self.positions - self.tokens}
        found |= {f"{name}_tokens": count for name, count in self.media.items()}
        return {name: round(count / of, 6) for name, count in found.items()}


def placeholders(model: nn.Module) -> Mapping[str, int]:
    """Which token stands for which modality (:class:`plait.models.multimodal.MultimodalLM`); none elsewhere."""
    found = getattr(model, "placeholders", None)
    return found if isinstance(found, Mapping) else {}


def total_units(
    micro: Sequence[Batch],
    grid: Grid,
    *,
    placeholders: Mapping[str, int] | None = None,
    flops: Callable[[Batch], float] | None = None,
) -> Units:
    """Count a step of all processes together; all of them call this, and it takes one message.

    Args:
        micro: Micro-batches of this process, before rows are shared.
        grid: Where it is among the others: those that get the same batches count them once.
        placeholders: See :func:`placeholders`; the same in all processes.
        flops: Operations of a batch.
    """
    media = dict(placeholders or {})
    counts: list[float] = [0.0] * (4 + len(media))
    for batch in micro:
        own = [float(len(batch.sample_ids)), float(batch.segment_ids.numel()), flops(batch) if flops else 0.0]
        own += _counts(batch, list(media.values()))
        counts = [a + b for a, b in zip(counts, own, strict=True)]
    total = collectives.all_reduce_sum(torch.tensor(counts, dtype=torch.float64), grid.group("data"))
    samples, positions, work, tokens, *of_media = total.tolist()
    return Units(
        samples=int(samples),
        tokens=int(tokens),
        positions=int(positions),
        media=dict(zip(media, map(int, of_media), strict=True)),
        flops=work,
    )


def _counts(batch: Batch, ids: Sequence[int]) -> list[float]:
    """Positions that are not padding, and of these those of each id; one transfer from a GPU."""
    there = batch.segment_ids != 0
    found: list[Tensor] = [there.sum(), *(((batch.token_ids == one) & there).sum() for one in ids)]
    return [float(count) for count in torch.stack(found).tolist()]
