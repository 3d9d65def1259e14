"""Attention over shared rows, keys and values passed on: each process sees all of them, one part after the other.

Liu et al., Ring attention with blockwise transformers, https://arxiv.org/abs/2310.01889. Softmax runs on from part to
part (Milakov and Gimelshein, https://arxiv.org/abs/1805.02867). Only its logarithm is kept: the backward pass computes
the scores again, tile by tile (Dao, FlashAttention-2, https://arxiv.org/abs/2307.08691, algorithm 2), while keys and
values go round once more together with their gradients. No tensor has as many numbers as there are scores.
"""

# torch's annotations are partial: its members count as partially unknown.
# pyright: reportUnknownMemberType=false

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import pairwise
from typing import Any

import torch
import torch.distributed as dist
from jaxtyping import Bool, Float, Int
from torch import Tensor
from torch.autograd.function import once_differentiable

from plait.core import mesh
from plait.models.sequence.placement import Placement

TILE = 512
"""Positions of queries, and of keys, whose scores are held at once; longer parts are computed in several."""


class View:
    """Who sees whom in shared rows, as one process needs it; made once, used by all layers.

    Args:
        segment_ids: Of the whole rows, the same in all processes. Equal ids see each other; 0 is padding.
        placement: Which positions each process has.
        group: The processes; None: there is only this one.
        causal: Each position sees none after it.
        window: Nor any so far before it; 0: all.
        tile: As :data:`TILE`.
    """

    def __init__(
        self,
        segment_ids: Int[Tensor, "b t"],
        placement: Placement,
        *,
        group: dist.ProcessGroup | None,
        causal: bool = True,
        window: int = 0,
        tile: int = TILE,
    ) -> None:
        self.group = group
        self.causal, self.window = causal, window
        self.rank, self.world = placement.rank, len(placement.ranks)
        self.at = placement.to(segment_ids.device).ranks
        padded = placement.pad(segment_ids, 1)
        self.segments = [padded[:, places] for places in self.at]
        self.pieces = _pieces(len(self.at[0]), tile)
        self.tiles = [self._tiles(source) for source in range(self.world)]

    def seen(self, source: int, queries: slice, keys: slice) -> Bool[Tensor, "b 1 1 q k"]:
        """Which of a process's keys some queries of this one see."""
        gap = self.at[self.rank][queries, None] - self.at[source][keys]
        asks, has = self.segments[self.rank][:, queries, None], self.segments[source][:, None, keys]
        found = (asks == has) & (asks != 0)
        if self.causal:
            found &= gap >= 0
        if self.window:
            found &= gap < self.window
        return found[:, None, None]

    def _tiles(self, source: int) -> list[tuple[slice, slice, bool]]:
        """Pieces of queries and keys of which some see each other, and whether all do."""
        found: list[tuple[slice, slice, bool]] = []
        for queries in self.pieces:
            for keys in self.pieces:
                if self.causal and self.at[self.rank][queries].max() < self.at[source][keys].min():
                    continue
                seen = self.seen(source, queries, keys)
                if bool(seen.any()):
                    found.append((queries, keys, bool(seen.all())))
        return found

    @property
    def scores(self) -> int:
        """Scores that this process computes, of each head and row: how evenly the work lies."""
        return sum((q.stop - q.start) * (k.stop - k.start) for tiles in self.tiles for q, k, _ in tiles)


def ring_attention(
    query: Float[Tensor, "b h p d"],
    key: Float[Tensor, "b k p d"],
    value: Float[Tensor, "b k p e"],
    *,
    view: View,
    scaling: float,
) -> Float[Tensor, "b h p e"]:
    """``softmax(scaling * q k^T) v`` over all positions that the view allows; zero where there are none.

    Every process of the view's group calls it with its own positions, and takes part in the backward pass. Forward it
    sends keys and values ``n - 1`` times; backward again, and their gradients ``n`` times (:func:`ring_bytes`).

    Args:
        query: Of all heads; all three in one number format, which is also that of the result.
        key: Of as many heads or fewer: each serves ``h / k`` query heads in turn (grouped queries).
        value: Likewise; may be of another width.
        view: Who sees whom.
        scaling: Of the scores.
    """
    with torch.autocast(query.device.type, enabled=False):
        return _Ring.apply(query, key, value, view, scaling)  # pyright: ignore[reportReturnType]


