"""One answer at a time, in order; whoever leaves makes room."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable, Generator

import pytest

from plait.core.types import Completion
from plait.serving.worker import BusyError, GoneError, Job, Pieces, Worker

pytestmark = pytest.mark.light

DONE = Completion(id="r", text="", token_ids=(), finish="stop")


def pieces_of(log: list[str], name: str) -> Callable[[], Pieces]:
    def pieces() -> Generator[str, None, Completion]:
        try:
            for number in range(3):
                log.append(f"{name}{number}")
                yield f"{name}{number}"
            return DONE
        finally:
            log.append(f"{name} closed")

    return pieces


async def here() -> bool:
    return False


async def finish(job: Job) -> list[str]:
    said: list[str] = []
    try:
        while isinstance(piece := await job.next(), str):
            said.append(piece)
        assert piece is DONE
        return said
    finally:
        job.close()


def test_answers_do_not_mix_and_come_in_order() -> None:
    async def main() -> list[str]:
        worker, log = Worker(), list[str]()

        async def one(name: str) -> list[str]:
            return await finish(await worker.begin(pieces_of(log, name), gone=here))

        assert await asyncio.gather(*(one(name) for name in "abc")) == [[f"{n}{i}" for i in range(3)] for n in "abc"]
        worker.shut()
        return log

    log = asyncio.run(main())
    assert log == [f"{name}{step}" for name in "abc" for step in ("0", "1", "2", " closed")]


def test_more_than_the_limit_are_turned_away_and_room_comes_back() -> None:
    async def main() -> None:
        worker, log = Worker(waiting=1), list[str]()
        first = await worker.begin(pieces_of(log, "a"), gone=here)
        second = asyncio.create_task(worker.begin(pieces_of(log, "b"), gone=here))
        await asyncio.sleep(0)
        assert worker.waiting == 1
        with pytest.raises(BusyError):
            await worker.begin(pieces_of(log, "c"), gone=here)
        second.cancel()  # a waiting client that leaves makes room for another
        with pytest.raises(asyncio.CancelledError):
            await second
        third = asyncio.create_task(worker.begin(pieces_of(log, "d"), gone=here))
        await asyncio.sleep(0)
        first.close()
        first.close()
        assert await finish(await third) == ["d0", "d1", "d2"]
        worker.shut()

    asyncio.run(main())


def test_a_closed_job_stops_after_the_token_at_hand() -> None:
    async def main() -> list[str]:
        worker, log, going = Worker(), list[str](), threading.Event()

        def slow() -> Generator[str, None, Completion]:
            try:
                for number in range(100):
                    log.append(str(number))
                    going.wait(10)
                    yield str(number)
                return DONE
            finally:
                log.append("closed")

        job = await worker.begin(slow, gone=here)
        step = asyncio.create_task(job.next())
        while not log:
            await asyncio.sleep(0.001)
        step.cancel()
        job.close()  # while the thread is inside the generator
        going.set()
        assert await finish(await worker.begin(pieces_of(log, "b"), gone=here)) == ["b0", "b1", "b2"]
        worker.shut()
        return log

    assert asyncio.run(main())[:3] == ["0", "closed", "b0"]


def test_a_fault_before_the_first_piece_or_a_client_who_left_frees_the_model() -> None:
    async def main() -> None:
        worker, log = Worker(), list[str]()

        def broken() -> Pieces:
            raise ValueError("bad request")

        async def left() -> bool:
            return True

        with pytest.raises(ValueError, match="bad request"):
            await worker.begin(broken, gone=here)
        with pytest.raises(GoneError):
            await worker.begin(pieces_of(log, "a"), gone=left)
        assert log == []
        assert await finish(await worker.begin(pieces_of(log, "b"), gone=here)) == ["b0", "b1", "b2"]
        worker.shut()

    asyncio.run(main())
