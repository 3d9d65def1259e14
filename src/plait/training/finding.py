"""One line of a check, and how a gradient that is too far off is put into one."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch

from plait.training.held import Gap, Gradient, compare
from plait.training.settings import Settings


@dataclass(frozen=True, slots=True, kw_only=True)
class Finding:
    """One line of a check.

    Attributes:
        name: What was looked at.
        status: ``fail`` where the training would be wrong.
        value: What was found.
        fix: What to do; empty where all is well.
        facts: The same as numbers.
    """

    name: str
    status: Literal["ok", "warn", "fail"]
    value: str
    fix: str = ""
    facts: Mapping[str, Any] | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Reference:
    """The gradient that others are compared with.

    Attributes:
        gradient: Of the whole batch.
        bounds: How far off each part may be.
        noise: How far rounding once moves it.
        dtype: In which it was computed; None: in that of the recipe.
    """

    gradient: Gradient
    bounds: Mapping[str, float]
    noise: float
    dtype: torch.dtype | None

    def judge(self, name: str, other: Gradient, *, fix: str) -> Finding:
        """Say how far another way of computing the step is off, and where."""
        gap = compare(self.gradient.of, other.of)
        counts = units_differ(self.gradient.sums.counts, other.sums.counts)
        return judged(name, gap, self.bounds, fix=fix, counts=counts)


def judged(name: str, gap: Gap, bounds: Mapping[str, float], *, fix: str, counts: str = "") -> Finding:
    """A finding of how far a gradient is off.

    Args:
        name: How it was computed.
        gap: From that of the whole batch.
        bounds: Of each part.
        fix: Where it is too far.
        counts: How the units differ, if they do.
    """
    over = {part: gap.parts[part] for part in gap.parts if not gap.parts[part] <= bounds.get(part, 0.0)}
    facts: dict[str, Any] = {"parts": dict(gap.parts), "bounds": {p: bounds.get(p) for p in gap.parts}}
    facts |= {"along": gap.along, "mean_z": gap.mean_z}
    if not over and not counts:
        tight = max(gap.parts, key=lambda part: gap.parts[part] / max(bounds.get(part, 0.0), 1e-300))
        to = f"to {gap.parts[tight]:.1e}" if gap.parts[tight] else "bits"
        return Finding(
            name=name,
            status="ok",
            value=f"the same {to} ({tight}; bound {bounds.get(tight, 0.0):.0e})",
            facts=facts,
        )
    said = [counts] if counts else []
    if over:
        each = [f"{part} by {percent(off)} (bound {bounds.get(part, 0.0):.0e})" for part, off in over.items()]
        listed = named(each)
        said.append(f"the gradient differs: {listed}; most in {gap.tensor}, by {percent(gap.own)}")
        if gap.along > 0.5 or gap.along < -0.25:
            said.append(f"along the gradient itself it is {1 + gap.along:.3g} times as long")
    return Finding(name=name, status="fail", value="; ".join(said), fix=fix, facts=facts)


def units_differ(before: Mapping[str, float], after: Mapping[str, float]) -> str:
    """How the counts of two computations of one step differ; "" if they do not."""
    differ = [n for n in before if not math.isclose(before[n], after.get(n, 0.0), rel_tol=1e-9)]
    if not differ:
        return ""
    return "counts differ: " + ", ".join(f"{n} {before[n]:g}, here {after.get(n, 0.0):g}" for n in differ)


def named(names: Sequence[str], *, limit: int = 3) -> str:
    """Some names for a line, and how many more there are."""
    return ", ".join(names[:limit]) + (f" and {len(names) - limit} more" if len(names) > limit else "")


def percent(share: float) -> str:
    """For a line: ``3.2 %``, or ``1.0e-06`` where that is little."""
    return f"{100 * share:.2g} %" if abs(share) >= 1e-4 or share == 0 else f"{share:.1e}"


def recipe_dtype(settings: Settings) -> torch.dtype:
    """The number format that the recipe trains in."""
    return getattr(torch, settings.compute.dtype)
