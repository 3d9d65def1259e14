"""Processes meet in a store that others have used: all agree on one new name, whatever those left there."""

from __future__ import annotations

import datetime
import threading
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch.distributed as dist

from plait.core.errors import ResourceError
from plait.core.meeting import meet

PATIENCE = datetime.timedelta(seconds=20)


def meeting(store: dist.Store, world: int, *, late: int = 0) -> list[str]:
    """Names that processes of one start agree on; the process ``late`` comes last."""
    others = threading.Semaphore(0)

    def come(rank: int) -> str:
        if rank == late:
            for _ in range(world - 1):
                others.acquire()
        else:
            others.release()
        return meet(store, rank=rank, world=world, patience=PATIENCE)

    with ThreadPoolExecutor(world) as pool:
        return list(pool.map(come, range(world)))


@pytest.mark.parametrize("late", [0, 2])
def test_each_start_has_a_name_of_its_own_that_all_agree_on(late: int) -> None:
    store = dist.HashStore()
    names = [meeting(store, world, late=min(late, world - 1)) for world in (3, 3, 2, 4)]
    assert [len(set(found)) for found in names] == [1, 1, 1, 1]
    assert len({found[0] for found in names}) == 4


def test_words_of_the_dead_are_not_answers() -> None:
    store = dist.HashStore()
    for rank in (1, 2):  # a start that ended before its first process came
        store.set(f"meet/{rank}", "dead")
    store.set("meet/0", '{"name": "dead", "heard": {"1": "dead", "2": "dead"}}')
    found = meeting(store, 3)
    assert len(set(found)) == 1
    assert found[0] != "dead"


def test_who_does_not_come_is_named() -> None:
    short = datetime.timedelta(seconds=0.1)
    with pytest.raises(ResourceError, match="process 0 of 3 waited in vain for 1, 2"):
        meet(dist.HashStore(), rank=0, world=3, patience=short)
    with pytest.raises(ResourceError, match="process 2 of 3 waited in vain for 0"):
        meet(dist.HashStore(), rank=2, world=3, patience=short)
