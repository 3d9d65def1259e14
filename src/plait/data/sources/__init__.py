"""Raw material of every kind to samples."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from plait.core.errors import DataError
from plait.core.types import Sample

VALIDATION = "validation"
"""Split that training is judged by while it goes on: never trained on, and no test."""

JUDGED_SEED = 0
"""Chooses what of that split judges. No setting moves it: trainings of any seed are judged by the same samples."""


def sample_id(source: str, *content: bytes | str) -> str:
    """A stable id: 24 hex digits of a hash over the source and everything that makes the sample what it is.

    Each part is preceded by its length, so that moving a byte from one part to the next gives another id.

    Example:
        >>> sample_id("twemoji", "red apple") == sample_id("twemoji", "red apple")
        True
    """
    digest = hashlib.sha256()
    for part in (source, *content):
        data = part.encode() if isinstance(part, str) else part
        digest.update(len(data).to_bytes(8, "little"))
        digest.update(data)
    return digest.hexdigest()[:24]


def rank(seed: int, *key: str) -> str:
    """Where something stands in the seeded order: adding or removing others does not move it relative to the rest."""
    return hashlib.sha256("\0".join((str(seed), *key)).encode()).hexdigest()


@dataclass(frozen=True, slots=True, kw_only=True)
class Picture:
    """A labelled picture that a source hands over, not yet in a shard.

    Attributes:
        row: Its id in the ledger.
        sample: One user turn holding the picture (``uri`` still empty); ``meta["split"]`` says where it goes.
        data: The encoded bytes, or the file they are in.
    """

    row: str
    sample: Sample
    data: bytes | Path

    def read(self) -> bytes:
        """The encoded bytes.

        Raises:
            DataError: The file is no longer the one that was looked at.
        """
        if isinstance(self.data, bytes):
            return self.data
        content = self.data.read_bytes() if self.data.is_file() else b""
        (ref,) = self.sample.media()
        if hashlib.sha256(content).hexdigest() != ref.sha256:
            raise DataError(
                "the picture changed or vanished while the stage was running",
                place=str(self.data),
                remedy="leave the files alone and run the stage again",
            )
        return content


@dataclass(frozen=True, slots=True, kw_only=True)
class Origin:
    """Where pictures or names come from, for the data card.

    Attributes:
        name: Short name, as in a sample's ``meta["source"]``.
        package: Package and version, or the path.
        licence: SPDX name.
        attribution: What a page that shows the content must say, word for word.
        gives: What is taken from it.
    """

    name: str
    package: str
    licence: str
    attribution: str
    gives: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Gathered:
    """All that a source hands over.

    Attributes:
        pictures: In the order of the shards.
        origins: Every source of pictures and words.
        together: Which pictures are one concept, so that they stay in one split.
        facts: What was found, for the card and the closing line: names and numbers.
        limits: Known limits, one sentence each.
    """

    pictures: tuple[Picture, ...]
    origins: tuple[Origin, ...]
    together: str
    facts: Mapping[str, Any]
    limits: tuple[str, ...]
