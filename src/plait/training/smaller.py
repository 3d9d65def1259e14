"""Micro-batches in halves, for a step that did not fit the memory: the same samples, the same gradient.

A batch is cut between rows. Rows that hold two answers of one preference pair stay together.
"""

from __future__ import annotations

import gc
import itertools
from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor

from plait.core import mesh
from plait.core.errors import ResourceError
from plait.core.events import Events
from plait.core.tensors import Batch, Patches
from plait.core.types import Modality

_SAID = ("can't allocate memory", "out of memory", "_STATUS_ALLOC_FAILED")
"""What torch says on a CPU; on Apple's GPUs and from CUDA's driver; from CUDA's libraries."""


class Exhausted(Exception):
    """Memory ran out in a forward or backward pass of any process; nothing but gradients has changed."""


def out_of_memory(error: BaseException) -> bool:
    """Whether an error says that memory ran out: on a GPU, in torch's allocator of the CPU, or in Python."""
    if isinstance(error, (MemoryError, torch.OutOfMemoryError)):
        return True
    return isinstance(error, RuntimeError) and any(text in str(error) for text in _SAID)


def first_line(error: BaseException) -> str:
    """What it says, for a message."""
    said = str(error).strip().splitlines()
    return said[0] if said else type(error).__name__


def divided(micro: Sequence[Batch], pieces: int) -> list[Batch]:
    """Each micro-batch in at most so many parts of about equally many rows; one that cannot be cut stays."""
    if pieces == 1:
        return list(micro)
    return [part for batch in micro for part in _divided(batch, pieces)]


def smaller(
    micro: Sequence[Batch], pieces: int, *, why: str, step: int, passes: bool, splits: bool, apart: bool, events: Events
) -> int:
    """In how many parts to do micro-batches that did not fit the memory; every process calls this.

    Args:
        micro: As the data source gave them.
        pieces: Parts that they were done in.
        why: What the allocator said.
        step: Number of the step.
        passes: Whether it was in a pass that can be made again: :class:`Exhausted` said so.
        splits: Whether parts may be made at all.
        apart: Whether the objective's loss is that of its rows' losses.
        events: Where to say so.

    Raises:
        ResourceError: They cannot be cut further, or are not to be.
    """
    rows = max(len(batch.token_ids) for batch in micro)
    able = passes and splits and apart
    more = min((own for own in mesh.gather(_more(micro, pieces)) if own), default=0) if able else 0
    if not more:
        why_not = "it cannot be cut further"
        if not passes:
            why_not = "processes pass in step here" if mesh.active() else "it was outside of a pass"
        elif not apart:
            why_not = "its loss compares all rows"
        elif not splits:
            why_not = "it is not to be cut (trainer.guard)"
        raise ResourceError(
            f"memory ran out ({why}): a micro-batch of {rows} rows; {why_not}",
            place=f"step {step}",
            remedy="lower trainer.micro_batch or batch_size, set trainer.recompute, or shorten the rows; "
            "`plait plan` says what a step needs",
        )
    events.warning(
        f"step {step}: memory ran out ({why}); done again, as all later steps, in up to {more} parts a micro-batch of "
        f"at most {rows} rows: the same gradient, but for what dropout draws and batch statistics; to have it from the "
        f"start, lower trainer.micro_batch",
        step=step,
        pieces=more,
    )
    return more


def _more(micro: Sequence[Batch], pieces: int) -> int:
    """The next power of two that cuts any micro-batch further; 0 where none does."""
    before, rows = len(divided(micro, pieces)), max(len(batch.token_ids) for batch in micro)
    while pieces < rows:
        pieces *= 2
        if len(divided(micro, pieces)) > before:
            return pieces
    return 0


def release() -> None:
    """Give back what nobody holds any more."""
    gc.collect()
    if torch.cuda.is_initialized():
        torch.cuda.empty_cache()


def rows_apart(batch: Batch) -> list[Batch]:
    """A micro-batch in as many parts as it can be cut into."""
    return _divided(batch, len(batch.token_ids))


def samples_of_rows(batch: Batch) -> list[tuple[str, ...]] | None:
    """The samples that each row holds; None where nobody knows.

    Samples are numbered row by row, as segments are; or else there is one a row.
    """
    ids, rows = batch.sample_ids, len(batch.token_ids)
    counts: list[int] = batch.segment_ids.amax(1).tolist() if batch.segment_ids.numel() else []
    if sum(counts) != len(ids):
        return [(one,) for one in ids] if len(ids) == rows else None
    starts = [sum(counts[:row]) for row in range(rows)]
    return [tuple(ids[start : start + count]) for start, count in zip(starts, counts, strict=True)]


def _divided(batch: Batch, pieces: int) -> list[Batch]:
    owners = samples_of_rows(batch)
    if owners is None:
        return [batch]
    blocks = _blocks(owners)
    pieces = min(pieces, len(blocks))
    if pieces == 1:
        return [batch]
    cuts = [round(at * len(blocks) / pieces) for at in range(pieces + 1)]
    rows = [[row for block in blocks[low:high] for row in block] for low, high in itertools.pairwise(cuts)]
    return [_rows(batch, some, owners) for some in rows]


def _blocks(owners: Sequence[Sequence[str]]) -> list[list[int]]:
    """Rows that may not be parted, in order: of one block are all from the first row of a pair to its last."""
    last: dict[str, int] = {}
    for row, names in enumerate(owners):
        last |= {_pair(name): row for name in names}
    blocks: list[list[int]] = []
    until = -1
    for row, names in enumerate(owners):
        if row > until:
            blocks.append([])
        blocks[-1].append(row)
        until = max(until, row, *(last[_pair(name)] for name in names))
    return blocks


def _pair(name: str) -> str:
    return name.removesuffix("#chosen").removesuffix("#rejected")


def _rows(batch: Batch, rows: Sequence[int], owners: Sequence[Sequence[str]]) -> Batch:
    """Some rows that follow each other, with their media."""
    first, last = rows[0], rows[-1]
    media: dict[Modality, Patches] = {}
    item_row: dict[Modality, Tensor] = {}
    for modality, row in batch.item_row.items():
        chosen = (row >= first) & (row <= last)
        if not bool(chosen.any()):
            continue
        patches = batch.media[modality]
        sizes = patches.grid.prod(1)
        media[modality] = Patches(values=patches.values[chosen.repeat_interleave(sizes)], grid=patches.grid[chosen])
        item_row[modality] = row[chosen] - first
    part = slice(first, last + 1)
    return replace(
        batch,
        token_ids=batch.token_ids[part],
        labels=batch.labels[part],
        segment_ids=batch.segment_ids[part],
        media=media,
        item_row=item_row,
        sample_ids=tuple(name for row in rows for name in owners[row]),
    )
