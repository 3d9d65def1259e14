"""Which splits a data stage made, compared with the shards that are still there."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from plait.core.errors import DataError
from plait.core.files import read_done
from plait.data.shards import split_names

PREFIX = "instruct-"
"""Before the name of a split: the shards of its questions."""


def splits_of(shards: Path, *, prefix: str = "") -> list[str]:
    """Splits with shards, sorted; refused if the seal of the data stage tells of one that has none any more.

    Args:
        shards: Folder ``shards`` of the data stage; without a seal beside it, what lies there is all there is.
        prefix: Empty for pictures, :data:`PREFIX` for questions; names are given without it.

    Raises:
        DataError: A split is gone; names it.
    """
    there = [name.removeprefix(prefix) for name in split_names(shards) if name.startswith(prefix)]
    done = read_done(shards.parent)
    summary: dict[str, Any] = done["summary"] if done else {}
    made: dict[str, Any] = summary.get("instruct" if prefix else "splits", {})
    gone = [split for split, count in made.items() if count and split not in there]
    if gone:
        raise DataError(
            f"the data stage made the splits {', '.join(made)}; there are no shards of {', '.join(gone)} any more",
            place=str(shards / f"{prefix}{gone[0]}-000.tar"),
            remedy="put them back, or remove the data stage's folder and what follows it, then `plait resume` the run",
        )
    return there
