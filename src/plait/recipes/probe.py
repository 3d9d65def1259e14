"""A few real steps of each training stage of a recipe, in a folder that goes away: ``plait plan --probe``."""

from __future__ import annotations

import contextlib
import json
import signal
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from plait.core import errors
from plait.core.errors import PlaitError, ResourceError
from plait.core.files import new_run
from plait.core.spec import Resolved
from plait.recipes.probe_stage import AFTER, BEFORE, SHOWN
from plait.recipes.recipe import Recipe
from plait.recipes.run import stages

STEPS = 3
"""Of each phase: the first one warms up, the others are timed."""

_NEAR = 0.99
_MODULE = "plait.recipes.probe_stage"


@dataclass(frozen=True, slots=True, kw_only=True)
class Phase:
    """A phase of a stage, as far as it ran.

    Attributes:
        phase: Its name.
        steps: That the recipe asks for.
        done: That ran.
        step_s: Seconds a step after the first one, without what is shown meanwhile.
        expected_s: Of all steps.
    """

    phase: str
    steps: int
    done: int
    step_s: float
    expected_s: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Probed:
    """What a training stage took.

    Attributes:
        stage: Its name.
        peak_bytes: Most memory of a process that ran this stage alone.
        section: Where that was: a phase, or ``before`` the first step, ``shown``, ``after`` the last step.
        peaks: Most memory of each section.
        phases: In order.
        rest_s: Seconds of everything but the steps: loading, encoding what no cache has, showing, scoring, saving.
    """

    stage: str
    peak_bytes: int
    section: str
    peaks: Mapping[str, int]
    phases: tuple[Phase, ...]
    rest_s: float

    @property
    def expected_s(self) -> float:
        """Of the whole stage, were loading and scoring to take as long as now."""
        return self.rest_s + sum(phase.expected_s for phase in self.phases)


def probe(resolved: Resolved[Recipe], *, say: Callable[[str], None], steps: int = STEPS) -> Iterator[Probed]:
    """Run the stages up to the last one that trains, each in a process of its own, with few steps.

    Everything goes to a temporary folder, but caches: features of pictures and converted weights are kept under
    ``PLAIT_HOME``, where a run finds them.

    Args:
        resolved: The recipe.
        say: Told what happens, a line each time.
        steps: At most, of each phase.

    Yields:
        What each training stage took, as soon as it is known.

    Raises:
        PlaitError: What a stage was stopped by.
    """
    with tempfile.TemporaryDirectory(prefix="plait-probe-") as folder:
        run = new_run(resolved.spec.name, Path(folder), contents={"recipe.yaml": resolved.to_yaml()})
        named = stages(resolved.spec, run)
        trains = [number for number, (_, stage, _) in enumerate(named, 1) if stage.together]
        for number, (name, stage, _) in enumerate(named[: max(trains, default=0)], 1):
            if not (stage.together or stage.kind == "data"):
                continue  # it scores or compresses what is trained: nothing after it needs that
            say(f"{name}: {'a few steps' if stage.together else 'made'} in a folder that goes away")
            found = _measured(run, number, steps=steps, say=lambda text, name=name: say(f"{name}: {text}"))
            if stage.together:
                yield _probed(found)


def _probed(found: Mapping[str, Any]) -> Probed:
    peaks: dict[str, int] = {name: peak for name, peak in found["peaks"].items() if peak}
    section = highest(peaks)
    phases = tuple(
        Phase(
            phase=one["phase"],
            steps=one["steps"],
            done=one["done"],
            step_s=one["step_s"],
            expected_s=one["step_s"] * one["steps"],
        )
        for one in found["phases"]
    )
    rest = found["seconds"] - sum(one["step_s"] * one["done"] for one in found["phases"])
    return Probed(
        stage=found["stage"],
        peak_bytes=max(peaks.values()),
        section=section,
        peaks=peaks,
        phases=phases,
        rest_s=max(0.0, rest),
    )


def highest(peaks: Mapping[str, int]) -> str:
    """Where memory is highest. A heap gives little back: of sections that are nearly as high, the first one made it so.

    Args:
        peaks: Of each section.

    Example:
        >>> highest({"before": 700, "decoder": 1000, "after": 1001, "shown": 999})
        'decoder'
    """
    order = {BEFORE: 0, SHOWN: 2, AFTER: 3}
    near = [name for name, peak in peaks.items() if peak >= _NEAR * max(peaks.values())]
    return min(near, key=lambda name: order.get(name, 1))


def _measured(run: Path, number: int, *, steps: int, say: Callable[[str], None]) -> dict[str, Any]:
    """Run one stage in a process of its own, and hand on what it says.

    Raises:
        PlaitError: What it was stopped by.
    """
    command = [sys.executable, "-m", _MODULE, str(run), str(number), str(steps)]
    with (
        tempfile.TemporaryFile("w+") as complaints,
        subprocess.Popen(command, stdout=subprocess.PIPE, stderr=complaints, text=True) as process,
    ):
        last: dict[str, Any] = {}
        try:
            assert process.stdout is not None
            shown = ""
            for line in process.stdout:
                last = json.loads(line)
                if (text := _text(last)) and text != shown:
                    say(text)
                    shown = text
            process.wait()
        finally:
            if process.poll() is None:
                process.terminate()
                with contextlib.suppress(subprocess.TimeoutExpired):
                    process.wait(timeout=30)
                process.kill()
        if "result" in last:
            return last["result"]
        if "error" in last:
            raise as_raised(last["error"])
        complaints.seek(0)
        raise ended(process.returncode, complaints.read(), place=str(run))


def _text(said: Mapping[str, Any]) -> str:
    """A line for a person; progress only where something is finished, or as good as."""
    kind, fields = said.get("event"), said.get("fields", {})
    if kind == "progress":
        done, total = fields["done"], fields["total"]
        return f"{said['text']} {done:,} of {total:,}" if total and done == total else ""
    return str(said["text"]) if kind in ("note", "warning") else ""


def as_raised(record: Mapping[str, Any]) -> PlaitError:
    """The error of another process."""
    found = [kind for kind in vars(errors).values() if isinstance(kind, type)]
    kinds = {kind.code: kind for kind in found if issubclass(kind, PlaitError)}
    return kinds.get(record["code"], PlaitError)(record["cause"], place=record["place"], remedy=record["remedy"])


def ended(code: int, complaints: str, *, place: str) -> PlaitError:
    """Why another process ended without a word.

    Args:
        code: Its exit code.
        complaints: What it wrote to stderr.
        place: What it worked on.
    """
    if code == -signal.SIGKILL:
        return ResourceError(
            "a step was ended by the system with SIGKILL, which is what it does where memory does not suffice",
            place=place,
            remedy="a smaller trainer.micro_batch, batch_size or model",
        )
    last = (complaints.strip().splitlines() or [f"exit code {code}"])[-1]
    return PlaitError(f"a stage could not be tried: {last}", place=place, remedy="run it with `plait run` to see more")
