"""How the pretrain stage is judged while it trains: its loss over one batch of pairs that it does not learn from.

Each of these losses compares all pairs of a batch, so its value depends on how many there are: always the same pairs,
each with its name, as one batch, whatever the batches and the seed of training and the number of processes are.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from plait.data.caption_batches import CaptionBatches
from plait.data.pair_batches import PairBatches
from plait.data.sources import JUDGED_SEED, VALIDATION
from plait.objectives.matching import QueryTasks
from plait.stages.pretraining.outcome import check_pairs
from plait.training.validate import Judged, Validation

if TYPE_CHECKING:
    from torch import nn

    from plait.assembly.pairs import Pairs, Texts
    from plait.assembly.queries import QueryModel, TextTokens
    from plait.core.device import Compute
    from plait.data.features import FeatureStore
    from plait.data.view_batches import ViewBatches
    from plait.objectives.build import OfPairs, OfViews
    from plait.stages.pretrain import Pretrain


def judge_pairs(
    spec: Pretrain, model: nn.Module, objective: OfPairs, *, splits: Mapping[str, Pairs], compute: Compute
) -> Validation | None:
    """For a dual encoder; None where nothing is judged.

    Args:
        spec: Of the stage.
        model: That trains.
        objective: That trains it.
        splits: ``train`` and ``validation``.
        compute: Device and number format.

    Raises:
        DataError: There are fewer than two pairs to judge by.
    """
    if spec.trainer.validation is None:
        return None
    number = _number(spec, splits)
    at_once = spec.trainer.micro_batch or spec.batch_size

    def of(pairs: Pairs) -> Judged:
        batches = PairBatches(
            image=pairs.image,
            text=pairs.text,
            texts_of=[texts[:1] for texts in pairs.texts_of],
            classes=pairs.classes,
            ids=pairs.ids,
            batch_size=number,
            seed=JUDGED_SEED,
            audio=pairs.audio,
            sounds_of=[sounds[:1] for sounds in pairs.sounds_of],
            micro_batch=at_once,
        )
        return Judged(objective=objective, batches=partial(batches.step_batches, 0))

    return Validation(
        model=model,
        held=of(splits[VALIDATION]),
        trained=of(splits["train"]) if spec.trainer.validation.gap else None,
        weights={},
        compute=compute,
    )


def judge_views(
    spec: Pretrain,
    model: nn.Module,
    objective: OfViews,
    *,
    batches_of: Callable[[str, int, int], ViewBatches],
    sizes: Mapping[str, int],
    compute: Compute,
) -> Validation | None:
    """For a tower that learns from views; errors as of :func:`judge_pairs`. The same views are judged every time.

    Args:
        spec: Of the stage.
        model: That trains.
        objective: That trains it.
        batches_of: Split, size of a batch and seed to batches.
        sizes: Pictures of ``train`` and ``validation``.
        compute: Device and number format.
    """
    validation = spec.trainer.validation
    if validation is None:
        return None
    number = min(validation.samples, sizes[VALIDATION], *([sizes["train"]] if validation.gap else []))
    check_pairs(number, Path("data.source.validation"), what=VALIDATION)

    def of(split: str) -> Judged:
        return Judged(objective=objective, batches=partial(batches_of(split, number, JUDGED_SEED).step_batches, 0))

    return Validation(
        model=model,
        held=of(VALIDATION),
        trained=of("train") if validation.gap else None,
        weights={},
        compute=compute,
    )


def judge_queries(
    spec: Pretrain,
    built: QueryModel,
    splits: Mapping[str, Texts],
    *,
    store: FeatureStore,
    words: TextTokens,
    compute: Compute,
) -> Validation | None:
    """For a Q-Former; arguments and errors as of :func:`judge_pairs`.

    Args:
        spec: Of the stage.
        built: That trains.
        splits: ``train`` and ``validation``.
        store: Features of their pictures.
        words: Tokenizer of the names.
        compute: Device and number format.
    """
    if spec.trainer.validation is None:
        return None
    number = _number(spec, splits)

    def of(found: Texts) -> Judged:
        batches = CaptionBatches(
            store=store,
            sha256s=found.sha256s,
            texts=words.ids(found.texts),
            texts_of=[texts[:1] for texts in found.texts_of],
            ids=found.ids,
            batch_size=number,
            seed=JUDGED_SEED,
            pad=words.pad,
        )
        objective = QueryTasks(seed=JUDGED_SEED, classes=dict(zip(found.ids, found.classes, strict=True)))
        return Judged(objective=objective, batches=partial(batches.step_batches, 0))

    return Validation(
        model=built.model,
        held=of(splits[VALIDATION]),
        trained=of(splits["train"]) if spec.trainer.validation.gap else None,
        weights={},
        compute=compute,
    )


def _number(spec: Pretrain, splits: Mapping[str, Pairs] | Mapping[str, Texts]) -> int:
    """Pairs of the one batch: as many of both splits, lest the values differ by their number."""
    validation = spec.trainer.validation
    assert validation is not None
    sizes: Sequence[int] = [len(splits[VALIDATION].ids), *([len(splits["train"].ids)] if validation.gap else [])]
    number = min(validation.samples, *sizes)
    check_pairs(number, Path("data.source.validation"), what=VALIDATION)
    return number