def ring_bytes(
    shape: Sequence[int], *, groups: int, width: int, value_width: int, world: int, size: int, wide: int = 0
) -> int:
    """Bytes that a process sends for one forward and backward pass of one attention.

    Args:
        shape: Rows, and positions of each that a process has.
        groups: Heads of keys.
        width: Of a head's keys.
        value_width: Of its values.
        world: Number of processes.
        size: Bytes of a number.
        wide: Bytes of one of a gradient, which is summed in 4 bytes or more; 0: as many.
    """
    rows, positions = shape
    numbers = rows * positions * groups * (width + value_width)
    return numbers * (2 * (world - 1) * size + (world * (wide or size) if world > 1 else 0))


class _Ring(torch.autograd.Function):
    """See :func:`ring_attention`."""

    @staticmethod
    def forward(  # noqa: PLR0917 (the form that autograd calls)
        ctx: Any, query: Tensor, key: Tensor, value: Tensor, view: View, scaling: float
    ) -> Tensor:
        q = query.unflatten(1, (key.shape[1], -1))  # b k m p d
        wide = torch.promote_types(q.dtype, torch.float32)
        out = q.new_zeros(*q.shape[:-1], value.shape[-1], dtype=wide)
        total = q.new_zeros(q.shape[:-1], dtype=wide)
        peak = torch.full_like(total, float("-inf"))
        for source, (k, v) in _around([key, value], view):
            for queries, keys, full in view.tiles[source]:
                scores = _scores(q[..., queries, :], k[..., keys, :], scaling)
                if not full:
                    scores.masked_fill_(~view.seen(source, queries, keys), float("-inf"))
                before, high = peak[..., queries], torch.maximum(peak[..., queries], scores.amax(-1))
                safe = high.masked_fill(high == float("-inf"), 0.0)  # so far only keys that are hidden from this query
                weights, shrink = scores.sub_(safe[..., None]).exp_(), (before - safe).exp()
                total[..., queries] = total[..., queries] * shrink + weights.sum(-1)
                found = _times(weights.to(v.dtype), v[..., keys, :]).to(wide)
                out[..., queries, :] = out[..., queries, :] * shrink[..., None] + found
                peak[..., queries] = high
        blind = total == 0
        # Of a query that sees nothing every weight must come out as zero: exp(score - inf).
        log = (peak + total.log()).masked_fill(blind, float("inf"))
        out = (out / total.masked_fill(blind, 1.0)[..., None]).to(query.dtype).flatten(1, 2)
        ctx.view, ctx.scaling = view, scaling
        ctx.save_for_backward(query, key, value, out, log)
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *gradients: Any) -> tuple[Tensor | None, ...]:  # pyright: ignore[reportIncompatibleMethodOverride]
        query, key, value, out, log = ctx.saved_tensors
        with torch.autocast(query.device.type, enabled=False):
            found = _backward((query, key, value, out, gradients[0]), log, view=ctx.view, scaling=ctx.scaling)
        return (*found, None, None)


