"""Which questions a stage takes, where it does not take all: drawn from the seed, and evenly."""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping, Sequence

from plait.core.types import Sample
from plait.data.sources import rank

HELD_OUT = ("test-style", "test-concept", "test-both")
"""Splits that are never trained on; the first is that of known things drawn in another style."""


def spread(samples: Sequence[Sample], tasks: Sequence[str], *, limit: int, seed: int) -> list[Sample]:
    """Up to ``limit`` questions in an order drawn from the seed, as many of each task as there are.

    Questions that are answered yes and such that are answered no take turns, those of one ``pair`` one after the other
    where both are there, so that no liking for a word is taught or measured. A smaller limit gives the beginning of
    what a larger one gives.
    """
    queues: list[list[Sample]] = []
    for task in tasks:
        of_task = sorted(
            (s for s in samples if s.meta["task"] == task),
            key=lambda s: (rank(seed, "spread", str(s.meta.get("pair", s.id))), s.id),
        )
        if task == "yesno":
            yes = [sample for sample in of_task if sample.text("assistant") == "yes"]
            no = [sample for sample in of_task if sample.text("assistant") != "yes"]
            of_task = _in_turn([yes, no])
        queues.append(of_task)
    return _in_turn(queues)[:limit]


def in_shares(samples: Sequence[Sample], shares: Mapping[str, float], *, limit: int, seed: int) -> list[Sample]:
    """Up to ``limit`` questions in an order drawn from the seed, of each task its share; fewer where one has too few.

    Yes and no take turns, as in :func:`spread`. Tasks without questions are left out, and the others have their shares.

    Args:
        samples: Questions.
        shares: Of the tasks, as numbers in proportion.
        limit: Most questions.
        seed: Of the choice.
    """
    queues = {task: spread(samples, [task], limit=len(samples), seed=seed) for task, share in shares.items() if share}
    queues = {task: queue for task, queue in queues.items() if queue}
    whole = sum(shares[task] for task in queues)
    exact = {task: shares[task] / whole for task in queues}
    total = min([limit, *(math.floor(len(queue) / exact[task] + 1e-9) for task, queue in queues.items())])
    number = {task: math.floor(total * share) for task, share in exact.items()}
    # What rounding down has left goes to those that lost most by it.
    by_loss = sorted(queues, key=lambda task: (number[task] - total * exact[task], task))
    for task in by_loss[: total - sum(number.values())] if queues else ():
        number[task] += 1
    return _in_turn([queue[: number[task]] for task, queue in queues.items()])


def held_out(there: Collection[str], wanted: str) -> str | None:
    """The wanted split, or else the first of :data:`HELD_OUT` that is there: own data have one of them only."""
    return next((split for split in (wanted, *HELD_OUT) if split in there), None)


def _in_turn(queues: Sequence[Sequence[Sample]]) -> list[Sample]:
    """One of each, then the next of each; who has none left is passed over."""
    longest = max(map(len, queues), default=0)
    return [queue[place] for place in range(longest) for queue in queues if place < len(queue)]
