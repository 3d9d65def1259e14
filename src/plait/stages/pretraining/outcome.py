"""What both forms of the pretrain stage show, say and seal."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

from torch import nn

from plait.core import mesh
from plait.core.errors import DataError
from plait.core.events import Events
from plait.core.files import write_json
from plait.core.types import Score
from plait.evaluation.picture_names import RetrievalTask
from plait.evaluation.space import LEAST
from plait.models.dual import DualEncoder
from plait.stages.validating import outcome, said
from plait.training.settings import FitResult

SHOWN = 3
"""Test pictures of each split for which answers are shown."""

_MILESTONES = 5  # how often they are shown while training


def milestones(steps: int) -> set[int]:
    """Steps after which answers are shown."""
    return {max(1, round(steps * part / _MILESTONES)) for part in range(1, _MILESTONES + 1)}


def check_pairs(number: int, place: Path, *, what: str = "training") -> None:
    """See that there are pairs to tell apart.

    Raises:
        DataError: There are not.
    """
    if number < 2:
        raise DataError(
            f"{number} {what} pairs: there is nothing to tell a picture's text from",
            place=str(place),
            remedy="give the data stage at least two pairs",
        )


def say_pieces(model: nn.Module, batch: int, micro: int, *, events: Events, what: str = "pairs") -> None:
    """Say in what pieces batches go through the model, and warn where the gradient is not that of the whole.

    Args:
        model: What learns.
        batch: Pairs of a step.
        micro: Pairs at once; 0: all.
        events: Told.
        what: Is in a batch.
    """
    kinds = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d)
    norms = sum(isinstance(module, kinds) for module in model.modules())
    like = "as it is of a tower with layer norms (vit, swin)"
    if 0 < micro < batch:
        pieces = -(-batch // micro)
        events.note(f"each batch of {batch:,} {what} is embedded {micro:,} at a time, in {pieces:,} micro-batches")
        if norms:
            events.warning(
                f"{norms} batch norms take their statistics from {micro:,} {what} at a time: the gradient is not that "
                f"of {batch:,} at once, {like}"
            )
    elif norms and mesh.world() > 1:
        events.warning(
            f"{norms} batch norms take their statistics from the {what} of each of {mesh.world()} processes: the "
            f"gradient is not that of one process, {like}"
        )


@runtime_checkable
class Found(Protocol):
    """What a task gives."""

    def recall_at_1(self) -> float:
        """Share of pictures whose first answer is right."""
        ...


@runtime_checkable
class Asked(Protocol):
    """A task whose answers are shown."""

    name: str

    def answers(self, result: Any, *, limit: int | None = None) -> list[dict[str, Any]]:
        """Records of the first pictures."""
        ...


def show(
    folder: Path,
    step: int,
    tasks: Sequence[Asked],
    *,
    results: Sequence[Found],
    written: Sequence[Sequence[str]] = (),
    events: Events,
    says: str = "is read as",
) -> None:
    """Keep answers for a few pictures of each split, and say one; written as a whole, so a repeated step repeats it.

    Args:
        folder: Of the stage.
        step: Finished steps.
        tasks: One a split.
        results: Of each task.
        written: Names that the model writes for the first pictures of each split, where it writes any.
        events: Told.
        says: What a picture does with the first answer to it.
    """
    (folder / "samples").mkdir(exist_ok=True)
    recall = {task.name: result.recall_at_1() for task, result in zip(tasks, results, strict=True)}
    samples: list[dict[str, Any]] = []
    for number, (task, result) in enumerate(zip(tasks, results, strict=True)):
        names = written[number] if written else ()
        listed = task.answers(result, limit=SHOWN)
        samples += [one | ({"written": names[at]} if names else {}) for at, one in enumerate(listed)]
    write_json(folder / "samples" / f"{step:06d}.json", {"step": step, "recall_at_1": recall, "samples": samples})
    if samples:
        first = samples[0]
        said = ", ".join(f"{split} {value:.1%}" for split, value in recall.items())
        text = f"step {step}: a picture of {first['truth']!r} {says} {first['top'][0]['text']!r}; R@1: {said}"
        if "written" in first:
            text += f"; its name is written {first['written']!r}"
        events.emit("sample", text, step=step, recall_at_1=recall, **{k: first[k] for k in ("id", "truth", "top")})


def shapes(tasks: Sequence[RetrievalTask], model: DualEncoder, *, events: Events, again: bool = False) -> list[Score]:
    """The shape of the space on each split, as far as it has one; an event says of which it has none, and why.

    Args:
        tasks: One a split.
        model: Whose space.
        events: Told.
        again: What there is too little of was said before.
    """
    scores: list[Score] = []
    for task in tasks:
        for halves in task.halves(model):
            number, of = len(set(halves.groups)), "/".join(halves.name.split("/")[1:])
            if number < LEAST:
                if not again:
                    events.note(f"{of}: {number} concepts are too few to measure the shape of the space ({LEAST})")
                continue
            try:
                scores += halves.scores(seed=task.seed)
            except DataError as error:
                events.warning(f"{of}: the shape of the space has no value: {error.cause}")
    return scores


def summarize(
    fitted: FitResult, scores: Sequence[Score], *, pairs: Mapping[str, int], folder: Path, steps: int
) -> dict[str, Any]:
    """For the seal and the closing lines.

    Args:
        fitted: What the loop gave.
        scores: Of all splits.
        pairs: How many each split has.
        folder: Of the stage.
        steps: Updates that were planned.
    """
    named = {score.name: score for score in scores}
    lines: list[str] = []
    for split in pairs:
        key = f"retrieval/{split}/image-to-text/R@1"
        if key in named:
            one, chance, gain = named[key], named[f"{key}/chance"], named[f"{key}/gain-over-untrained"]
            lines.append(
                f"{split}: the right name is found first for {one.value:.1%} of {one.n:,} pictures "
                f"(95 % {one.low:.1%} to {one.high:.1%}; chance {chance.value:.2%}; "
                f"over untrained heads {gain.low:+.1%} to {gain.high:+.1%}){_more(named, split)}{_heard(named, split)}"
            )
    lines = lines or ["there is no test split: nothing was scored"]
    judged = outcome(folder, fitted, steps=steps)
    return {
        "lines": [said(judged, what="pretrain"), *lines] if judged else lines,
        "checkpoint": str(fitted.checkpoint.relative_to(folder)),
        "steps": fitted.step,
        "skipped_steps": fitted.skipped,
        "pairs": dict(pairs),
        **({"validation": judged} if judged else {}),
        "recall_at_1": {
            split: named[f"retrieval/{split}/image-to-text/R@1"].value
            for split in pairs
            if f"retrieval/{split}/image-to-text/R@1" in named
        },
    }


def _heard(named: Mapping[str, Score], split: str) -> str:
    """How often a name that is said aloud finds its picture and its text, where the model hears."""
    said: list[str] = []
    for way, what in (("image", "picture"), ("text", "text")):
        key = f"retrieval/{split}/audio-to-{way}/R@1"
        if key in named:
            one, chance = named[key], named[f"{key}/chance"].value
            said.append(f"its {what} first for {one.value:.1%} ({one.low:.1%} to {one.high:.1%}; chance {chance:.2%})")
    return f"; a name said aloud finds {', '.join(said)}" if said else ""


def _more(named: Mapping[str, Score], split: str) -> str:
    """What judging and writing reach, where the model does both."""
    judged = named.get(f"retrieval/{split}/image-to-text/R@1/judged")
    written = named.get(f"writing/{split}/name/exact-match")
    if judged is None or written is None:
        return ""
    return (
        f"; where the nearest are judged again, for {judged.value:.1%} ({judged.low:.1%} to {judged.high:.1%}); "
        f"the name it writes is the right one for {written.value:.1%} ({written.low:.1%} to {written.high:.1%})"
    )
