"""A text tower that learns from scratch: its spec, its own vocabulary, and what stands before it meanwhile."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch

from plait.assembly.local import digest
from plait.core.errors import CheckpointError, DataError
from plait.core.tensors import Patches
from plait.data.byte_pairs import BytePairs, check_size
from plait.data.pair_batches import StoredTokens
from plait.models import text_specs
from plait.models.build_media import build_text
from plait.models.towers.text_transformer import TextTransformer
from plait.models.towers.token_tower import TokenTower

TOKENIZER = "tokenizer.json"
"""File of a checkpoint that has its own vocabulary."""

_CODE = 1
"""Raise when the code that makes ids changes what comes out."""


class RawTokens:
    """What stands before a text tower that learns: texts to ids. Beside :class:`plait.models.towers.pixels.RawPixels`.

    Args:
        words: The vocabulary.
        spec: Of the tower.
        max_tokens: Longest text, its first and last id included.
    """

    def __init__(self, words: BytePairs, spec: text_specs.ScratchTextTower, *, max_tokens: int) -> None:
        self.words = words
        self.spec = spec
        self.max_tokens = max_tokens
        self.d_out: int = spec.d

    def count_tokens(self, texts: Sequence[str]) -> list[int]:
        """Ids of each text."""
        return [len(ids) for ids in self.words.ids(texts)]

    def __call__(self, texts: Sequence[str]) -> Patches:
        """Ids as media.

        Raises:
            DataError: A text is too long.
        """
        ids = self.words.ids(texts)
        for text, one in zip(texts, ids, strict=True):
            if len(one) > self.max_tokens:
                raise DataError(
                    f"a text has {len(one)} tokens, the model takes {self.max_tokens}: {text[:60]!r}",
                    remedy="shorten the text",
                )
        return StoredTokens(ids=ids, device=torch.device("cpu"))(range(len(ids)))

    @property
    def key(self) -> str:
        """Digest of the vocabulary and of how it is used."""
        return digest({"tokenizer": self.words.written(), "max_tokens": self.max_tokens, "code": _CODE})


def bare(spec: text_specs.ScratchTextTower) -> text_specs.ScratchTextTower:
    """The spec without output layers, which a tower has no use for.

    Raises:
        ConfigError: Its vocabulary does not hold all bytes.
    """
    check_size(spec.vocabulary)
    return spec.model_copy(update={name: False for name in ("head", "masked_head") if name in type(spec).model_fields})


def fitted(spec: text_specs.ScratchTextTower, words: BytePairs) -> text_specs.ScratchTextTower:
    """The bare spec with as many ids as its vocabulary has come to."""
    return bare(spec).model_copy(update={"vocabulary": words.size})


def build_text_tower(spec: text_specs.ScratchTextTower) -> TokenTower:
    """The tower, drawn from torch's generator.

    Raises:
        ConfigError: Its sizes do not fit together.
    """
    transformer = build_text(spec)
    assert isinstance(transformer, TextTransformer)
    return TokenTower(transformer)


def read_words(folder: Path) -> BytePairs:
    """The vocabulary of a checkpoint.

    Raises:
        CheckpointError: It is missing or damaged.
    """
    path = folder / TOKENIZER
    try:
        return BytePairs.read(path.read_text(encoding="utf-8"), place=str(path))
    except (OSError, UnicodeDecodeError) as error:
        raise CheckpointError(
            f"the vocabulary of the text tower cannot be read: {error}",
            place=str(path),
            remedy="use an undamaged copy of the folder",
        ) from error
