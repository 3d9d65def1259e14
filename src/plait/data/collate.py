"""Rendered samples and their pictures' features to a batch; the token account is checked here, before any forward."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from jaxtyping import Int
from torch import Tensor

from plait.core.errors import DataError
from plait.core.packing import pack
from plait.core.tensors import IGNORE, Batch, Patches
from plait.core.types import Modality
from plait.data.template import Rendered

Account = Callable[[Tensor], Tensor] | Mapping[Modality, Callable[[Tensor], Tensor]]
"""Grids in, grids of media tokens out: for pictures, or for each modality that there is."""


@dataclass(frozen=True, slots=True)
class AccountTable:
    """A token account of some grids: what a process that makes batches needs of a model that it does not have.

    Attributes:
        tokens: Grid of an item to the grid of its tokens.
    """

    tokens: Mapping[tuple[int, ...], tuple[int, ...]]

    @classmethod
    def of(cls, account: Callable[[Tensor], Tensor], grids: Int[Tensor, "grid 3"]) -> AccountTable:
        """Ask the account about each grid."""
        rows = [tuple(row) for row in account(grids).tolist()] if len(grids) else []
        return cls({tuple(grid): row for grid, row in zip(grids.tolist(), rows, strict=True)})

    def __call__(self, grid: Int[Tensor, "item 3"]) -> Int[Tensor, "item 3"]:
        """As the account itself.

        Raises:
            KeyError: It was not asked about such a grid.
        """
        return torch.tensor([self.tokens[tuple(row)] for row in grid.tolist()], dtype=torch.long).view(-1, 3)


_KINDS: Mapping[Modality, str] = {"image": "picture", "audio": "sound", "video": "video"}


def collate(
    samples: Sequence[tuple[str, Rendered]],
    features: Mapping[str, Patches],
    *,
    grid_out: Account | None = None,
    slots: Callable[[Patches], Tensor] | None = None,
    encoded: bool,
    row: int,
    pad: int,
    rows: int | None = None,
) -> Batch:
    """Pack samples into rows of one fixed length.

    Media of one modality are concatenated in the order in which their placeholders stand in the batch, row by row, so
    that a model fills placeholders from left to right.

    Args:
        samples: Id and rendering.
        features: Patches by the sha256 of the bytes: raw media, or features of a frozen tower. A picture may be several
            items (overview and tiles).
        grid_out: The model's token account from these very patches on.
        slots: The same for models whose account is more than the grid: patches in, tokens of each item out.
        encoded: Whether ``features`` are a tower's features rather than raw media.
        row: Tokens a row holds.
        pad: Id of padding.
        rows: Rows of the batch, filled up with padding (fixed shapes are planned once); None for as many as needed.

    Raises:
        DataError: A sample is longer than a row, there are more rows than ``rows``, a picture or sound has no features,
            or it becomes another number of tokens than it has placeholders.
        KeyError: ``grid_out`` lacks a modality that a sample has.
    """
    for sample_id, rendered in samples:
        _fits(sample_id, rendered, row)
    packed = pack([len(rendered) for _, rendered in samples], row=row)
    filled = [[samples[index] for index in members] for members in packed]
    if rows is not None and len(packed) > rows:
        raise DataError(
            f"the samples fill {len(packed)} rows of {row} tokens, the batch has {rows}",
            place=f"samples {samples[0][0]} …",
            remedy="take fewer samples a step, or more or longer rows",
        )
    filled += [[]] * ((rows or 0) - len(packed))
    return collate_rows(filled, features, grid_out=grid_out, slots=slots, encoded=encoded, row=row, pad=pad)


def collate_rows(
    rows: Sequence[Sequence[tuple[str, Rendered]]],
    features: Mapping[str, Patches],
    *,
    grid_out: Account | None = None,
    slots: Callable[[Patches], Tensor] | None = None,
    encoded: bool,
    row: int,
    pad: int,
) -> Batch:
    """A batch of rows whose samples are given; a row without samples is padding. Arguments as in :func:`collate`.

    Raises:
        DataError: A picture or sound has no features, or becomes another number of tokens than it has placeholders.
        KeyError: ``grid_out`` lacks a modality that a sample has.
    """
    account = _account(grid_out, slots)
    token_ids = torch.full((len(rows), row), pad, dtype=torch.long)
    labels = torch.full((len(rows), row), IGNORE, dtype=torch.long)
    segments = torch.zeros((len(rows), row), dtype=torch.long)
    items: dict[Modality, list[Patches]] = {}
    item_row: dict[Modality, list[int]] = {}
    for number, members in enumerate(rows):
        at = 0
        for segment, (sample_id, rendered) in enumerate(members, 1):
            end = at + len(rendered)
            ids = torch.tensor(rendered.token_ids)
            token_ids[number, at:end] = ids
            labels[number, at:end] = torch.where(torch.tensor(rendered.trained), ids, IGNORE)
            segments[number, at:end] = segment
            for modality, found in _media(sample_id, rendered, features, account=account):
                items.setdefault(modality, []).append(found)
                item_row.setdefault(modality, []).extend([number] * len(found.grid))
            at = end
    return Batch(
        token_ids=token_ids,
        labels=labels,
        segment_ids=segments,
        media={modality: joined(found) for modality, found in items.items()},
        item_row={modality: torch.tensor(rows_of) for modality, rows_of in item_row.items()},
        sample_ids=tuple(sample_id for members in rows for sample_id, _ in members),
        encoded=encoded,
    )


def joined(items: Sequence[Patches]) -> Patches:
    """Patches of several pictures as one."""
    return Patches(values=torch.cat([i.values for i in items]), grid=torch.cat([i.grid for i in items]))


def split_rows(batch: Batch, pieces: int) -> list[Batch]:
    """A batch of packed rows as so many batches of nearly as many rows each, in order; rows without samples stay.

    Args:
        batch: From :func:`collate`.
        pieces: How many; at most one a row comes out.
    """
    height = -(-len(batch.token_ids) // pieces)
    starts = range(0, len(batch.token_ids), height)
    return [take_rows(batch, start, min(start + height, len(batch.token_ids))) for start in starts]


def take_rows(batch: Batch, start: int, stop: int) -> Batch:
    """Some rows of a batch, with their media and sample ids; segments of a row are numbered from 1."""
    first_sample = [0, *batch.segment_ids.amax(1).cumsum(0).tolist()]
    media: dict[Modality, Patches] = {}
    item_row: dict[Modality, Tensor] = {}
    for modality, patches in batch.media.items():
        inside = (batch.item_row[modality] >= start) & (batch.item_row[modality] < stop)
        if inside.any():
            values = patches.values[inside.repeat_interleave(patches.grid.prod(1))]
            media[modality] = Patches(values=values, grid=patches.grid[inside])
            item_row[modality] = batch.item_row[modality][inside] - start
    return replace(
        batch,
        token_ids=batch.token_ids[start:stop],
        labels=batch.labels[start:stop],
        segment_ids=batch.segment_ids[start:stop],
        media=media,
        item_row=item_row,
        sample_ids=batch.sample_ids[first_sample[start] : first_sample[stop]],
    )


def join_rows(parts: Sequence[Batch]) -> Batch:
    """Batches one below the other as one batch; shorter rows are filled up with padding.

    Args:
        parts: One at least; all of the same kind (raw media, or features).
    """
    width = max(part.token_ids.shape[1] for part in parts)
    starts = [sum(len(part.token_ids) for part in parts[:at]) for at in range(len(parts))]
    kinds: list[Modality] = list(dict.fromkeys(modality for part in parts for modality in part.media))

    def wide(tensor: Tensor, fill: int) -> Tensor:
        return torch.nn.functional.pad(tensor, (0, width - tensor.shape[1]), value=fill)

    return replace(
        parts[0],
        token_ids=torch.cat([wide(part.token_ids, 0) for part in parts]),
        labels=torch.cat([wide(part.labels, IGNORE) for part in parts]),
        segment_ids=torch.cat([wide(part.segment_ids, 0) for part in parts]),
        media={m: joined([part.media[m] for part in parts if m in part.media]) for m in kinds},
        item_row={
            m: torch.cat([part.item_row[m] + at for part, at in zip(parts, starts, strict=True) if m in part.media])
            for m in kinds
        },
        sample_ids=tuple(name for part in parts for name in part.sample_ids),
    )


def _account(
    grid_out: Account | None, slots: Callable[[Patches], Tensor] | None
) -> Callable[[Modality, Patches], Tensor]:
    """Tokens of each item of patches."""
    if grid_out is None and slots is None:
        raise TypeError("give grid_out or slots: what the model makes of these patches")

    def count(modality: Modality, media: Patches) -> Tensor:
        if slots is not None:
            return slots(media)
        by_grid = grid_out[modality] if isinstance(grid_out, Mapping) else grid_out
        assert by_grid is not None
        return by_grid(media.grid).prod(1)

    return count


def _fits(sample_id: str, rendered: Rendered, row: int) -> None:
    if len(rendered) > row:
        raise DataError(
            f"{len(rendered)} tokens ({sum(rendered.slots)} of them media), a row holds {row}",
            place=f"sample {sample_id}",
            remedy=f"set the row length to {len(rendered)} or more",
        )


def _media(
    sample_id: str,
    rendered: Rendered,
    features: Mapping[str, Patches],
    *,
    account: Callable[[Modality, Patches], Tensor],
) -> Iterator[tuple[Modality, Patches]]:
    """The patches of a sample's media in reading order, each checked against its placeholders."""
    for number, (ref, expected) in enumerate(zip(rendered.media, rendered.slots, strict=True), 1):
        kind = _KINDS.get(ref.modality, ref.modality)
        place = f"sample {sample_id}, {kind} {number} ({ref.sha256[:12]})"
        if ref.sha256 not in features:
            raise DataError(
                f"the {kind} has no features",
                place=place,
                remedy=f"compute the features of all {kind}s of the split first",
            )
        item = features[ref.sha256]
        came: list[int] = account(ref.modality, item).tolist()
        if sum(came) != expected:
            size = f" of {ref.width} x {ref.height} pixels" if ref.width and ref.height else ""
            items = f"{len(came)} items" if len(came) != 1 else "1 item"
            total = f"{' + '.join(map(str, came))} = {sum(came)}" if len(came) > 1 else str(sum(came))
            raise DataError(
                f"{expected} placeholders for the {kind}{size}, {total} media tokens ({items}, grid "
                f"{item.grid.tolist()})",
                place=place,
                remedy="render with the token account (grid_out) of the model and the features that are trained with, "
                "and let MediaRef say the size of the very item",
            )
        yield ref.modality, item
