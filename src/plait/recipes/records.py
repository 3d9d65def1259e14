"""What a run has recorded, read as it grows, and what of it a tracker has been sent."""

from __future__ import annotations

import contextlib
import json
import math
import os
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeAlias

from plait.core.errors import PlaitError
from plait.core.files import read_json
from plait.core.yamltext import is_list, is_mapping

FOLDER = "trackers"
"""In the run folder: for each tracker what it has been sent, and what its library said."""

Record: TypeAlias = tuple[int, dict[str, float]]
"""A step and its values."""

_METRICS = "metrics.jsonl"
_STAGE = re.compile(r"\d{2,}-(.+)")


@dataclass(slots=True)
class Sent:
    """What a tracker has been sent.

    Attributes:
        id: What it calls the run.
        upto: Last step of each stage or phase that it was given.
        sure: The same, of what it surely has; behind ``upto`` where a library only queues until it is closed.
        had: Of each stage or phase the last step that it was given, and the names of the values.
        scores: Stages whose scores it was given.
        sure_scores: The same, of those it surely has.
        sending: Stage, first and last step on their way.
        error: What went wrong last; empty since it works.
        finished: Whether it was closed after it was last opened.
    """

    id: str = ""
    upto: dict[str, int] = field(default_factory=dict[str, int])
    sure: dict[str, int] = field(default_factory=dict[str, int])
    had: dict[str, tuple[int, list[str]]] = field(default_factory=dict[str, tuple[int, list[str]]])
    scores: list[str] = field(default_factory=list[str])
    sure_scores: list[str] = field(default_factory=list[str])
    sending: tuple[str, int, int] | None = None
    error: str = ""
    finished: bool = True

    @classmethod
    def read(cls, path: Path) -> Sent:
        """From the run folder; nothing was sent where there is no sound file."""
        try:
            found: Any = read_json(path) if path.is_file() else {}
            upto, scores, sending = found.get("upto", {}), found.get("scores", []), found.get("sending")
            return cls(
                id=str(found.get("id", "")),
                upto=_steps(upto),
                sure=_steps(found.get("sure", upto)),
                had={str(k): (int(step), [str(one) for one in names]) for k, (step, names) in _items(found, "had")},
                scores=[str(one) for one in scores],
                sure_scores=[str(one) for one in found.get("sure_scores", scores)],
                sending=(str(sending[0]), int(sending[1]), int(sending[2])) if sending else None,
                error=str(found.get("error", "")),
                finished=bool(found.get("finished", True)),
            )
        except (PlaitError, AttributeError, TypeError, ValueError, LookupError):
            return cls()


def _items(found: Any, name: str) -> list[tuple[Any, Any]]:
    return list(found.get(name, {}).items())


def _steps(found: Any) -> dict[str, int]:
    return {str(stage): int(step) for stage, step in found.items()}


def sent_file(run: Path, name: str) -> Path:
    """Where it stands what a tracker has been sent."""
    return run / FOLDER / f"{name}.json"


@dataclass(frozen=True, slots=True)
class _Place:
    """How far a file was read: inode, bytes and time of change as seen then, the offset, and the line before it."""

    seen: tuple[int, int, int] = (0, 0, 0)
    offset: int = 0
    last: bytes = b""


