"""What each stage of a pipeline computes, one after the other, and how long it then stands idle.

GPipe (Huang et al., https://arxiv.org/abs/1811.06965): all micro-batches forward, then all backward. 1F1B, also known
as PipeDream-flush (Narayanan et al., https://arxiv.org/abs/2006.09503, figure 4; Megatron-LM,
https://arxiv.org/abs/2104.04473, section 2.2): backward as early as possible, so that a stage never holds the
activations of more micro-batches than there are stages from it to the last. With ``p`` stages of equal times and ``m``
micro-batches both are idle for the same share of a step, the bubble: ``(p - 1) / (m + p - 1)``.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any, Literal, NamedTuple

Kind = Literal["forward", "backward", "wait"]


class Action(NamedTuple):
    """One pass of one micro-batch through one stage."""

    kind: Literal["forward", "backward"]
    micro: int


@dataclass(frozen=True, slots=True)
class Span:
    """What a stage did in a stretch of time.

    Attributes:
        stage: From 0.
        kind: ``wait``: for its neighbors.
        micro: The micro-batch that it worked on or waited for, from 0.
        start: Seconds, from the same moment in all stages.
        end: Likewise.
    """

    stage: int
    kind: Kind
    micro: int
    start: float
    end: float


def gpipe(stage: int, stages: int, micro: int) -> list[Action]:
    """All forward, then all backward.

    Args:
        stage: From 0.
        stages: How many.
        micro: Micro-batches of a step.
    """
    _check(stage, stages, micro)
    return [*(Action("forward", k) for k in range(micro)), *(Action("backward", k) for k in range(micro))]


def one_forward_one_backward(stage: int, stages: int, micro: int) -> list[Action]:
    """As many forward as there are stages after this one; then one forward, one backward in turn; then the rest.

    Args:
        stage: From 0.
        stages: How many.
        micro: Micro-batches of a step.

    Example:
        >>> "".join(a.kind[0] + str(a.micro) + " " for a in one_forward_one_backward(0, 2, 3))
        'f0 f1 b0 f2 b1 b2 '
    """
    _check(stage, stages, micro)
    ahead = min(micro, stages - 1 - stage)
    order = [Action("forward", k) for k in range(ahead)]
    for k in range(micro - ahead):
        order += [Action("forward", ahead + k), Action("backward", k)]
    return order + [Action("backward", k) for k in range(micro - ahead, micro)]


SCHEDULES: Mapping[str, Callable[[int, int, int], list[Action]]] = {"1f1b": one_forward_one_backward, "gpipe": gpipe}
"""By the names that recipes use."""


def bubble(stages: int, micro: int) -> float:
    """Idle share of a step where all stages take equally long: ``(p - 1) / (m + p - 1)``.

    Example:
        >>> bubble(4, 1), bubble(4, 9)
        (0.75, 0.25)
    """
    return (stages - 1) / (micro + stages - 1)


def most_kept(order: Iterable[Action]) -> int:
    """The most micro-batches whose activations a stage holds at a time: gone forward, not yet backward."""
    kept = most = 0
    for action in order:
        kept += 1 if action.kind == "forward" else -1
        most = max(most, kept)
    return most


def simulated(
    schedule: Callable[[int, int, int], list[Action]],
    *,
    forward: Sequence[float],
    backward: Sequence[float],
    micro: int,
) -> list[Span]:
    """The timeline of a step where messages take no time.

    Args:
        schedule: One of :data:`SCHEDULES`.
        forward: Time that each stage takes for a micro-batch.
        backward: Likewise.
        micro: Micro-batches of a step.

    Raises:
        ValueError: The stages wait for each other for ever.
    """
    stages = len(forward)
    todo = [schedule(stage, stages, micro) for stage in range(stages)]
    done: dict[tuple[int, Action], float] = {}
    free = [0.0] * stages
    spans: list[Span] = []
    while any(todo):
        before = len(spans)
        for stage, rest in enumerate(todo):
            while rest:
                action = rest[0]
                ready = _ready(stage, action, stages=stages, done=done)
                if ready is None:
                    break
                start = max(free[stage], ready)
                if start > free[stage]:
                    spans.append(Span(stage, "wait", action.micro, free[stage], start))
                took = (forward if action.kind == "forward" else backward)[stage]
                free[stage] = done[stage, action] = start + took
                spans.append(Span(stage, action.kind, action.micro, start, start + took))
                rest.pop(0)
        if len(spans) == before:
            raise ValueError(f"the stages wait for each other: {[str(rest[0]) for rest in todo if rest]}")
    return spans


def _ready(stage: int, action: Action, *, stages: int, done: Mapping[tuple[int, Action], float]) -> float | None:
    """When what an action needs is there; None: not yet known."""
    if action.kind == "forward":
        return done.get((stage - 1, action)) if stage else 0.0
    if stage < stages - 1:
        return done.get((stage + 1, action))
    return done.get((stage, Action("forward", action.micro)))


def idle_share(spans: Iterable[Span]) -> float:
    """Share of a step, from the first start to the last end, in which stages compute nothing; mean over all of them."""
    working = [span for span in spans if span.kind != "wait"]
    if not working:
        return 0.0
    length = max(span.end for span in working) - min(span.start for span in working)
    stages = {span.stage for span in working}
    return 1 - sum(span.end - span.start for span in working) / (len(stages) * length)


def timeline_record(spans: Sequence[Span], *, step: int, schedule: str) -> dict[str, Any]:
    """A measured step as plain data, which the report draws.

    Args:
        spans: Of all stages.
        step: Which, from 1.
        schedule: Its name.
    """
    stages, micro = (1 + max(getattr(span, name) for span in spans) for name in ("stage", "micro"))
    first = min(span.start for span in spans)
    return {
        "step": step,
        "schedule": schedule,
        "stages": stages,
        "micro_batches": micro,
        "idle": idle_share(spans),
        "bubble": bubble(stages, micro),
        "spans": [asdict(replace(span, start=span.start - first, end=span.end - first)) for span in spans],
    }


def _check(stage: int, stages: int, micro: int) -> None:
    if not 0 <= stage < stages or micro < 1:
        raise ValueError(
            f"stage {stage} of {stages} with {micro} micro-batches: stages count from 0, micro-batches from 1"
        )
