"""Names that a connector to words learns from: their tokens, and where these lie among the decoder's embeddings."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from plait.assembly.smollm import LanguageModel
from plait.core.errors import DataError
from plait.core.types import Sample
from plait.data.order import check_enough
from plait.data.sources import rank
from plait.data.word_batches import WordList
from plait.models.connectors.words import shape_of
from plait.models.specs import Words
from plait.stages.tune import Tune

_NAME = "name.en"
_FILLER = "\n"  # stands in the places after a name's end: no name has it, and decoders know it


@dataclass(frozen=True, slots=True, kw_only=True)
class Vocabulary:
    """Names of the training pictures.

    Attributes:
        names: Sorted.
        ids: Tokens of each.
        words: The tokens that occur in them.
        vectors: Mean embedding of each name.
        embeddings: Of the words, ``word d``, and how all of the decoder's embeddings spread, ``d d``.
    """

    names: Sequence[str]
    ids: Sequence[Sequence[int]]
    words: WordList
    vectors: Tensor
    embeddings: tuple[Tensor, Tensor]


def read_vocabulary(samples: Sequence[Sample], language: LanguageModel, *, place: Path) -> Vocabulary:
    """Names that the questions of a split ask for.

    Args:
        samples: Questions.
        language: Whose tokens and embeddings.
        place: Of the data, for errors.

    Raises:
        DataError: No question asks for a name.
    """
    names = sorted({s.text("assistant") for s in samples if s.meta["task"] == _NAME})
    if not names:
        raise DataError(
            "no question of the training split asks for a name", place=str(place), remedy="keep the task name.en"
        )
    tokenizer = language.tokenizer
    ids = [list(tokenizer(name, add_special_tokens=False).input_ids) for name in names]
    words = WordList.of(ids, filler=tokenizer(_FILLER, add_special_tokens=False).input_ids[-1])
    table = language.model.get_input_embeddings().get_parameter("weight").detach().float()
    return Vocabulary(
        names=names,
        ids=ids,
        words=words,
        vectors=torch.stack([table[torch.tensor(found)].mean(0) for found in ids]),
        embeddings=(table[torch.tensor(words.token_ids)], shape_of(table)),
    )


def learned_pictures(spec: Tune, samples: Sequence[Sample]) -> frozenset[str]:
    """Sha256 of the pictures that the first phase learns by heart; of all of them where there is none.

    Args:
        spec: Of the stage.
        samples: Questions of training.
    """
    if not isinstance(spec.connector, Words):
        return frozenset(ref.sha256 for sample in samples for ref in sample.media())
    named = {sample.media()[0].sha256 for sample in samples if sample.meta["task"] == _NAME}
    order = sorted(named, key=lambda sha256: rank(spec.seed, "words", sha256))
    return frozenset(order[: max(1, round(len(order) * spec.words.share))])


def named_pictures(spec: Tune, samples: Sequence[Sample], *, processes: int) -> list[Sample]:
    """Questions for the names of the pictures that the first phase learns.

    Args:
        spec: Of the stage; its connector speaks in words.
        samples: Questions of training.
        processes: That deal the pictures out among themselves.

    Raises:
        ConfigError: There are some, but a process would get none.
    """
    learned, asked = learned_pictures(spec, samples), [sample for sample in samples if sample.meta["task"] == _NAME]
    found = [sample for sample in asked if sample.media()[0].sha256 in learned]
    more = "give more pictures names"
    if len(asked) >= processes:
        more += f", or raise words.share above {spec.words.share:g}: {len(asked)} pictures have names"
    what, place = "named pictures in the first phase", f"stages.{spec.kind}.words"
    check_enough(len(found), processes if asked else 0, what=what, place=place, remedy=more)
    return found
