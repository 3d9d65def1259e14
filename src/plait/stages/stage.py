"""What every stage is: a frozen spec with ``run(previous, folder)`` and an estimate made before anything runs."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Generator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import ClassVar, Literal

from plait.core.errors import PlaitError
from plait.core.estimate import Estimate, Machine
from plait.core.events import Events
from plait.core.spec import Spec

Task = Literal["name.en", "name.zh", "yesno", "group", "left", "right", "above", "count"]
"""Kinds of questions that the data stage can make."""


class Stage(Spec, ABC):
    """Base of all stage specs.

    A stage reads only the folder of the one before it and writes only its own; the last thing it writes is the seal
    (:func:`plait.core.files.mark_done`). A sealed stage is not run again; running an unsealed one continues it.

    Of several processes each has a folder of its own; checkpoints are in the first one's, and its seal alone counts.
    """

    together: ClassVar[bool] = False
    """Whether several processes run it together; else the first one runs it, and the others wait."""

    kind: str
    """Which stage this is."""

    seed: int = 0
    """Seed of everything random in the stage; taken from the recipe unless given."""

    @abstractmethod
    def run(self, previous: Path | None, folder: Path, *, events: Events) -> Path:
        """Do the work and return ``folder``.

        Args:
            previous: Sealed folder of the stage before, None for the first.
            folder: This stage's folder, which exists; may hold the work of an interrupted attempt.
            events: Where to say what happens.
        """

    def dealt(self) -> Mapping[str, int]:
        """How many samples a step has, by setting: what several processes deal out among themselves."""
        return {}

    def shares(self, processes: int, *, setting: str = "") -> int:
        """Into how many shares a batch is dealt among so many processes.

        Args:
            processes: How many.
            setting: Of :meth:`dealt`; what has no language model is dealt to all of them.

        Raises:
            ConfigError: They cannot be divided as the stage's settings say.
        """
        return processes

    def check(self, machine: Machine) -> None:
        """Look, before anything is written, for what would stop :meth:`run` later; cheap, and loads no weights.

        Args:
            machine: What this machine can do.

        Raises:
            ConfigError: A setting cannot work; the place names it.
            ResourceError: A package or device is missing; likewise.
        """

    @abstractmethod
    def estimate(self, machine: Machine, before: Mapping[str, Estimate]) -> Estimate:
        """What :meth:`run` will need, from the spec alone; writes nothing and loads no weights.

        Args:
            machine: What this machine can do.
            before: Estimates of the earlier stages by stage kind.
        """


@contextmanager
def named_setting(setting: str) -> Generator[None]:
    """Let a fault found in the block name the setting it comes from."""
    try:
        yield
    except PlaitError as error:
        error.place = setting
        raise
