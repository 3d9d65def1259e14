"""What the align stage says at its end."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from plait.core.types import Score
from plait.stages.align import Align
from plait.training.settings import FitResult


def lines(stage: Align, fitted: FitResult, scores: Sequence[Score], *, pairs: Mapping[str, int]) -> list[str]:
    """How it went, for people.

    Args:
        stage: Its settings.
        fitted: What the loop gave.
        scores: Of the test pairs; none where there are none.
        pairs: Of each split.
    """
    said = [
        f"{fitted.step:,} steps over {pairs['train']:,} pairs of a right and a wrong answer "
        f"({', '.join(stage.tasks)}; beta {stage.beta:g})"
    ]
    if not scores:
        return [*said, "there is no held-out pair: nothing was scored"]
    after, before, gain, margin = scores[:4]  # over all tasks
    split = after.name.partition("/")[0]
    return [
        *said,
        f"{split}: the right answer is likelier in {after.value:.1%} of {after.n:,} pairs "
        f"(95 % {after.low:.1%} to {after.high:.1%}), before in {before.value:.1%}; "
        f"difference {gain.low:+.1%} to {gain.high:+.1%}",
        f"{split}: reward margin {margin.value:+.3f} (95 % {margin.low:+.3f} to {margin.high:+.3f})",
    ]
