"""What the records of a run say that somebody should look at: a loss that no longer falls, a loader that starves.

An alert depends on the records alone, so that a run that was killed and resumed says the same. Each is said once.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

_BLOCKS = 10
_STUDENT = 3.35539
"""One-sided 99.5 % of Student's t with 8 degrees of freedom: ten means, of which a line takes two. A run is looked at
some thirty times; at 95 % one of three noisy losses that fall would be called a plateau."""
_LEAST_RECORDS = 200
_PART_OF_RUN = 4
_LEAST_FALL = 0.02
_LEAST_RATE = 0.1
_WAITED = 0.2
_WAIT_RECORDS = 50


@dataclass(frozen=True, slots=True, kw_only=True)
class Alert:
    """Something to look at.

    Attributes:
        kind: ``plateau`` or ``starving``.
        text: What was seen, and what to do.
    """

    kind: str
    text: str


class Alerts:
    """Looks at one run's records, one after the other.

    **Plateau.** The window is the last quarter of all records that the run will have, at least 200. Its losses are
    averaged in ten blocks, and a line is fitted through their means. It is a plateau if the fall over the window is
    less than 2 % of the loss with 99.5 % confidence (upper end of the one-sided interval of Student's t): a loss too
    noisy to tell is none. It is looked for at the end of each block, while the learning rate is at a tenth of its peak
    or more: later a loss is meant to settle. Runs of fewer than 400 records are too short to say.

    **Starving.** Over the last 50 records data were waited for in more than 20 % of the time, and in more than half of
    these records, so that one stall is no alert.

    Args:
        records: That the whole run will have.
    """

    def __init__(self, records: int) -> None:
        window = max(_LEAST_RECORDS, records // _PART_OF_RUN)
        self._block = math.ceil(window / _BLOCKS)
        self._judges = records >= 2 * _LEAST_RECORDS
        self._losses: deque[tuple[int, float]] = deque(maxlen=self._block * _BLOCKS)
        self._waits: deque[tuple[float, float]] = deque(maxlen=_WAIT_RECORDS)
        self._seen = 0
        self._peak = 0.0
        self._said: set[str] = set()

    def record(self, record: Mapping[str, Any]) -> list[Alert]:
        """What is to be said after a record of ``metrics.jsonl``; mostly nothing."""
        found = [self._plateau(record), self._starving(record)]
        told = [one for one in found if one is not None and one.kind not in self._said]
        self._said |= {one.kind for one in told}
        return told

    def _plateau(self, record: Mapping[str, Any]) -> Alert | None:
        loss, rate, step = record.get("loss"), record.get("lr"), record.get("step", 0)
        if not isinstance(loss, int | float) or not math.isfinite(loss):
            return None
        self._losses.append((int(step), float(loss)))
        self._seen += 1
        rate = float(rate) if isinstance(rate, int | float) else 0.0
        self._peak = max(self._peak, rate)
        whole = len(self._losses) == self._losses.maxlen and not self._seen % self._block
        if not (self._judges and whole) or rate < _LEAST_RATE * self._peak:
            return None
        values = [value for _, value in self._losses]
        means = [math.fsum(values[at : at + self._block]) / self._block for at in range(0, len(values), self._block)]
        mean = math.fsum(means) / _BLOCKS
        if most_fall(means) >= _LEAST_FALL * abs(mean):
            return None
        first, last = self._losses[0][0], self._losses[-1][0]
        return Alert(
            kind="plateau",
            text=f"the loss no longer falls: by less than {_LEAST_FALL:.0%} from step {first:,} to {last:,} (mean "
            f"{mean:.4g}; 99.5 % confidence), with the learning rate at {rate:.2g}. Stop here, lower the rate, or look "
            "at what the model answers",
        )

    def _starving(self, record: Mapping[str, Any]) -> Alert | None:
        wait, seconds = record.get("data_wait"), record.get("seconds")
        if not isinstance(wait, int | float) or not isinstance(seconds, int | float):
            return None
        self._waits.append((float(wait), float(seconds)))
        if len(self._waits) < _WAIT_RECORDS:
            return None
        spent = math.fsum(seconds for _, seconds in self._waits)
        share = math.fsum(wait * seconds for wait, seconds in self._waits) / max(spent, 1e-9)
        often = sum(wait > _WAITED for wait, _ in self._waits)
        if share <= _WAITED or often <= _WAIT_RECORDS // 2:
            return None
        return Alert(
            kind="starving",
            text=f"training waits for data: {share:.0%} of the time of the last {_WAIT_RECORDS} records. Raise "
            "trainer.workers (processes that make batches ahead), or keep features (tune's cache)",
        )


def most_fall(means: list[float]) -> float:
    """The most that equally spaced means of a window may have fallen from its beginning to its end.

    The upper end of the one-sided 99.5 % interval, from a straight line through ten means with independent errors.
    """
    count = len(means)
    middle, mean = (count - 1) / 2, math.fsum(means) / count
    spread = math.fsum((at - middle) ** 2 for at in range(count))
    slope = math.fsum((at - middle) * value for at, value in enumerate(means)) / spread
    rest = math.fsum((value - mean - slope * (at - middle)) ** 2 for at, value in enumerate(means))
    error = math.sqrt(rest / (count - 2) / spread)
    return count * (-slope + _STUDENT * error)
