"""What a run says while it works: durable events go to ``events.jsonl``, progress goes to whoever listens."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from plait.core.files import disk_error


@dataclass(frozen=True, slots=True, kw_only=True)
class Event:
    """One thing that happened.

    Attributes:
        kind: ``stage`` (started, done, skipped), ``note``, ``warning``, ``progress``, ``sample``, ``stopped`` or
            ``error``.
        time: Seconds since the epoch.
        text: One line for a person.
        fields: The same as data.
    """

    kind: str
    time: float
    text: str
    fields: Mapping[str, Any] = field(default_factory=dict[str, Any])


class Events:
    """Append-only log of a run, with listeners.

    Args:
        path: ``events.jsonl``; None keeps events in memory only for the listeners.
        listeners: Called with every event, in order.

    Example:
        >>> seen = []
        >>> Events(None, listeners=(seen.append,)).note("4,009 pictures found")
        >>> seen[0].text
        '4,009 pictures found'
    """

    def __init__(self, path: Path | None = None, *, listeners: tuple[Callable[[Event], None], ...] = ()) -> None:
        self.path = path
        self.listeners = listeners

    def emit(self, kind: str, text: str, **fields: Any) -> None:
        """Record an event durably and tell the listeners.

        Raises:
            ResourceError: The disk is full or not writable.
        """
        event = Event(kind=kind, time=time.time(), text=text, fields=fields)
        if self.path is not None:
            record = {"time": round(event.time, 3), "kind": kind, "text": text, **fields}
            try:
                with self.path.open("a", encoding="utf-8") as file:
                    file.write(json.dumps(record, ensure_ascii=False, default=str) + "\n")
            except OSError as error:
                raise disk_error(error, self.path) from error
        self._tell(event)

    def note(self, text: str, **fields: Any) -> None:
        """Say something worth keeping."""
        self.emit("note", text, **fields)

    def warning(self, text: str, **fields: Any) -> None:
        """Say something the person should look at."""
        self.emit("warning", text, **fields)

    def progress(self, task: str, done: int, total: int, **fields: Any) -> None:
        """Tell the listeners how far a task is; not written to the log.

        Args:
            task: What is being done, such as ``render`` or ``pretrain``.
            done: Units finished.
            total: Units in all; 0 if unknown.
            **fields: What to show beside it: loss, lr, tokens_per_s, ...
        """
        self._tell(Event(kind="progress", time=time.time(), text=task, fields={"done": done, "total": total, **fields}))

    def _tell(self, event: Event) -> None:
        for listener in self.listeners:
            listener(event)
