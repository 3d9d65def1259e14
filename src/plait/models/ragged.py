"""Ragged media as rows of a batch and back: for modules that look at all tokens of an item together."""

from typing import NamedTuple

import torch
from jaxtyping import Bool, Int, Num
from torch import Tensor

from plait.core.errors import DataError
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
