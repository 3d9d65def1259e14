"""Sends a run's records to a tracker, from its files: ``python -m plait.recipes.follower RUN SETTINGS`` beside it.

A process of its own reads ``metrics.jsonl``, so that a tracker that raises, hangs, is slow or draws random numbers
never touches training: the file is the buffer, nothing has to be dropped, and what was not sent can be sent later. It
ends when its input is closed, that is also where the run was killed.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import sys
import threading
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict
from pathlib import Path

from plait.core.errors import PlaitError, ResourceError
from plait.core.files import write_json
from plait.core.yamltext import read_file
from plait.recipes.records import FOLDER, Record, Records, Sent, missing_scores, read_scores, sent_file
from plait.recipes.trackers import READS, Told, Tracker

_BATCH = 100
_LOOKS_S = 1.0
_LONGEST_S = 60.0
_GRACE_S = 30.0


class Follower:
    """Sends what is new; one at a time for a run and a tracker.

    Args:
        run: The run folder.
        name: Of the tracker.
        opens: Opens it.
        purges: Whether records that are sent again take the place of earlier ones.
        queues: Whether its library only queues what it is given: nobody knows what came there until it is closed.

    Raises:
        ResourceError: Another process sends, too.
    """

    def __init__(
        self, run: Path, name: str, opens: Callable[[Told], Tracker], *, purges: bool = False, queues: bool = False
    ) -> None:
        self.run, self.name = run, name
        self._opens, self._tracker = opens, None
        self._purges, self._queues = purges, queues
        (run / FOLDER).mkdir(exist_ok=True)
        self._lock = (run / FOLDER / f"{name}.lock").open("a")
        try:
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            self._lock.close()
            raise ResourceError(
                f"another process is sending to {name}", place=str(run), remedy="wait until the run has ended"
            ) from error
        self._records = Records(run, whole=purges)
        self.sent = Sent.read(sent_file(run, name))
        if self.sent.sending and not purges:  # it was killed on the way: nobody knows which of these came there
            stage, _, last = self.sent.sending
            self.sent.upto[stage] = max(last, self.sent.upto.get(stage, 0))
            self.sent.had.pop(stage, None)
        self.sent.sending = None
        if not self.sent.finished:
            self._unsure()

    def send(self) -> int:
        """Send all that is there and was not sent; returns how many records.

        Raises:
            Exception: Whatever the tracker raises; what came there before is noted. The next call opens it anew.
        """
        count = 0
        try:
            if not self.sent.finished:  # it was not closed, which is also done again
                self._opened()
            for stage, records in self._records.waiting(self.sent):
                for at in range(0, len(records), _BATCH):
                    count += self._batch(stage, records[at : at + _BATCH])
            for stage, path in missing_scores(self.run, self.sent):
                self._opened().scores(stage, read_scores(path))
                self.sent.scores.append(stage)
                self._note()
        except Exception as error:
            self._fault(error)
            raise
        if self.sent.error:
            self.sent.error = ""
            self._note()
        return count

    def finish(self) -> None:
        """Close the tracker, if it is open, and let others send.

        Raises:
            Exception: Whatever the tracker raises, which is noted.
        """
        try:
            if self._tracker is not None:
                self._close(self._tracker)
                self._note()
        except Exception as error:
            self.sent.error = _short(error)
            with contextlib.suppress(PlaitError):
                self._note()
            raise
        finally:
            self._tracker = None
            self._lock.close()

    def _batch(self, stage: str, records: list[Record]) -> int:
        tracker = self._opened()
        before = dict(self.sent.upto), dict(self.sent.had)
        first, last = records[0][0], records[-1][0]
        if first <= self.sent.sure.get(stage, 0):  # it was amended
            self.sent.sure[stage] = first - 1
        self.sent.sending = (stage, first, last)
        self._note()
        flushing = False
        try:
            for step, values in records:
                tracker.log(stage, step, values)
                self._given(stage, step, values)
            flushing = True
            tracker.flush()
        except Exception:
            if flushing or self._purges:
                self.sent.upto, self.sent.had = before
            raise
        self.sent.sending = None
        self._note()
        return len(records)

    def _given(self, stage: str, step: int, values: Mapping[str, float]) -> None:
        had, names = self.sent.had.get(stage, (0, []))
        self.sent.had[stage] = step, sorted({*values, *(names if had == step else [])})
        self.sent.upto[stage] = step

    def _opened(self) -> Tracker:
        if self._tracker is None:
            config = read_file(self.run / "recipe.yaml").plain()
            self._tracker = self._opens(Told(run=self.run, id=self.sent.id, config=config, keep=self._keep))
            self._keep(self._tracker.id)
        return self._tracker

    def _keep(self, name: str) -> None:
        self.sent.id, self.sent.finished = name, False
        self._note()

    def _fault(self, error: Exception) -> None:
        """Note it, and give the tracker up: one that failed may stay broken."""
        tracker, self._tracker = self._tracker, None
        self.sent.sending, self.sent.error = None, _short(error)
        self._records.again()
        with contextlib.suppress(PlaitError):  # a full disk; closing may last, and what is noted is what will be said
            self._note()
        if tracker is None:
            return
        try:
            self._close(tracker)
        except Exception as second:
            sys.stderr.write(f"{time.strftime('%H:%M:%S')} when it was closed: {_short(second)}\n")
            self._unsure()
        with contextlib.suppress(PlaitError):
            self._note()

    def _close(self, tracker: Tracker) -> None:
        tracker.finish()
        self.sent.finished = True
        self.sent.sure, self.sent.sure_scores = dict(self.sent.upto), list(self.sent.scores)

    def _unsure(self) -> None:
        if self._queues:
            self.sent.upto, self.sent.scores = dict(self.sent.sure), list(self.sent.sure_scores)

    def _note(self) -> None:
        if not self._queues:
            self.sent.sure, self.sent.sure_scores = dict(self.sent.upto), list(self.sent.scores)
        write_json(sent_file(self.run, self.name), asdict(self.sent))


def _short(error: Exception) -> str:
    return f"{type(error).__name__}: {error}"[:500]


def follow(follower: Follower, *, ended: Callable[[float], bool]) -> None:
    """Send what comes until the run ends; what fails is tried again, later each time, and once more at the end.

    Args:
        follower: Sends.
        ended: Waits so many seconds at most; whether the run has ended.
    """
    pause = _LOOKS_S
    over = False
    while not over:
        over = ended(pause)
        try:
            follower.send()
            pause = _LOOKS_S
        except Exception as error:  # a tracker may raise anything; it must not end what could work again
            sys.stderr.write(f"{time.strftime('%H:%M:%S')} {type(error).__name__}: {error}\n")
            pause = min(2 * pause, _LONGEST_S)
    follower.finish()


def until_input_closes(grace_s: float = _GRACE_S) -> Callable[[float], bool]:
    """Waits some seconds; tells whether the process that started this one has closed its input, or is gone.

    A tracker that then hangs for longer than the grace ends with this process: the other one may be gone.
    """
    over = threading.Event()

    def watch() -> None:
        while os.read(sys.stdin.fileno(), 4096):
            pass
        over.set()
        time.sleep(grace_s)
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()
    return over.wait


def serve(run: Path, name: str, opens: Callable[[Told], Tracker], *, purges: bool = False, queues: bool = False) -> int:
    """Follow a run until the input closes; one of a run that was killed may be on its last words still."""
    os.nice(10)
    ended = until_input_closes()
    while True:
        try:
            follower = Follower(run, name, opens, purges=purges, queues=queues)
            break
        except ResourceError as error:
            sys.stderr.write(f"{error}\n")
            if ended(_LOOKS_S):
                return 1
    follow(follower, ended=ended)
    return 0


def main(arguments: list[str]) -> int:
    """Follow a run."""
    spec = READS.validate_json(arguments[1])
    return serve(Path(arguments[0]), spec.name, spec.open, purges=spec.purges, queues=spec.queues)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
