"""Ragged media as rows of a batch and back, one item a row or several: for modules that look at all of an item."""

from typing import NamedTuple

import torch
from jaxtyping import Bool, Int, Num
from torch import Tensor

from plait.core.errors import DataError
from plait.core.packing import pack
from plait.core.tensors import Patches


class Rows(NamedTuple):
    """One item a row.

    Attributes:
        values: Tokens, zeros behind the shorter items.
        real: Which of them are tokens; None where all items are of one length.
    """

    values: Num[Tensor, "item s d"]
    real: Bool[Tensor, "item s"] | None


def rows_of(media: Patches) -> Rows:
    """Items as rows.

    Example:
        >>> two = Patches(values=torch.ones(3, 4), grid=torch.tensor([[1, 1, 1], [1, 1, 2]]))
        >>> rows_of(two).real.tolist()
        [[True, False], [True, True]]
    """
    return rows_by(media.values, media.grid.prod(1))


def rows_by(values: Num[Tensor, "n d"], lengths: Int[Tensor, " item"]) -> Rows:
    """Consecutive tokens as rows of the given lengths.

    Raises:
        DataError: The lengths do not add up to the tokens.
    """
    counts: list[int] = lengths.tolist()
    if sum(counts) != len(values):
        raise DataError(
            f"{len(values)} tokens came for items of {sum(counts)} tokens in all",
            place="Patches",
            remedy="let values and grid be of the same items",
        )
    longest = max(counts, default=0)
    if all(count == longest for count in counts):
        return Rows(values.view(len(counts), longest, values.shape[-1]), None)
    real = torch.arange(longest, device=values.device) < lengths[:, None]
    rows = values.new_zeros(len(counts), longest, values.shape[-1])
    return Rows(rows.masked_scatter(real[..., None], values), real)


class PackedRows(NamedTuple):
    """Where consecutive items stand in rows of one length, several in a row.

    Attributes:
        place: Place of each token, counted through all rows.
        segment_ids: Which item of its row a place belongs to, from 1; 0 where there is none.
    """

    place: Int[Tensor, " n"]
    segment_ids: Int[Tensor, "b t"]

    def put(self, values: Num[Tensor, "n *d"]) -> Num[Tensor, "b t *d"]:
        """Tokens in their places, zeros elsewhere."""
        b, t = self.segment_ids.shape
        empty = values.new_zeros(b * t, *values.shape[1:])
        return empty.index_copy(0, self.place, values).unflatten(0, (b, t))

    def take(self, rows: Num[Tensor, "b t *d"]) -> Num[Tensor, "n *d"]:
        """The tokens again, item after item: the inverse of :meth:`put`."""
        return rows.flatten(0, 1)[self.place]


def packed_rows(lengths: Int[Tensor, " item"], row: int) -> PackedRows:
    """As few rows as first fit needs (:func:`plait.core.packing.pack`).

    Args:
        lengths: Tokens of each item.
        row: Tokens a row holds; rows are as long as the longest item if that is longer.

    Example:
        >>> packed_rows(torch.tensor([3, 1, 2]), 4).segment_ids.tolist()
        [[1, 1, 1, 2], [1, 1, 0, 0]]
    """
    counts: list[int] = lengths.tolist()
    row = max(row, max(counts, default=0))
    members = pack(counts, row=row)
    starts = [0] * len(counts)
    segments = torch.zeros(len(members), row, dtype=torch.long)
    for number, listed in enumerate(members):
        at = 0
        for segment, item in enumerate(listed, 1):
            starts[item] = number * row + at
            segments[number, at : at + counts[item]] = segment
            at += counts[item]
    first = lengths.cumsum(0) - lengths
    within = torch.arange(sum(counts), device=lengths.device) - first.repeat_interleave(lengths)
    place = torch.tensor(starts, dtype=torch.long, device=lengths.device).repeat_interleave(lengths) + within
    return PackedRows(place, segments.to(lengths.device))
