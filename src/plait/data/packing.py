"""How long rows are into which samples are packed: nothing is cut, and a picture is never split."""

from __future__ import annotations

from collections.abc import Sequence

from plait.core.packing import pack

_STEPS = 200  # that a row's length is chosen for
_WIDE = 512  # a place in a row of this length is taken to cost twice as much as in a very short one


def row_length(steps: Sequence[Sequence[int]]) -> int:
    """Length of a row with which packed steps take the least room, if all steps have as many rows.

    Short rows cost less attention, long ones leave less padding: the least of places x (1 + length / 512) is taken, of
    multiples of 8 (of 16 where the longest item has more than 512 tokens, and so on) up to 512 or four times the
    longest item.

    Args:
        steps: Tokens of each item, step by step; of many steps, the 200 with most tokens are looked at, since the
            fullest one says how many rows all have.

    Example:
        >>> row_length([[30, 33, 30, 29], [28, 37, 31, 29]])
        64
    """
    longest = max((length for step in steps for length in step), default=1)
    looked_at = sorted(steps, key=sum)[-_STEPS:]

    def cost(row: int) -> float:
        rows = max((len(pack(step, row=row)) for step in looked_at), default=1)
        return rows * row * (1 + row / _WIDE)

    least, apart = -(-longest // 8) * 8, 8 * -(-longest // _WIDE)
    return min(range(least, max(_WIDE, 4 * longest) + 1, apart), key=cost)
