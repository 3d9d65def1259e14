"""One step's batch in several forms: whole, in micro-batches, unpacked, its rows in another order."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Protocol, runtime_checkable

from plait.core.protocols import Batches, Objective, Pairwise
from plait.core.tensors import Batch
from plait.data.collate import join_rows, take_rows
from plait.data.conversations import ConversationBatches

_ALONE = 32  # at most so many rows go through the model one by one


@runtime_checkable
class Divisible(Protocol):
    """A source whose samples belong together in groups, which it alone can divide."""

    parts: Sequence[Sequence[object]]

    def in_pieces(self, step: int, sizes: Sequence[int], *, packed: bool = True) -> list[Batch]:
        """The groups of a step in several batches."""
        ...


@dataclass(frozen=True, slots=True, kw_only=True)
class Ways:
    """One step's batch in several forms.

    Attributes:
        whole: In one piece.
        splits: In micro-batches, by what is said of it.
        unpacked: Each sample in a row of its own; None where nothing is packed.
        packed: In longer rows, where none of those of ``whole`` holds two samples.
        backward: Rows in reverse order; None where their order means something.
    """

    whole: Batch
    splits: Mapping[str, Sequence[Batch]]
    unpacked: Batch | None
    backward: Batch | None
    packed: Batch | None = None

    @classmethod
    def of(cls, batches: Batches, first: Sequence[Batch], objective: Objective) -> Ways:
        """Divide the first step.

        Args:
            batches: The source.
            first: Its first step.
            objective: Says whether rows may be divided.
        """
        whole = join_rows(first)
        source = source_of(batches)
        where = whole.token_ids.device
        if isinstance(source, Divisible):
            count = len(source.parts[0])
            splits = {
                said: [piece.to(where) for piece in source.in_pieces(0, sizes)] for said, sizes in _sizes(count).items()
            }
            (unpacked,) = source.in_pieces(0, [count], packed=False)
            return cls(whole=whole, splits=splits, unpacked=unpacked.to(where), backward=_backward(whole))
        if objective.needs_global_batch and not isinstance(objective, Pairwise):
            return cls(whole=whole, splits={}, unpacked=None, backward=None)
        unpacked = packed = None
        if isinstance(source, ConversationBatches) and source.packed:
            unpacked = join_rows(replace(source, packed=False, pieces=1).step_batches(0)).to(where)
            if int(whole.segment_ids.max()) < 2:
                longer = replace(source, row=2 * source.row, pieces=1, group_by_length=0)
                packed = join_rows(longer.step_batches(0)).to(where)
        rows = _filled(unpacked if unpacked is not None else whole)
        splits = {
            said: [take_rows(rows, sum(sizes[:at]), sum(sizes[: at + 1])) for at in range(len(sizes))]
            for said, sizes in _sizes(len(rows.token_ids)).items()
        }
        return cls(whole=whole, splits=splits, unpacked=unpacked, backward=_backward(whole), packed=packed)


def source_of(batches: Batches) -> Batches:
    """The source behind loaders and devices."""
    while (inner := getattr(batches, "batches", None)) is not None:
        batches = inner
    return batches


def _filled(batch: Batch) -> Batch:
    """Without rows of padding alone."""
    rows = [at for at, filled in enumerate((batch.segment_ids != 0).any(1).tolist()) if filled]
    return join_rows([take_rows(batch, at, at + 1) for at in rows])


def _backward(batch: Batch) -> Batch | None:
    count = len(batch.token_ids)
    return join_rows([take_rows(batch, at, at + 1) for at in reversed(range(count))]) if count > 1 else None


def _sizes(count: int) -> dict[str, list[int]]:
    """Sizes of micro-batches: of one each, of equal ones, of uneven ones."""
    found: dict[str, list[int]] = {}
    if 1 < count <= _ALONE:
        found[f"split {count} x 1"] = [1] * count
    if count > 2:
        half = -(-count // 2)
        found[f"split {half} + {count - half}"] = [half, count - half]
    if count > 3:
        uneven = [1, (count - 1) // 3, count - 1 - (count - 1) // 3]
        found["split " + " + ".join(map(str, uneven))] = uneven
    return found
