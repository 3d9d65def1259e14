"""What ``test_mesh_faults.py`` starts: ``python mesh_faults.py`` prints what each process of each case gives, as JSON.

torch is imported once; every process is forked from there, before any torch operation.
"""

from __future__ import annotations

import json
import os
import signal
import time
from collections.abc import Callable
from typing import Any, NoReturn

import torch
from benchmarks.sides.several import together

from plait.core import collectives, mesh
from plait.core.errors import DataError, PlaitError, Stopped


def told(work: Callable[[], Any]) -> Callable[[], Any]:
    """As the process that joined sees it in the end: what it gave, or what it ended with."""

    def outside() -> Any:
        if work is killed_while_they_join and os.environ["RANK"] == "0":
            mesh.meet = lambda *_, **__: os.kill(os.getpid(), signal.SIGKILL)
        try:
            with mesh.joined():
                return work()
        except PlaitError as error:
            return [type(error).__name__, error.cause, error.rank]
        except KeyboardInterrupt as stop:
            return [type(stop).__name__, getattr(stop, "signal", 0)]

    return outside


def fail() -> NoReturn:
    raise DataError("half of a picture is missing", place="sample 7", remedy="fetch it again")


def first() -> list[Any]:
    """The first process works as if it were alone; then all are together again."""

    def work() -> list[int]:
        nested = mesh.first(lambda: mesh.rank() + 10)
        mesh.barrier()
        return [mesh.rank(), mesh.world(), int(mesh.active()), nested, len(mesh.gather("x"))]

    found = mesh.first(work)
    with mesh.joined():  # who is in need not come in again
        return [found, mesh.world(), int(collectives.all_reduce_sum(torch.tensor([mesh.rank() + 1])))]


def one_after_the_other() -> list[Any]:
    began: list[float] = []

    def work() -> str:
        began.append(time.monotonic())
        if not mesh.rank():
            time.sleep(0.3)
        return f"of {mesh.rank()}"

    found = mesh.first_then_others(work)
    times = mesh.gather(began[0])
    return [found, len(began), times[1] - times[0] > 0.3]


def fault_of_the_first() -> Any:
    return mesh.first(fail)


def fault_met_at_the_next_first() -> Any:
    """Nothing that needs all comes in between: the first one is told all the same."""
    if mesh.rank():
        fail()
    time.sleep(1.0)
    return mesh.first(lambda: "not done")


def stopped_because_of_another() -> Any:
    """A launcher stops the others once one has failed."""
    if mesh.rank():
        fail()
    time.sleep(1.0)
    raise Stopped(signal.SIGTERM, "terminated")


def stopped() -> Any:
    """Somebody stopped the second one, and nobody failed."""
    if mesh.rank():
        raise Stopped(signal.SIGTERM, "terminated")
    time.sleep(0.5)
    return mesh.first(lambda: "not done")


def killed() -> Any:
    """Says nothing."""
    if mesh.rank():
        os.kill(os.getpid(), signal.SIGKILL)
    mesh.barrier()


def first_killed() -> Any:
    """While the other one waits for it, and nothing else comes in between."""
    mesh.barrier()

    def die() -> None:
        time.sleep(0.3)
        os.kill(os.getpid(), signal.SIGKILL)

    return mesh.first(die)


def killed_while_they_join() -> Any:
    """The first one holds the store."""
    raise AssertionError("they have joined")


def interrupted() -> Any:
    """Ctrl-C, where nothing turns it into a wish."""
    if mesh.rank():
        raise KeyboardInterrupt
    time.sleep(0.5)
    return mesh.first(lambda: "not done")


CASES: tuple[Callable[[], Any], ...] = (
    first,
    one_after_the_other,
    fault_of_the_first,
    fault_met_at_the_next_first,
    stopped_because_of_another,
    stopped,
    killed,
    first_killed,
    interrupted,
    killed_while_they_join,
)

if __name__ == "__main__":
    print(json.dumps({case.__name__: together(2, told(case), join=False) for case in CASES}))
