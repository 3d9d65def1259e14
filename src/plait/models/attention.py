"""Masks and positions from segment ids: samples packed in one row do not see each other."""

import torch
from jaxtyping import Float, Int
from torch import Tensor


def causal_mask(segment_ids: Int[Tensor, "b t"], dtype: torch.dtype) -> Float[Tensor, "b 1 t t"]:
    """Additive mask: 0 where a position may look, the lowest number of ``dtype`` elsewhere.

    A position sees itself and what stands before it in its own segment. Padding (segment 0) sees itself only, so that
    no row of the softmax is empty.

    Example:
        Segments ``1 1 2 0`` give the rows ``x...``, ``xx..``, ``..x.``, ``...x``.
    """
    t = segment_ids.shape[1]
    same = segment_ids[:, :, None] == segment_ids[:, None, :]
    before = torch.ones(t, t, dtype=torch.bool, device=segment_ids.device).tril()
    itself = torch.eye(t, dtype=torch.bool, device=segment_ids.device)
    seen = (same & before & (segment_ids != 0)[:, :, None]) | itself
    mask = torch.zeros(seen.shape, dtype=dtype, device=segment_ids.device)
    return mask.masked_fill_(~seen, torch.finfo(dtype).min)[:, None]


def positions(segment_ids: Int[Tensor, "b t"]) -> Int[Tensor, "b t"]:
    """Position inside the own segment, from 0.

    Example:
        Segments ``1 1 1 2 2 0`` give ``0 1 2 0 1 0``.
    """
    index = torch.arange(segment_ids.shape[1], device=segment_ids.device).expand_as(segment_ids)
    starts = torch.ones_like(segment_ids, dtype=torch.bool)
    starts[:, 1:] = segment_ids[:, 1:] != segment_ids[:, :-1]
    return index - torch.where(starts, index, 0).cummax(dim=1).values
