"""What the data stage will need, said before it runs: counts from the file names, the rest from measured rates."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from plait.core.errors import DataError, ResourceError
from plait.core.estimate import Estimate
from plait.data.media import resolve_inside
from plait.data.shards import MAX_SHARD_BYTES
from plait.data.sources import VALIDATION
from plait.data.sources.emoji import EmojiChoice, preview_emoji
from plait.data.sources.pair_files import read_lines
from plait.data.sources.pairs import PairsChoice

CONCEPTS = 1_427
"""Concepts of the pinned packages without flags; a test compares it with the packages."""

# Measured on one core of a quiet 2-core machine with the default settings; there, sizes are exact to a few percent.
_SECONDS_START = 1.0
_SECONDS_PER_PICTURE = 0.0018
_SECONDS_PER_CANVAS = 0.005
_SECONDS_PER_QUESTION = 0.0003
_SECONDS_PER_MB = 0.06
_BYTES_PER_PICTURE = 3_750  # its picture, its record, padding to blocks of 512, its line in the index
_BYTES_PER_QUESTION = 1_680
_BYTES_PER_CANVAS = 5_400
_SOUNDS_PER_QUESTION = 0.43  # of emoji, with two takes a text; Chinese questions stay written
_SECONDS_PER_SOUND = 0.016
_BYTES_PER_SOUND = 94_000
_BYTES_PER_ROW = 165  # in the ledger
_MEMORY_PER_SAMPLE = 1_600
_MEMORY_RUNTIME = 60 * 2**20  # the interpreter with Pillow and NumPy, without torch
_SPREAD = (0.6, 3.0)  # shortest and longest against the measured time: neighbors on the machine


@dataclass(frozen=True, slots=True, kw_only=True)
class Expected:
    """What a source will give.

    Attributes:
        splits: Pictures per split.
        rows: Source rows.
        media_bytes: Encoded size of the pictures beyond that of an emoji.
        notes: What this rests on.
    """

    splits: Mapping[str, int]
    rows: int
    media_bytes: int
    notes: tuple[str, ...]

    def estimate(
        self,
        *,
        asked: int,
        more_in_training: int,
        canvases: tuple[int, int],
        tile: int,
        runtime_bytes: int,
        spoken: float = 0.0,
    ) -> Estimate:
        """The stage's estimate.

        Args:
            asked: Questions a picture.
            more_in_training: More of them for pictures of the training split.
            canvases: For training, and for each test split.
            tile: Pixels of a picture on a canvas.
            runtime_bytes: RAM of the interpreter with its libraries; 0 if not known.
            spoken: Share of the questions that is spoken.
        """
        drawn = {split: canvases[split != "train"] for split in self.splits}
        each = {split: asked + (more_in_training if split == "train" else 0) for split in self.splits}
        questions = {split: each[split] * n + round(1.8 * drawn[split]) for split, n in self.splits.items()}
        pictures = sum(self.splits.values())
        seconds = (
            _SECONDS_START
            + pictures * _SECONDS_PER_PICTURE
            + sum(drawn.values()) * _SECONDS_PER_CANVAS * max(1.0, tile / 72) ** 2
        )
        seconds += sum(questions.values()) * _SECONDS_PER_QUESTION + self.media_bytes / 1e6 * _SECONDS_PER_MB
        disk = pictures * _BYTES_PER_PICTURE + sum(questions.values()) * _BYTES_PER_QUESTION + self.media_bytes
        disk += sum(drawn.values()) * _BYTES_PER_CANVAS + self.rows * _BYTES_PER_ROW
        sounds = {split: round(spoken * _SOUNDS_PER_QUESTION * n) for split, n in questions.items()}
        seconds += sum(sounds.values()) * _SECONDS_PER_SOUND
        disk += sum(sounds.values()) * _BYTES_PER_SOUND
        largest = self.media_bytes + max(questions.values(), default=0) * _BYTES_PER_QUESTION
        largest += max(sounds.values(), default=0) * _BYTES_PER_SOUND
        samples = dict(self.splits) | {f"instruct-{split}": n for split, n in questions.items()}
        return Estimate(
            stage="data",
            samples=samples,
            memory={
                "runtime": runtime_bytes or _MEMORY_RUNTIME,
                "samples": sum(samples.values()) * _MEMORY_PER_SAMPLE,
                "shard": 2 * min(largest, MAX_SHARD_BYTES),
            },
            disk_bytes=disk,
            seconds=(seconds * _SPREAD[0], seconds * _SPREAD[1]),
            notes=self.notes,
        )


def expect_emoji(choice: EmojiChoice) -> Expected:
    """Counts from the file names, or those of the pinned packages if they are not fetched yet.

    Raises:
        DataError: More concepts are to be held out than half of those there are.
    """
    rows = 8_504
    try:
        return Expected(splits=preview_emoji(choice), rows=rows, media_bytes=0, notes=("counted from the file names",))
    except ResourceError as error:
        train = CONCEPTS - choice.held_out - choice.validation
        limit = choice.max_test or CONCEPTS
        splits = {
            "test-both": min(limit, choice.held_out),
            "test-concept": min(limit, choice.held_out),
            "test-style": min(limit, train),
            "train": min(choice.max_train or train, train),
            **({VALIDATION: choice.validation} if choice.validation else {}),
        }
        note = (
            f"{error.cause}: counts are those of the pinned packages with one picture a concept; {error.remedy} first"
        )
        return Expected(splits=splits, rows=rows, media_bytes=0, notes=(note,))


def expect_pairs(choice: PairsChoice) -> Expected:
    """Counts from the rows and the sizes of their files; no picture is opened.

    Raises:
        DataError: The file or folder cannot be read, or names fewer pictures that are there than are needed.
    """
    rows = usable = size = 0
    first = ""
    folder = choice.path if choice.path.is_dir() else choice.path.parent
    for line in read_lines(choice.path):
        rows += 1
        if line.fault or not line.text:
            first = first or f"{line.image}: {line.fault or 'no text'}"
            continue
        try:
            path = resolve_inside(folder / line.image, choice.root)
            size += path.stat().st_size
        except (DataError, OSError) as fault:
            first = first or f"{line.image}: {fault.cause if isinstance(fault, DataError) else fault.strerror}"
            continue
        usable += 1
    if not rows:
        raise DataError("there are no rows", place=str(choice.path), remedy="write a line for each picture")
    if usable < max(choice.min_rows, 1):
        raise DataError(
            f"{usable:,} of {rows:,} rows name a picture that is there, at least {max(choice.min_rows, 1):,} are needed"
            + (f"; the first that does not: {first}" if first else ""),
            place=str(choice.path),
            remedy="mend the paths, which are relative to the file's folder, or set data.source.min_rows lower",
        )
    test = max(1, round(choice.test_fraction * usable)) if choice.test_fraction and usable else 0
    validation = max(1, round(choice.validation * usable)) if choice.validation and usable else 0
    train = usable - test - validation
    splits = {
        "train": min(choice.max_train or train, train),
        **({VALIDATION: validation} if validation else {}),
        **({"test-concept": min(choice.max_test or test, test)} if test else {}),
    }
    note = f"{usable:,} of {rows:,} rows name a picture that is there; damaged ones and doubles are found on opening"
    return Expected(splits=splits, rows=rows, media_bytes=size, notes=(note,))
