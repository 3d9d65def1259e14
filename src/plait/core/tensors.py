"""Tensor types: ragged media and batches. Apart from :mod:`plait.core.types`, so that raw data needs no torch.

Letters: ``b`` rows, ``t`` text positions, ``n`` ragged media tokens, ``d`` width, ``v`` vocabulary,
``item`` media items.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace

import torch
from jaxtyping import Bool, Float, Int
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
    """What a language model returns: hidden states everywhere, the rest only where the next token is trained.

    Attributes:
        hidden: Last hidden states.
        score: Computes the scores of every word, float32 or wider, at :attr:`Batch.predicting` in reading order; None
            where there is no vocabulary.
        logprobs: Log-probability of each of :attr:`Batch.targets`; None where the model leaves it to ``score``.
        balance: Sum over documents and layers of how unevenly experts were chosen; None where there are none.
        dropped: Choices of experts that had no room, over all layers.
    """

    hidden: Float[Tensor, "b t d"]
    score: Callable[[], Float[Tensor, "n v"]] | None = None
    logprobs: Float[Tensor, " n"] | None = None
    balance: Float[Tensor, ""] | None = None
    dropped: Int[Tensor, ""] | None = None

    @property
    def logits(self) -> Float[Tensor, "n v"]:
        """Scores of every word, computed now: of a large vocabulary the largest tensor of a step."""
        if self.score is None:
            raise TypeError("this output has no scores of words")
        return self.score()


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

    @property
    def predicting(self) -> Bool[Tensor, "b t"]:
        """Positions whose next token is trained and stands in the same segment.

        The first token of a sample has nothing before it. In a packed row its neighbor is the end of another sample,
        from which it must not be learned: then a packed loss is the loss of rows of their own.

        Example:
            Segments ``1 1 2 2``, all trained: ``x . x .``
        """
        out = torch.zeros_like(self.labels, dtype=torch.bool)
        same = self.segment_ids[:, 1:] == self.segment_ids[:, :-1]
        out[:, :-1] = (self.labels[:, 1:] != IGNORE) & same
        return out

    @property
    def targets(self) -> Int[Tensor, " n"]:
        """The token that comes after each of :attr:`predicting`, in reading order."""
        return self.labels[:, 1:][self.predicting[:, :-1]]

    @property
    def documents(self) -> Int[Tensor, ""]:
        """How many samples the rows hold: runs of one segment, padding left out."""
        begins = torch.ones_like(self.segment_ids, dtype=torch.bool)
        begins[:, 1:] = self.segment_ids[:, 1:] != self.segment_ids[:, :-1]
        return (begins & (self.segment_ids != 0)).sum()

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