def _backward(tensors: Sequence[Tensor], log: Tensor, *, view: View, scaling: float) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of queries, keys and values."""
    query, key, value, out, slope = tensors
    q, o, g = (x.unflatten(1, (key.shape[1], -1)) for x in (query, out, slope))
    wide = torch.promote_types(q.dtype, torch.float32)
    mean = (g.to(wide) * o.to(wide)).sum(-1)
    of_q = torch.zeros_like(q, dtype=wide)
    coming: _Passing | None = None
    sums: list[Tensor] = []
    for source, (k, v) in _around([key, value], view):
        sums = [torch.zeros_like(x, dtype=wide, memory_format=torch.contiguous_format) for x in (k, v)]
        of_k, of_v = sums
        for queries, keys, full in view.tiles[source]:
            q_tile, g_tile, k_tile = q[..., queries, :], g[..., queries, :], k[..., keys, :]
            weights = _scores(q_tile, k_tile, scaling).sub_(log[..., queries, None]).exp_()
            if not full:
                weights.masked_fill_(~view.seen(source, queries, keys), 0.0)
            of_v[..., keys, :] += _times_t(weights.to(v.dtype), g_tile).to(wide)
            of_weights = _scores(g_tile, v[..., keys, :], 1.0)
            of_scores = weights.mul_(of_weights.sub_(mean[..., queries, None])).mul_(scaling).to(q.dtype)
            of_q[..., queries, :] += _times(of_scores, k_tile).to(wide)
            of_k[..., keys, :] += _times_t(of_scores, q_tile).to(wide)
        if coming is not None:  # what the processes before this one found for the same keys
            torch._foreach_add_(sums, coming.wait())
        coming = _Passing(sums, view) if view.world > 1 else None
    if coming is not None:
        sums = coming.wait()  # home, after one more hop
    return of_q.flatten(1, 2).to(query.dtype), sums[0].to(key.dtype), sums[1].to(value.dtype)


# --- tiles ---------------------------------------------------------------------------------------------------------


def _pieces(count: int, tile: int) -> list[slice]:
    """Evenly many positions each, an even number of pieces: zigzag has two runs of positions."""
    number = max(1, -(-count // (2 * tile))) * 2
    bounds = [place * count // number for place in range(number + 1)]
    return [slice(begin, end) for begin, end in pairwise(bounds) if end > begin]


def _scores(q: Float[Tensor, "b k m q d"], k: Float[Tensor, "b k s d"], scaling: float) -> Float[Tensor, "b k m q s"]:
    """In float32 or wider."""
    found = (q.flatten(2, 3) @ k.mT).unflatten(2, q.shape[2:4])
    return found.to(torch.promote_types(q.dtype, torch.float32)) * scaling


def _times(weights: Float[Tensor, "b k m q s"], v: Float[Tensor, "b k s e"]) -> Float[Tensor, "b k m q e"]:
    return (weights.flatten(2, 3) @ v).unflatten(2, weights.shape[2:4])


def _times_t(weights: Float[Tensor, "b k m q s"], x: Float[Tensor, "b k m q e"]) -> Float[Tensor, "b k s e"]:
    return weights.flatten(2, 3).mT @ x.flatten(2, 3)


# --- the ring ------------------------------------------------------------------------------------------------------


class _Passing:
    """Tensors on their way to the next process, and others of the same form on theirs from the one before."""

    def __init__(self, tensors: Sequence[Tensor], view: View) -> None:
        assert view.group is not None
        self.sent = tensors  # kept until they are there
        self.coming = [torch.empty_like(tensor) for tensor in tensors]
        after, before = (
            dist.get_global_rank(view.group, (view.rank + step) % view.world) for step in (1, -1 + view.world)
        )
        with mesh.explained():
            self.work = dist.batch_isend_irecv(
                [
                    *(dist.P2POp(dist.isend, tensor, after, view.group) for tensor in tensors),
                    *(dist.P2POp(dist.irecv, tensor, before, view.group) for tensor in self.coming),
                ]
            )

    def wait(self) -> list[Tensor]:
        """What came."""
        with mesh.explained():
            for one in self.work:
                one.wait()
        return self.coming


def _around(tensors: Sequence[Tensor], view: View) -> Iterator[tuple[int, Sequence[Tensor]]]:
    """Whose, and the tensors: one's own first, then those of the process before it, and so on.

    The next ones travel while these are worked on.
    """
    held: Sequence[Tensor] = [tensor.contiguous() for tensor in tensors]
    for step in range(view.world):
        passing = _Passing(held, view) if step < view.world - 1 else None
        yield (view.rank - step) % view.world, held
        if passing is not None:
            held = passing.wait()
