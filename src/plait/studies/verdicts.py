"""What an interval says of a claim: one rule for all studies."""

from __future__ import annotations

import math
from typing import Literal

Verdict = Literal["supported", "contradicted", "not shown"]


def verdict(low: float, high: float, *, limit: float = 0.0) -> Verdict:
    """Of a claim that a figure is above a limit, from the figure's 95 % interval.

    Example:
        >>> verdict(0.1, 0.2), verdict(-0.2, -0.1), verdict(-0.1, 0.1), verdict(0.0, 0.0)
        ('supported', 'contradicted', 'not shown', 'not shown')
        >>> verdict(0.1, 0.2, limit=0.15), verdict(float("nan"), 0.2)
        ('not shown', 'not shown')
    """
    if not (math.isfinite(low) and math.isfinite(high)):
        return "not shown"
    return "supported" if low > limit else "contradicted" if high < limit else "not shown"
