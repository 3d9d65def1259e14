"""The stage that a foreign configuration is written for: where in it a rate, a length or a batch stands."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from plait.core.errors import ConfigError
from plait.recipes.foreign.account import Ledger
from plait.recipes.recipe import Recipe
from plait.stages.align import Align
from plait.stages.pretrain import Pretrain
from plait.stages.tune import Tune

KINDS: dict[str, type[Pretrain | Tune | Align]] = {"tune": Tune, "pretrain": Pretrain, "align": Align}
"""Kinds of stages that train."""

OPTIMIZER, SCHEDULE, PARALLEL = "trainer.optimizer", "trainer.schedule", "trainer.parallel"
"""Where in a stage these groups stand."""


@dataclass(frozen=True, slots=True)
class Target:
    """One stage of a recipe.

    Attributes:
        name: Of the stage in the recipe.
        spec: The stage as the parent recipe has it; the defaults where it has none.
        processes: How many processes the foreign configuration was for; 0 where nobody says.
    """

    name: str
    spec: Pretrain | Tune | Align
    processes: int = 0

    @classmethod
    def of(cls, recipe: Recipe, name: str, *, processes: int = 0) -> Target:
        """The stage of a recipe.

        Raises:
            ConfigError: It trains nothing, or there is no such stage and no such kind.
        """
        found = recipe.stages.get(name)
        if found is None and name in KINDS:
            return cls(name, KINDS[name](), processes)
        if isinstance(found, Tune | Pretrain | Align):
            return cls(name, found, processes)
        trains = [known for known, stage in recipe.stages.items() if isinstance(stage, Tune | Pretrain | Align)]
        what = f"the stage {name!r} trains nothing" if found is not None else f"no stage {name!r}"
        remedy = f"take one of: {', '.join(dict.fromkeys([*trains, *KINDS]))}"
        raise ConfigError(what, place="--stage", remedy=remedy)

    @property
    def lr(self) -> str:
        """Where the peak rate stands."""
        return "adapt.lr" if isinstance(self.spec, Tune) else "lr"

    @property
    def steps(self) -> str:
        """Where the number of updates stands."""
        return "adapt.steps" if isinstance(self.spec, Tune) else "steps"

    @property
    def phase(self) -> str:
        """What to say of a rate or a length that is not the whole stage's."""
        return "of the phase `adapt`; `words` and `frozen` keep theirs" if isinstance(self.spec, Tune) else ""

    def at(self, path: str) -> Any:
        """What the parent recipe has at a path within the stage; None where there is no such setting."""
        found: Any = self.spec
        for name in path.split("."):
            found = getattr(found, name, None)
        return found

    def replicas(self, degrees: int) -> int:
        """Processes that each see other samples; 0 where nobody says.

        Args:
            degrees: Processes that share one sample: tensor x pipeline x context.

        Raises:
            ConfigError: They do not divide the processes.
        """
        if self.processes % degrees:
            raise ConfigError(
                f"{self.processes} processes are no multiple of {degrees}, which share each sample here",
                place="--processes",
                remedy="give the number of processes that the configuration was for",
            )
        return self.processes // degrees


@dataclass(frozen=True, slots=True)
class Batch:
    """Names of the three sizes of which two give the third: all = one x accumulated x replicas.

    Attributes:
        all: Samples of an update.
        one: Samples that one process takes at once.
        accumulated: Passes of an update; empty where the tool has no such key.
    """

    all: str
    one: str
    accumulated: str = ""


def map_batch(ledger: Ledger, target: Target, keys: Batch, *, degrees: int = 1, filled: bool = False) -> int | None:
    """Map the sizes of batches.

    The stage `tune` deals the rows of an update into parts, in each process: its `micro_batch` is what all processes
    take at once. In `pretrain` it is what one process takes.

    Args:
        ledger: Of all values.
        target: The stage.
        keys: Names of the sizes.
        degrees: Processes that share one sample.
        filled: Whether some of the sizes are filled in by somebody else, so that a missing one is not 1.

    Returns:
        Samples of an update, where they are known.

    Raises:
        ConfigError: They contradict each other.
    """
    size = {key: ledger.integer(key, least=1) for key in (keys.all, keys.one, keys.accumulated) if key in ledger}
    whole, one, passes = (size.get(key) for key in (keys.all, keys.one, keys.accumulated))
    replicas = target.replicas(degrees) if target.processes else 0
    if whole is None and passes is None and one and not filled:
        passes = 1  # as both tools have it
    if whole is None and one and passes and replicas:
        whole = one * passes * replicas
    _check_product(ledger, keys, one=one, passes=passes, replicas=replicas, whole=whole)
    if passes is None and whole and one and replicas:
        passes = whole // (one * replicas)
    all_of = whole or (None if one else target.spec.batch_size)  # accumulation alone is of the parent's batch
    settings: dict[str, Any] = {}
    if keys.all in size:
        ledger.maps(keys.all, {"batch_size": whole}, "samples of an update, in all processes together")
    elif whole is not None:
        settings["batch_size"] = whole
    if isinstance(target.spec, Align):
        why = "align takes its batches whole: lower batch_size for less memory"
    else:
        micro = _micro(target, all_of, one=one, passes=passes, replicas=replicas)
        why = "trainer.micro_batch says it, and follows from the number of processes: give --processes"
        if micro is not None:
            settings["trainer.micro_batch"], why = micro, _meaning(target)
    carriers = [key for key in (keys.accumulated, keys.one) if key in size]
    for key in carriers:
        if key != carriers[0] and settings:
            ledger.keeps(key, f"follows from the sizes above ({_said(settings)})")
        elif settings:
            if "batch_size" not in settings and keys.all not in size:
                why += "" if one is None else "; batch_size follows from the number of processes: give --processes"
            ledger.maps(key, settings, why)
        else:
            ledger.drops(key, why)
    return whole


def _check_product(
    ledger: Ledger, keys: Batch, *, whole: int | None, one: int | None, passes: int | None, replicas: int
) -> None:
    if not (whole and one and replicas) or keys.all not in ledger:
        return
    found = one * passes * replicas if passes else one * replicas
    if whole != found if passes else whole % found:
        made = f"{keys.one} {one} x " + (f"{keys.accumulated} {passes} x " if passes else "") + f"{replicas} processes"
        raise ConfigError(
            f"{keys.all} is {whole}, but {made} make {found}",
            place=ledger.leaf(keys.all).where,
            remedy="mend the file, or --processes",
        )


def _micro(target: Target, whole: int | None, *, one: int | None, passes: int | None, replicas: int) -> int | None:
    """`trainer.micro_batch`; 0 takes the whole batch; None where it is not known."""
    if passes == 1:
        return 0
    if isinstance(target.spec, Pretrain):
        if one is None and whole and passes and replicas:
            return math.ceil(whole / (passes * replicas))
        return one
    return math.ceil(whole / passes) if whole and passes else None


def _meaning(target: Target) -> str:
    if isinstance(target.spec, Pretrain):
        return "samples that a process takes at once; 0: all of its share"
    return "samples that all processes together take at once; 0: the whole batch"


def _said(settings: Mapping[str, Any]) -> str:
    return ", ".join(f"{path}: {value}" for path, value in settings.items())
