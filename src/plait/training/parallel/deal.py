"""Which blocks each stage of a pipeline has, from their loads alone; imports no torch."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache

from plait.core.errors import ConfigError

PLACE = "trainer.parallel.pipeline"
"""The setting."""


def dealt(
    loads: Sequence[float | int],
    stages: int,
    blocks: Sequence[int] = (),
    *,
    before: float | int = 0,
    after: float | int = 0,
) -> list[range]:
    """Blocks of each stage: as many as are given, or by their loads (:func:`divided`).

    Raises:
        ConfigError: They are not as many as the decoder's.
    """
    count = len(loads)
    if blocks and (len(blocks) != stages or sum(blocks) != count):
        raise ConfigError(
            f"{' + '.join(map(str, blocks))} blocks for {stages} stages, and the decoder has {count} blocks",
            place="trainer.parallel.pipeline_blocks",
            remedy="give one number for each stage, which add up to the decoder's blocks; or leave it out",
        )
    if count < stages:
        raise ConfigError(
            f"{stages} stages, and the decoder has {count} blocks", place=PLACE, remedy=f"set it to {count} at most"
        )
    if blocks:
        ends = [sum(blocks[: number + 1]) for number in range(stages)]
        return [range(end - size, end) for end, size in zip(ends, blocks, strict=True)]
    return divided(loads, stages, before=before, after=after)


def divided(
    loads: Sequence[float | int], stages: int, *, before: float | int = 0, after: float | int = 0
) -> list[range]:
    """Blocks of each stage, one after the other, so that the largest load of a stage is as small as can be.

    Args:
        loads: Of each block.
        stages: At most as many as blocks; each gets one at least.
        before: Further load of the first stage.
        after: Of the last one.

    Example:
        >>> divided([1, 1, 1, 1], 2, after=2)
        [range(0, 3), range(3, 4)]
    """

    @cache
    def best(first: int, left: int) -> tuple[float, tuple[int, ...]]:
        """Largest load of the ``left`` last stages, which begin with block ``first``; and where each ends."""
        extra = float(before) if first == 0 else 0.0
        if left == 1:
            return sum(loads[first:]) + extra + after, (len(loads),)
        ways: list[tuple[float, tuple[int, ...]]] = []
        for end in range(first + 1, len(loads) - left + 2):
            rest, ends = best(end, left - 1)
            ways.append((max(sum(loads[first:end]) + extra, rest), (end, *ends)))
        return min(ways)

    ends = best(0, stages)[1]
    return [range(start, end) for start, end in zip((0, *ends[:-1]), ends, strict=True)]
