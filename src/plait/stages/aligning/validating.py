"""How the align stage is judged while it trains: its loss on pairs of answers that it does not learn from."""

from __future__ import annotations

from collections.abc import Mapping

from torch import nn

from plait.assembly.multimodal import Multimodal
from plait.assembly.questions import Questions
from plait.core.errors import DataError
from plait.data.choice import spread
from plait.data.preference_batches import PreferenceBatches
from plait.data.sources import JUDGED_SEED, VALIDATION
from plait.objectives.preference import DirectPreference
from plait.stages.align import Align
from plait.training.settings import Settings
from plait.training.validate import Judged, Validation


def judged_pairs(stage: Align, built: Multimodal, questions: Questions) -> dict[str, PreferenceBatches]:
    """Pairs of ``validation``, and as many of ``train`` where the gap is wanted; nothing where nothing is judged.

    Every process has all of them: the first one judges. Which ones they are does not depend on the stage's seed, but
    for those of ``train`` where it does not learn from all.

    Args:
        stage: Its settings.
        built: The model.
        questions: Of both splits.

    Raises:
        DataError: No question of the split has a wrong answer.
    """
    if stage.trainer.validation is None:
        return {}
    held = questions.samples[VALIDATION]
    if not held:
        raise DataError(
            f"no question of {VALIDATION!r} of the tasks {', '.join(stage.tasks)} has a right and a wrong answer",
            place=f"stages.{stage.kind}.trainer.validation",
            remedy="hold out more (data.source.validation), or take trainer.validation out",
        )
    chosen = {VALIDATION: held}
    if stage.trainer.validation.gap:
        learned = questions.samples["train"]
        chosen["train"] = spread(learned, stage.tasks, limit=len(held), seed=JUDGED_SEED)
    return {split: stage.batches(built, questions, samples, rank=0, world=1) for split, samples in chosen.items()}


def judge_pairs(
    model: nn.Module, judged: Mapping[str, PreferenceBatches], objective: DirectPreference, *, settings: Settings
) -> Validation | None:
    """What training is judged by; None where nothing is.

    Args:
        model: That trains.
        judged: From :func:`judged_pairs`.
        objective: Has the reference of all of these pairs.
        settings: Of training.
    """
    if not judged:
        return None
    of = {split: Judged(objective=objective, batches=batches.__iter__) for split, batches in judged.items()}
    return Validation(
        model=model,
        held=of[VALIDATION],
        trained=of.get("train"),
        weights=settings.weights,
        compute=settings.compute,
    )
