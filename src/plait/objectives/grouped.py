"""What losses over groups of vectors share: which belong together, what is refused, how precisely they compare.

A batch has one or several views of each row: items of one kind, such as two pictures (``batch.item_row`` tells the row
of each). The model returns a vector of each item, ``n d``, and the row of each, ``n``. ``batch.labels[:, 0]`` is the
class of each row; :data:`~plait.core.tensors.IGNORE` is unlike any other row. Views of a row belong together, and so do
those of rows of one class.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Sequence

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.nn import functional

from plait.core.errors import ConfigError, DataError
from plait.core.tensors import Batch, Embedded
from plait.objectives.contrastive import match_groups


def counted(batch: Batch, *terms: str, each: int = 1) -> dict[str, Tensor]:
    """Rows, times ``each``, for every term."""
    return {term: torch.tensor(each * len(batch.sample_ids), device=batch.labels.device) for term in terms}


def embed_views(model: nn.Module, batch: Batch, *, views: int | None = None, unit: bool = True) -> Embedded:
    """What a model makes of a batch: one kind of vectors, ``views``, in float32 at least.

    Args:
        model: Returns vectors, ``n d``, and the row of each.
        batch: Its first label is the class of each row.
        views: How many each row must have; any number from 1 by default.
        unit: Whether vectors are set to length 1.

    Raises:
        DataError: A row has another number, or none.
    """
    vectors, belongs = model(batch)
    check_views(batch.sample_ids, belongs, views=views)
    with exactly(vectors):
        vectors = functional.normalize(wide(vectors), dim=1) if unit else wide(vectors)
    return Embedded(vectors={"views": vectors}, row_of={"views": belongs}, classes=batch.labels[:, 0])


def check_views(samples: Sequence[str], belongs: Int[Tensor, " n"], *, views: int | None) -> None:
    """See that each row has its views.

    Raises:
        DataError: One has another number, or none.
    """
    counts: Tensor = torch.bincount(belongs, minlength=len(samples))
    found = [int(count) for count in counts.cpu()]
    for name, number in zip(samples, found, strict=True):
        if number == 0 or (views is not None and number != views):
            raise DataError(
                f"{number} view{'s' if number != 1 else ''} where {views or 'at least one'} must be",
                place=f"sample {name}",
                remedy="make as many views of each sample; batch.item_row tells the row of each",
            )


def groups_of(found: Embedded) -> Int[Tensor, " n"]:
    """A number for each view, equal where they match: by class, and otherwise by row."""
    return match_groups(found.classes)[found.row_of["views"]]


def items_of(belongs: Int[Tensor, " n"], rows: range | None) -> Int[Tensor, " a"]:
    """Numbers of the items of some rows; of all by default."""
    if rows is None:
        return torch.arange(len(belongs), device=belongs.device)
    return ((belongs >= rows.start) & (belongs < rows.stop)).nonzero()[:, 0]


def with_partner(groups: Int[Tensor, " n"], anchors: Int[Tensor, " a"] | None = None) -> Int[Tensor, " p"]:
    """Those anchors that are not alone in their group."""
    shared = sizes_of(groups) > 1
    return shared.nonzero()[:, 0] if anchors is None else anchors[shared[anchors]]


def sizes_of(groups: Int[Tensor, " n"]) -> Int[Tensor, " n"]:
    """How many have the same number as each.

    Example:
        >>> sizes_of(torch.tensor([5, 7, 5])).tolist()
        [2, 1, 2]
    """
    known, counts = _distinct(groups)
    return counts[torch.searchsorted(known, groups.contiguous())]


def check_groups(groups: Int[Tensor, " n"]) -> None:
    """See that there is something to tell apart, and something to draw together.

    Raises:
        DataError: All are of one group, or no two are.
    """
    check_negatives(groups)
    if len(_distinct(groups)[0]) == len(groups):
        raise DataError(
            f"no two of {len(groups)} vectors belong together",
            place="batch",
            remedy="give two views of each sample, or several samples of a class",
        )


def check_negatives(groups: Int[Tensor, " n"]) -> None:
    """See that there is something to tell apart.

    Raises:
        DataError: All are of one group, or there is none.
    """
    if len(_distinct(groups)[0]) < 2:
        raise DataError(
            f"all {len(groups)} vectors of a batch belong together: there is nothing to tell them from",
            place="batch",
            remedy="use larger batches, of several samples and classes",
        )


def inverse(temperature: float) -> float:
    """What cosines are multiplied with.

    Raises:
        ConfigError: The temperature is not a number above 0, or so small that scores overflow in float32.
    """
    if not 0 < temperature < math.inf or 1 / temperature > torch.finfo(torch.float32).max / 4:
        raise ConfigError(
            f"the temperature is {temperature:g}",
            place="temperature",
            remedy="set it to a number above 0, such as 0.1; cosines over less than 1e-38 overflow",
        )
    return 1 / temperature


def exactly(like: Tensor) -> contextlib.AbstractContextManager[object]:
    """No autocast: 8 bits of a cosine, times 1 / temperature, are not enough."""
    return torch.autocast(like.device.type, enabled=False)


def wide(values: Float[Tensor, "*n"]) -> Float[Tensor, "*n"]:
    """At least float32."""
    return values.float() if values.dtype in (torch.float16, torch.bfloat16) else values


def _distinct(groups: Int[Tensor, " n"]) -> tuple[Tensor, Tensor]:
    """Numbers in ascending order, and how often each is there."""
    return torch.unique(groups, return_counts=True)  # pyright: ignore[reportUnknownMemberType, reportUnknownVariableType]
