"""Tensor types: ragged media and batches. Apart from :mod:`plait.core.types`, so that raw data needs no torch.

Letters: ``b`` rows, ``t`` text positions, ``n`` ragged media tokens, ``d`` width, ``v`` vocabulary,
``item`` media items.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field, replace

import torch
from jaxtyping import Float, Int
from torch import Tensor

from plait.core.types import Modality

IGNORE = -100
"""Label of a position on which no loss is taken (the value Hugging Face and torch use)."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Patches:
    """Ragged media in raster order, from raw input to connector output.

    Attributes:
        values: All items concatenated, ``n d``. Raw pixels: d = channels, one row a pixel.
        grid: ``item 3``: frames, rows, columns; ``prod(grid[i])`` rows of ``values`` belong to item ``i``.
    """

    values: Float[Tensor, "n d"]
    grid: Int[Tensor, "item 3"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Output:
    """What a language model returns: ``logits`` only at the positions asked for, ``hidden`` everywhere."""

    hidden: Float[Tensor, "b t d"]
    logits: Float[Tensor, "n v"] | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Batch:
    """All that data hands to models.

    Attributes:
        token_ids: ``b t``.
        labels: ``b t``; :data:`IGNORE` where no loss is taken.
        segment_ids: ``b t``; 0 is padding, equal ids may attend to each other.
        media: Ragged media of the whole batch, per modality, in the order of their placeholders.
        item_row: Which row each media item belongs to, per modality.
        sample_ids: Ids of the samples in the batch, for errors and logs.
        encoded: Whether media are features of the (frozen) towers already, so that towers are not run.
    """

    token_ids: Int[Tensor, "b t"]
    labels: Int[Tensor, "b t"]
    segment_ids: Int[Tensor, "b t"]
    media: Mapping[Modality, Patches]
    item_row: Mapping[Modality, Int[Tensor, " item"]]
    sample_ids: tuple[str, ...]
    encoded: bool = False

    def to(self, device: torch.device) -> "Batch":
        """The same batch on a device."""
        return replace(
            self,
            token_ids=self.token_ids.to(device),
            labels=self.labels.to(device),
            segment_ids=self.segment_ids.to(device),
            media={m: Patches(values=p.values.to(device), grid=p.grid.to(device)) for m, p in self.media.items()},
            item_row={m: row.to(device) for m, row in self.item_row.items()},
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class Embedded:
    """What a pairwise loss compares: the vectors of a batch, and which rows they belong to.

    Attributes:
        vectors: By name, such as ``image``, ``text``, ``audio``: one vector an item.
        row_of: Which row of the batch each item belongs to, by the same names.
        classes: Of each row; rows of one class match. :data:`IGNORE` matches nothing but its own row.
        factors: What the model learns beside the vectors and is the same for every row: a temperature, a bias.
    """

    vectors: Mapping[str, Float[Tensor, "_ _"]]
    row_of: Mapping[str, Int[Tensor, " _"]]
    classes: Int[Tensor, " b"]
    factors: Mapping[str, Tensor] = field(default_factory=dict[str, Tensor])

    @property
    def rows(self) -> int:
        """Rows of the batch."""
        return len(self.classes)
