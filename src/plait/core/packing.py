"""Items of any length into rows of one length: samples into rows of text, pictures into rows of patches."""

from __future__ import annotations

from collections.abc import Sequence

from plait.core.errors import DataError


def pack(lengths: Sequence[int], *, row: int) -> list[list[int]]:
    """Put items into as few rows as first-fit on falling lengths needs (at most 11/9 of the least, plus one).

    Args:
        lengths: Tokens of each item.
        row: Tokens a row holds.

    Returns:
        The items of each row, by index; every item is in exactly one row.

    Raises:
        DataError: An item is longer than a row; says which.

    Example:
        >>> pack([5, 3, 4, 4], row=8)
        [[0, 1], [2, 3]]
    """
    rows: list[list[int]] = []
    free: list[int] = []
    for index in sorted(range(len(lengths)), key=lambda i: (-lengths[i], i)):
        length = lengths[index]
        if length > row:
            raise DataError(
                f"item {index} has {length} tokens, a row holds {row}",
                place=f"item {index}",
                remedy=f"set the row length to {length} or more, or leave the item out and count it",
            )
        place = next((r for r, room in enumerate(free) if room >= length), None)
        if place is None:
            rows.append([index])
            free.append(row - length)
        else:
            rows[place].append(index)
            free[place] -= length
    return rows
