"""The vocabulary of a text tower that learns from scratch: from the texts of training, and of nothing else."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from plait.assembly.pairs import Texts
from plait.assembly.text_scratch import RawTokens, fitted
from plait.assembly.towers import TextEncoder, raw_texts
from plait.core import mesh
from plait.data.byte_pairs import BytePairs
from plait.data.shards import ShardReader
from plait.models.text_specs import ScratchTextTower

if TYPE_CHECKING:
    from plait.stages.pretrain import Pretrain


def learned_words(spec: Pretrain, tower: ScratchTextTower, data: Path) -> TextEncoder:
    """What stands before the tower; the same in all processes, of which the first one learns the vocabulary.

    Args:
        spec: Of the stage.
        tower: Of its text tower.
        data: Folder of the data stage.

    Raises:
        ConfigError: The vocabulary does not hold all bytes.
        DataError: There is no training split, or a shard is damaged.
    """

    def learn() -> str:
        with ShardReader(data / "shards", "train") as reader:
            texts = Texts.of(list(reader), keywords=spec.keywords).texts
        return BytePairs.learn(texts, size=tower.vocabulary).written()

    words = BytePairs.read(mesh.first(learn), place=str(data))
    return raw_texts(RawTokens(words, fitted(tower, words), max_tokens=spec.max_tokens))
