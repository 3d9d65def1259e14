"""A run folder as it lies on disk: complete, half done or damaged. What cannot be read is a fault the page tells."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from plait.core.errors import PlaitError
from plait.core.files import read_json, stage_folder
from plait.core.yamltext import is_list, is_mapping, read_file

State = Literal["done", "stopped", "unfinished", "waiting"]
"""Sealed; ended by a fault or a person; begun without an end so far (killed, or still at work); not begun."""

_FOLDER = re.compile(r"\d{2,}-(.+)")
_FAULTS_OF_A_FILE = 3  # damaged lines of one file named one by one; the rest are counted


@dataclass(slots=True)
class StageFolder:
    """One stage of the run.

    Attributes:
        begun: When it was first started, in seconds since the epoch; 0 if unknown.
        seconds: Work of all its attempts; of one that left no end, until its last event.
        attempts: How often it was started.
        stop: What the last attempt ended with, if it was a fault.
        summary: Of its seal; empty while it is not sealed.
        spec: Its settings.
    """

    name: str
    path: Path
    kind: str
    state: State = "waiting"
    begun: float = 0.0
    seconds: float = 0.0
    attempts: int = 0
    stop: str = ""
    summary: dict[str, Any] = field(default_factory=dict[str, Any])
    spec: dict[str, Any] = field(default_factory=dict[str, Any])


class RunFolder:
    """Everything a report reads.

    Args:
        path: The run folder.

    Attributes:
        faults: What could not be read, in words; grows while the page is made.
        stages: In the order of the recipe, also those not begun.
        events: Of ``events.jsonl``, those that are sound.
        time: Of the last event, in seconds since the epoch; 0 if there is none.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.faults: list[str] = []
        self.recipe_text = self.text(path / "recipe.yaml")
        self._recipe = self._read_recipe()
        self.env: dict[str, Any] = self.mapping(path / "env.json")
        self.events = list(self.lines(path / "events.jsonl"))
        self.time = max((moment(event) for event in self.events), default=0.0)
        self.stages = self._find_stages()

    @property
    def recipe(self) -> str:
        """Name of the recipe; where it cannot be read, that of the folder without its number."""
        named = self._recipe.get("name")
        return named if isinstance(named, str) else re.sub(r"-\d{4,}$", "", self.path.name)

    @property
    def seed(self) -> object:
        """Seed of the recipe; None if unknown."""
        return self._recipe.get("seed")

    @property
    def state(self) -> Literal["finished", "stopped", "unfinished"]:
        """Of the run as a whole."""
        states = {stage.state for stage in self.stages}
        if states == {"done"}:
            return "finished"
        return "stopped" if "stopped" in states else "unfinished"

    def shards(self, stage: StageFolder) -> Path | None:
        """The shard folder of the nearest stage, backwards from this one, that has one."""
        upto = self.stages[: self.stages.index(stage) + 1]
        return next((s.path / "shards" for s in reversed(upto) if (s.path / "shards").is_dir()), None)

    def size(self, stage: StageFolder) -> int:
        """Bytes of a stage's files; those that cannot be looked at count as a fault."""
        try:
            return sum(path.stat().st_size for path in stage.path.rglob("*") if path.is_file())
        except OSError as error:
            self.fault(f"{self.relative(stage.path)}: size unknown: {error}")
            return 0

    def relative(self, path: Path) -> str:
        """A path as the page names it."""
        return path.relative_to(self.path).as_posix()

    # --- reading: every fault is kept, none is raised --------------------------------------------------------------

    def fault(self, text: str) -> None:
        """Note something that could not be read or shown, once."""
        if text not in self.faults:
            self.faults.append(text)

    def text(self, path: Path) -> str:
        """A text file; empty if it is not there or cannot be read."""
        try:
            return path.read_text(encoding="utf-8", errors="replace") if path.is_file() else ""
        except OSError as error:
            self.fault(f"{self.relative(path)} cannot be read: {error.strerror or error}")
            return ""

    def json(self, path: Path) -> Any:
        """A JSON file; None if it is not there or damaged."""
        if not path.is_file():
            return None
        try:
            return read_json(path)
        except PlaitError as fault:
            self.fault(f"{self.relative(path)}: {fault.cause}")
        except OSError as error:
            self.fault(f"{self.relative(path)} cannot be read: {error.strerror or error}")
        return None

    def mapping(self, path: Path) -> dict[str, Any]:
        """A JSON file that holds an object; empty if it is not there or damaged."""
        value = self.json(path)
        if value is not None and not is_mapping(value):
            self.fault(f"{self.relative(path)}: expected an object, came {type(value).__name__}")
        return value if is_mapping(value) else {}

    def lines(self, path: Path) -> Iterator[dict[str, Any]]:
        """The sound objects of a JSON Lines file; a damaged line is a fault, and left out."""
        if not path.is_file():
            return
        bad = 0
        try:
            with path.open(encoding="utf-8", errors="replace") as file:
                for number, line in enumerate(file, 1):
                    try:
                        value = json.loads(line)
                    except ValueError:
                        value = None
                    if is_mapping(value):
                        yield value
                        continue
                    bad += 1
                    if bad <= _FAULTS_OF_A_FILE:
                        self.fault(f"{self.relative(path)}:{number} is not a JSON object and was left out")
        except OSError as error:
            self.fault(f"{self.relative(path)} cannot be read: {error.strerror or error}")
        if bad > _FAULTS_OF_A_FILE:
            self.fault(f"{self.relative(path)}: {bad - _FAULTS_OF_A_FILE:,} more damaged lines were left out")

    # --- what a run is -----------------------------------------------------------------------------------------------

    def _read_recipe(self) -> dict[str, Any]:
        try:
            return read_file(self.path / "recipe.yaml").plain()
        except PlaitError as fault:
            self.fault(f"recipe.yaml: {fault.cause}")
            return {}

    def _find_stages(self) -> list[StageFolder]:
        settings = {"data": self._recipe.get("data")} if self._recipe else {}
        named = self._recipe.get("stages")
        settings |= named if is_mapping(named) else {}
        folders = {stage_folder(self.path, at, name): name for at, name in enumerate(settings, 1)}
        for path in sorted(self.path.iterdir()):
            if path.is_dir() and path not in folders and (match := _FOLDER.fullmatch(path.name)):
                folders[path] = match[1]
        return [self._read_stage(path, name, settings.get(name)) for path, name in folders.items()]

    def _read_stage(self, path: Path, name: str, setting: object) -> StageFolder:
        done, spec = self.mapping(path / "done.json"), self.mapping(path / "spec.json")
        kinds = (done.get("kind"), spec.get("kind"), is_mapping(setting) and setting.get("kind"))
        kind = next((kind for kind in kinds if isinstance(kind, str)), name)
        summary = done.get("summary")
        stage = StageFolder(name, path, kind, summary=summary if is_mapping(summary) else {}, spec=spec)
        ended = self._follow(stage)
        if done:
            stage.state = "done"
        elif path.is_dir():
            stage.state = "stopped" if ended else "unfinished"
        return stage

    def _follow(self, stage: StageFolder) -> bool:
        """Read begin, work and end of a stage from the events; tell whether its last attempt has an end."""
        start: float | None = None
        last = 0.0
        ended = False
        for event in self.events:
            now = moment(event)
            if event.get("kind") == "stage" and event.get("state") == "started":
                if start is not None:  # the attempt before left no end
                    stage.seconds += max(last - start, 0.0)
                mine = event.get("stage") == stage.name
                start = now if mine else None
                if mine:
                    stage.attempts += 1
                    stage.begun = stage.begun or now
                    stage.stop, ended = "", False
            elif start is not None and event.get("kind") in ("error", "stage"):
                stage.seconds += max(now - start, 0.0)
                start, ended = None, True
                said = (event.get("text"), event.get("cause")) if event["kind"] == "error" else ()
                stage.stop = ": ".join(str(words) for words in said if words)
            last = now
        if start is not None:
            stage.seconds += max(last - start, 0.0)
        return ended


def moment(event: dict[str, Any]) -> float:
    """Seconds since the epoch; 0 where the record has no sound time."""
    return number_of(event.get("time")) or 0.0


def number_of(value: object) -> float | None:
    """A finite number, or None."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        return None
    try:
        return float(value) if math.isfinite(value) else None
    except OverflowError:
        return None


def records(value: object) -> list[dict[str, Any]]:
    """The objects of a list; nothing if it is no list."""
    return [item for item in value if is_mapping(item)] if is_list(value) else []
