"""Tables of studies: Markdown that also reads well on a terminal."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any


def table(rows: Sequence[Sequence[str]]) -> str:
    """The first row is the head.

    Example:
        >>> print(table([["code", "near"], ["rope", "93"]]))
        | code | near |
        |------|------|
        | rope | 93   |
    """
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    lines = ["| " + " | ".join(c.ljust(w) for c, w in zip(row, widths, strict=True)) + " |" for row in rows]
    lines.insert(1, "|" + "|".join("-" * (w + 2) for w in widths) + "|")
    return "\n".join(lines)


def percent(score: Mapping[str, Any]) -> str:
    """Value and interval of a share.

    Example:
        >>> percent({"value": 0.5, "low": 0.41, "high": 0.59})
        '50 (41-59)'
    """
    value, low, high = (100 * score[key] for key in ("value", "low", "high"))
    return f"{value:.0f} ({low:.0f}-{high:.0f})"
