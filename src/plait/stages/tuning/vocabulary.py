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
from plait.data.word_batches import WordList
from plait.models.connectors.words import shape_of

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
    names = sorted({s.text("assistant") for s in samples if s.meta["task"] == "name.en"})
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
