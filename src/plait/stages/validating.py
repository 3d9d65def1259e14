"""What stages that train have in common where training is judged while it goes on: that there is a split, what is said.

Imports no torch: recipes are checked without it.
"""

from __future__ import annotations

import math
from collections.abc import Collection
from pathlib import Path
from typing import TYPE_CHECKING, Any

from plait.core.errors import DataError
from plait.core.files import read_jsonl
from plait.data.sources import VALIDATION

if TYPE_CHECKING:
    from plait.training.settings import FitResult
    from plait.training.trainer import Trainer


def judged_splits(trainer: Trainer) -> tuple[str, ...]:
    """The split that a stage has to read beside the others; none where nothing is judged."""
    return (VALIDATION,) if trainer.validation else ()


def judged_samples(trainer: Trainer, *phases: int) -> int:
    """Samples that go forward through the model, and not back, to judge phases of so many steps each."""
    asked = trainer.validation
    if asked is None:
        return 0
    return (1 + asked.gap) * asked.samples * sum(math.ceil(steps / asked.every) for steps in phases)


def check_judged(there: Collection[str], trainer: Trainer, *, place: Path) -> None:
    """See that there is something to judge by.

    Args:
        there: Splits that were read.
        trainer: Of the stage.
        place: Of the data.

    Raises:
        DataError: Validation is set and the data stage made no such split.
    """
    if trainer.validation and VALIDATION not in there:
        raise DataError(
            f"trainer.validation is set, and there is no split {VALIDATION!r}",
            place=str(place),
            remedy="set data.source.validation and run the data stage again, or take trainer.validation out",
        )


def outcome(folder: Path, fitted: FitResult, *, steps: int) -> dict[str, Any]:
    """What was judged, for the seal: nothing where nothing was.

    Args:
        folder: That has ``metrics.jsonl``.
        fitted: What the loop gave.
        steps: Updates that were planned.
    """
    from plait.training.monitor import METRICS
    from plait.training.settings import EVALUATION, ON_TRAINING

    if fitted.best is None:
        return {}
    step, value = fitted.best
    found: dict[str, Any] = {"step": step, "steps": fitted.step, "planned": steps, EVALUATION: value}
    # From the file: what was complete when the stage was resumed has no values any more.
    record = next((r for r in read_jsonl(folder / METRICS) if r["step"] == step), {})
    if record.get(ON_TRAINING) is not None:
        found |= {ON_TRAINING: record[ON_TRAINING], "gap": value - record[ON_TRAINING]}
    return found


def said(found: dict[str, Any], *, what: str) -> str:
    """One line about :func:`outcome`.

    Args:
        found: What that gave, not empty.
        what: Of which phase or stage.
    """
    early = f", stopped early ({found['planned']:,} were planned)" if found["steps"] < found["planned"] else ""
    gap = ""
    if "gap" in found:
        gap = f"; on training samples {found['evaluation_training']:.4g}, gap {found['gap']:+.4g}"
    return (
        f"{what}: validation {found['evaluation']:.4g} is best at step {found['step']:,} of {found['steps']:,}{early}"
        f"{gap}; that model is kept"
    )