class Records:
    """The records of a run that a tracker was not sent; a look reads what came since the last one.

    Args:
        run: The run folder.
        whole: Whether a record that was amended is due with all its values, not only with those that are new.
    """

    def __init__(self, run: Path, *, whole: bool = False) -> None:
        self._run, self._whole = run, whole
        self._places: dict[Path, _Place] = {}

    def again(self) -> None:
        """Start over: what was handed out may be due again."""
        self._places.clear()

    def waiting(self, sent: Sent) -> Iterator[tuple[str, list[Record]]]:
        """By stage and phase (``tune/decoder``); a line that is being written is not there yet.

        A resumed run makes the records after its checkpoint again, with equal values: those that were sent are not
        new. The last one sent is due again where values were added to it. What was handed out is taken as sent once
        the next item is asked for.
        """
        for stage, path in _files(self._run):
            try:
                lines, place = _tail(path, self._places.get(path, _Place()))
            except FileNotFoundError:  # a stage that starts over
                continue
            if found := self._due(lines, stage, sent):
                yield stage, found
            self._places[path] = place

    def _due(self, lines: Sequence[bytes], stage: str, sent: Sent) -> list[Record]:
        upto = sent.upto.get(stage, 0)
        had, names = sent.had.get(stage, (0, []))
        found: list[Record] = []
        for step, values in filter(None, map(_record, lines)):
            if step > upto:
                found.append((step, values))
            elif step == upto == had:
                added = {name: value for name, value in values.items() if name not in names}
                if added:
                    found.append((step, values if self._whole else added))
        return found


def _record(line: bytes) -> Record | None:
    """A line of a stage's metrics; None if it is damaged, see :func:`damaged`."""
    with contextlib.suppress(ValueError, KeyError, TypeError, AttributeError):
        record = json.loads(line.decode("utf-8", "replace"))
        return int(record.pop("step")), _numbers(record)
    return None


def _files(run: Path) -> Iterator[tuple[str, Path]]:
    for path in sorted([*run.glob(f"*/{_METRICS}"), *run.glob(f"*/*/{_METRICS}")]):
        top, *inside = path.relative_to(run).parts[:-1]
        if match := _STAGE.fullmatch(top):
            yield "/".join([match[1], *inside]), path


def _tail(path: Path, place: _Place) -> tuple[list[bytes], _Place]:
    """Whole lines after a place, and the place after them; all lines where the file is another one or was cut."""
    with path.open("rb") as file:
        status = os.fstat(file.fileno())
        seen = (status.st_ino, status.st_size, status.st_mtime_ns)
        if seen == place.seen:
            return [], place
        offset = 0
        if seen[0] == place.seen[0] and seen[1] >= place.offset:
            file.seek(place.offset - len(place.last))
            if file.read(len(place.last)) == place.last:  # the number of a deleted file may be given to a new one
                offset = place.offset
        file.seek(offset)
        content = file.read()
    content = content[: content.rfind(b"\n") + 1]
    lines = content.splitlines(keepends=True)
    last = lines[-1] if lines else place.last if offset else b""
    return lines, _Place(seen, offset + len(content), last)


def waiting(run: Path, sent: Sent) -> Iterator[tuple[str, list[Record]]]:
    """What a tracker was not sent, read from the beginning."""
    return Records(run).waiting(sent)


def damaged(run: Path) -> list[str]:
    """Where a line of metrics cannot be read, so that no tracker gets it: ``file:line``."""
    found: list[str] = []
    for _, path in _files(run):
        with contextlib.suppress(FileNotFoundError):  # a stage that starts over
            lines, _ = _tail(path, _Place())
            found += [f"{path.relative_to(run)}:{at}" for at, line in enumerate(lines, 1) if _record(line) is None]
    return found


def missing_scores(run: Path, sent: Sent) -> Iterator[tuple[str, Path]]:
    """Stages that are done and whose final scores a tracker was not sent, each with their file."""
    for done in sorted(run.glob("*/done.json")):
        path, match = done.with_name("scores.json"), _STAGE.fullmatch(done.parent.name)
        if match and match[1] not in sent.scores and path.is_file():
            yield match[1], path


def read_scores(path: Path) -> dict[str, float]:
    """Final scores of a stage by name.

    Raises:
        DataError: They cannot be read.
    """
    found: Any = read_json(path)
    return _numbers({str(one["name"]): one["value"] for one in found if is_mapping(one)} if is_list(found) else {})


def _numbers(values: Mapping[str, Any]) -> dict[str, float]:
    return {
        name: float(value)
        for name, value in values.items()
        if isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
    }
