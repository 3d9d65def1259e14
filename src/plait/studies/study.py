"""What every study is: settings that run, into a folder with results as data and as tables."""

from __future__ import annotations

from abc import abstractmethod
from pathlib import Path
from typing import Any

from pydantic import Field

from plait.core.events import Events
from plait.core.spec import Spec


class Study(Spec):
    """A study: all settings of it, a ``name`` among them, which is the command's."""

    workers: int = Field(default=0, ge=0)
    """Processes, of one thread each; 0: one for each core. The results do not depend on it."""

    @abstractmethod
    def collect(self, *, events: Events) -> dict[str, Any]:
        """Train and ask.

        Returns:
            Plain data: the settings, how many trainings (``trained``) in how many ``seconds``, and what they showed,
            with 95 % intervals over seeds.
        """

    @staticmethod
    @abstractmethod
    def markdown(results: dict[str, Any]) -> str:
        """Tables of what ``collect`` returned."""

    def run(self, folder: Path, *, events: Events) -> dict[str, Any]:
        """Collect, and write ``results.json`` and ``results.md`` into ``folder``, which exists.

        Returns:
            What ``results.json`` holds.
        """
        from plait.core.files import mark_done, write_atomic, write_json

        results = self.collect(events=events)
        write_json(folder / "results.json", results)
        write_atomic(folder / "results.md", self.markdown(results))
        summary = {"study": self.model_dump()["name"], "trained": results["trained"], "seconds": results["seconds"]}
        mark_done(folder, kind="study", previous=None, summary=summary)
        return results
