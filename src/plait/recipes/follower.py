"""Sends a run's records to a tracker, from its files: ``python -m plait.recipes.follower RUN SETTINGS`` beside it.

A process of its own reads ``metrics.jsonl``, so that a tracker that raises, hangs, is slow or draws random numbers
never touches training: the file is the buffer, nothing has to be dropped, and what was not sent can be sent later. It
ends when its input is closed, that is also where the run was killed.
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import math
import os
import re
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from plait.core.errors import PlaitError, ResourceError
from plait.core.files import read_json, write_json
from plait.core.yamltext import is_list, is_mapping, read_file
from plait.recipes.trackers import READS, Told, Tracker

FOLDER = "trackers"
"""In the run folder: for each tracker what it has been sent, and what its library said."""

_METRICS = "metrics.jsonl"
_STAGE = re.compile(r"\d{2,}-(.+)")
_BATCH = 100
_LOOKS_S = 1.0
_LONGEST_S = 60.0
_GRACE_S = 30.0


@dataclass(slots=True)
class Sent:
    """What a tracker has been sent.

    Attributes:
        id: What it calls the run.
        upto: Last step of each stage or phase.
        scores: Stages whose scores it has.
        sending: Stage, first and last step on their way.
        error: What went wrong last; empty since it works.
    """

    id: str = ""
    upto: dict[str, int] = field(default_factory=dict[str, int])
    scores: list[str] = field(default_factory=list[str])
    sending: tuple[str, int, int] | None = None
    error: str = ""

    @classmethod
    def read(cls, path: Path) -> Sent:
        """From the run folder; nothing was sent where there is no sound file."""
        try:
            found: Any = read_json(path) if path.is_file() else {}
            sending = found.get("sending")
            return cls(
                id=str(found.get("id", "")),
                upto={str(k): int(v) for k, v in found.get("upto", {}).items()},
                scores=[str(one) for one in found.get("scores", [])],
                sending=(str(sending[0]), int(sending[1]), int(sending[2])) if sending else None,
                error=str(found.get("error", "")),
            )
        except (PlaitError, AttributeError, TypeError, ValueError, LookupError):
            return cls()


def sent_file(run: Path, name: str) -> Path:
    """Where it stands what a tracker has been sent."""
    return run / FOLDER / f"{name}.json"


class Follower:
    """Sends what is new; one at a time for a run and a tracker.

    Args:
        run: The run folder.
        name: Of the tracker.
        opens: Opens it.
        purges: Whether records that are sent again take the place of earlier ones.

    Raises:
        ResourceError: Another process sends, too.
    """

    def __init__(self, run: Path, name: str, opens: Callable[[Told], Tracker], *, purges: bool = False) -> None:
        self.run, self.name = run, name
        self._opens, self._tracker = opens, None
        (run / FOLDER).mkdir(exist_ok=True)
        self._lock = (run / FOLDER / f"{name}.lock").open("a")
        try:
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            self._lock.close()
            raise ResourceError(
                f"another process is sending to {name}", place=str(run), remedy="wait until the run has ended"
            ) from error
        self.sent = Sent.read(sent_file(run, name))
        if self.sent.sending:  # it was killed on the way: nobody knows which of these came there
            stage, first, last = self.sent.sending
            self.sent.upto[stage] = first - 1 if purges else max(last, self.sent.upto.get(stage, 0))
            self.sent.sending = None

    def send(self) -> int:
        """Send all that is there and was not sent; returns how many records.

        Raises:
            Exception: Whatever the tracker raises; what came there before is noted.
        """
        count = 0
        try:
            for stage, records in waiting(self.run, self.sent):
                for at in range(0, len(records), _BATCH):
                    count += self._batch(stage, records[at : at + _BATCH])
            for stage, values in self._scores():
                self._opened().scores(stage, values)
                self.sent.scores.append(stage)
                self._note()
        except Exception as error:
            self.sent.sending = None
            self.sent.error = f"{type(error).__name__}: {error}"[:500]
            self._note()
            raise
        if self.sent.error:
            self.sent.error = ""
            self._note()
        return count

    def finish(self) -> None:
        """Close the tracker, if it was ever opened, and let others send."""
        try:
            if self._tracker is not None:
                self._tracker.finish()
        finally:
            self._lock.close()

    def _batch(self, stage: str, records: list[tuple[int, dict[str, float]]]) -> int:
        tracker = self._opened()
        self.sent.sending = (stage, records[0][0], records[-1][0])
        self._note()
        for step, values in records:
            tracker.log(stage, step, values)
            self.sent.upto[stage] = step
        tracker.flush()
        self.sent.sending = None
        self._note()
        return len(records)

    def _opened(self) -> Tracker:
        if self._tracker is None:
            config = read_file(self.run / "recipe.yaml").plain()
            self._tracker = self._opens(Told(run=self.run, id=self.sent.id, config=config))
            self.sent.id = self._tracker.id
        return self._tracker

    def _scores(self) -> Iterator[tuple[str, dict[str, float]]]:
        for done in sorted(self.run.glob("*/done.json")):
            path, match = done.with_name("scores.json"), _STAGE.fullmatch(done.parent.name)
            if match and match[1] not in self.sent.scores and path.is_file():
                found: Any = read_json(path)
                values = {str(one["name"]): one["value"] for one in found if is_mapping(one)} if is_list(found) else {}
                yield match[1], _numbers(values)

    def _note(self) -> None:
        write_json(sent_file(self.run, self.name), asdict(self.sent))


def waiting(run: Path, sent: Sent) -> Iterator[tuple[str, list[tuple[int, dict[str, float]]]]]:
    """Records that were not sent, by stage and phase (``tune/decoder``); a line that is being written is not there yet.

    A resumed run makes the records after its checkpoint again, with equal values: those that were sent are not new.
    """
    for path in sorted([*run.glob(f"*/{_METRICS}"), *run.glob(f"*/*/{_METRICS}")]):
        top, *inside = path.relative_to(run).parts[:-1]
        if not (match := _STAGE.fullmatch(top)):
            continue
        stage = "/".join([match[1], *inside])
        found: list[tuple[int, dict[str, float]]] = []
        for line in path.read_text(encoding="utf-8", errors="replace").splitlines(keepends=True):
            with contextlib.suppress(ValueError, KeyError, TypeError):
                if line.endswith("\n"):
                    record = json.loads(line)
                    if (step := int(record.pop("step"))) > sent.upto.get(stage, 0):
                        found.append((step, _numbers(record)))
        if found:
            yield stage, found


def _numbers(values: Mapping[str, Any]) -> dict[str, float]:
    return {
        name: float(value)
        for name, value in values.items()
        if isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
    }


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


def serve(run: Path, name: str, opens: Callable[[Told], Tracker], *, purges: bool = False) -> int:
    """Follow a run until the input closes; one of a run that was killed may be on its last words still."""
    os.nice(10)
    ended = until_input_closes()
    while True:
        try:
            follower = Follower(run, name, opens, purges=purges)
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
    return serve(Path(arguments[0]), spec.name, spec.open, purges=spec.purges)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
