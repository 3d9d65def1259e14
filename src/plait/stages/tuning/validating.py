"""How the phases of tune that learn from answers are judged while they train: their loss on questions never trained on.

The phase ``words`` is not: it learns the names of its pictures by heart, as the rows of a closed list.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

from plait.assembly.multimodal import Multimodal
from plait.core.device import Compute
from plait.core.errors import DataError
from plait.core.tensors import Patches
from plait.core.types import MediaRef, Sample
from plait.data.choice import in_shares
from plait.data.conversations import Conversation
from plait.data.held_batches import HeldBatches
from plait.data.sources import JUDGED_SEED, VALIDATION
from plait.data.template import Template
from plait.objectives.language import NextToken
from plait.stages.tune import Tune
from plait.training.validate import Judged, Validation


def judged_questions(spec: Tune, samples: Sequence[Sample], *, limit: int = 0) -> list[Sample]:
    """Questions in the shares of ``tasks``; the same ones whatever the stage's seed is.

    Args:
        spec: Of the stage; validation is set.
        samples: Of a split.
        limit: Most questions; 0 takes what the recipe says.

    Raises:
        DataError: There is none.
    """
    assert spec.trainer.validation is not None
    shares = {str(task): share for task, share in spec.tasks.items()}
    found = in_shares(samples, shares, limit=limit or spec.trainer.validation.samples, seed=JUDGED_SEED)
    if not found:
        raise DataError(
            f"no question of the split {VALIDATION!r} is of the tasks {', '.join(shares)}",
            place=f"stages.{spec.kind}.trainer.validation",
            remedy="hold out more (data.source.validation), or take trainer.validation out",
        )
    return found


def judged_conversations(
    spec: Tune, samples: Mapping[str, Sequence[Sample]], template: Template
) -> dict[str, list[Conversation]]:
    """Questions of ``validation``, and as many of ``train`` where the gap is wanted; nothing where nothing is judged.

    Args:
        spec: Of the stage.
        samples: By split; of ``validation`` those that :func:`judged_questions` has chosen.
        template: Renders them.
    """
    if spec.trainer.validation is None:
        return {}
    chosen = {VALIDATION: samples[VALIDATION]}
    if spec.trainer.validation.gap:
        chosen["train"] = judged_questions(spec, samples["train"], limit=len(samples[VALIDATION]))
    return {
        split: [
            Conversation(id=sample.id, task=str(sample.meta["task"]), rendered=template.sample(sample))
            for sample in listed
        ]
        for split, listed in chosen.items()
    }


def judge_questions(
    spec: Tune,
    built: Multimodal,
    conversations: Mapping[str, Sequence[Conversation]],
    *,
    features: Callable[[Sequence[MediaRef]], Patches],
    compute: Compute,
) -> Validation:
    """What a phase is judged by: nats a trained token. Of a decoder with experts their balance is left out.

    Args:
        spec: Of the stage.
        built: The composition as it trains in this phase.
        conversations: From :func:`judged_conversations`.
        features: Of pictures as they are, and of sounds.
        compute: Device and number format.
    """

    def of(split: str) -> Judged:
        batches = HeldBatches(
            conversations=conversations[split],
            features=features,
            grid_out=built.accounts,
            batch_size=spec.trainer.micro_batch or spec.batch_size,
            pad=built.stop,
            packed=spec.packing,
        )
        return Judged(objective=NextToken(), batches=batches.__iter__)

    return Validation(
        model=built.model,
        held=of(VALIDATION),
        trained=of("train") if "train" in conversations else None,
        weights={},
        compute=compute,
    )
