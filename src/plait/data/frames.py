"""Which frames of a video are looked at: pure functions of its length, and of a seed where chance decides.

Every policy gives indices in order of time; none opens a file. Frames that are not chosen are not seen: how many those
are is ``total`` minus the number of different indices.
"""

from __future__ import annotations

import hashlib
import random
from dataclasses import dataclass
from itertools import pairwise
from typing import Literal

from plait.core.errors import ConfigError, DataError


@dataclass(frozen=True, slots=True, kw_only=True)
class Sampling:
    """Which frames a model looks at: part of its media contract, so that serving looks at what training did.

    Attributes:
        policy: ``uniform``: always as many, over the whole video; ``every``: with a fixed step from the first one on,
            as many as there are.
        frames: How many; of ``every``, how many at most.
        step: Of ``every``, from one to the next.

    Example:
        >>> Sampling(frames=4).indices(100), Sampling(policy="every", frames=4, step=30).indices(100)
        ([12, 37, 62, 87], [0, 30, 60, 90])
    """

    policy: Literal["uniform", "every"] = "uniform"
    frames: int = 16
    step: int = 1

    def indices(self, total: int) -> list[int]:
        """Frames of a video that has so many.

        Raises:
            DataError: The video has no frame.
            ConfigError: No frame is wanted.
        """
        if self.policy == "uniform":
            return uniform(total, self.frames)
        return every(total, self.step, most=self.frames)

    def count(self, total: int) -> int:
        """How many those are; of ``uniform``, ``total`` need not be known and may be 0.

        Raises:
            DataError: It is 0 where it must be known.
        """
        return self.frames if self.policy == "uniform" else len(self.indices(total))


def uniform(total: int, count: int) -> list[int]:
    """The frame in the middle of each of ``count`` equal segments.

    A video of fewer frames gives each of them several times, so that there are always ``count``.

    Args:
        total: Frames there are.
        count: Frames wanted.

    Raises:
        DataError: The video has no frame.
        ConfigError: No frame is wanted.

    Example:
        >>> uniform(100, 4), uniform(3, 6)
        ([12, 37, 62, 87], [0, 0, 1, 1, 2, 2])
    """
    _check(total, count)
    return [(2 * i + 1) * total // (2 * count) for i in range(count)]


def every(total: int, step: int, *, first: int = 0, most: int = 0) -> list[int]:
    """Every ``step``-th frame from ``first`` on, as many as there are, or the first ``most`` of them.

    Args:
        total: Frames there are.
        step: From one to the next.
        first: Where it begins.
        most: How many at most; 0: all.

    Raises:
        DataError: The video ends before the first frame that is wanted.
        ConfigError: The step is not 1 or more, or ``first`` or ``most`` is negative.

    Example:
        >>> every(10, 4), every(10, 4, first=1, most=2)
        ([0, 4, 8], [1, 5])
    """
    if step < 1 or first < 0 or most < 0:
        raise ConfigError(
            f"step is {step}, first {first}, most {most}",
            place="frame sampling",
            remedy="set step to 1 or more, first and most to 0 or more",
        )
    _check(total, 1)
    if first >= total:
        raise DataError(
            f"the first frame wanted is number {first}, the video has {total}",
            place="frame sampling",
            remedy="begin earlier, or leave the video out",
        )
    found = list(range(first, total, step))
    return found[:most] if most else found


def in_segments(total: int, count: int, *, seed: int, item: str = "") -> list[int]:
    """A random frame of each of ``count`` equal segments (TSN, https://arxiv.org/abs/1608.00859), for training.

    Segments of less than a frame share frames, so that there are always ``count``.

    Args:
        total: Frames there are.
        count: Frames wanted.
        seed: The same seed and item give the same frames; count epochs into it for new ones.
        item: Name of the video, so that videos of one length do not all give the same frames.

    Raises:
        DataError: The video has no frame.
        ConfigError: No frame is wanted.

    Example:
        >>> in_segments(100, 4, seed=0) == in_segments(100, 4, seed=0) != in_segments(100, 4, seed=1)
        True
    """
    _check(total, count)
    digest = hashlib.sha256(f"{seed} frames {item}".encode()).digest()
    draw = random.Random(int.from_bytes(digest[:8], "little"))
    ends = [i * total // count for i in range(count + 1)]
    return [start + int(draw.random() * max(1, end - start)) for start, end in pairwise(ends)]


def _check(total: int, count: int) -> None:
    if total < 1:
        raise DataError(f"the video has {total} frames", place="frame sampling", remedy="leave the video out")
    if count < 1:
        raise ConfigError(f"{count} frames are wanted", place="frame sampling", remedy="ask for one or more")
