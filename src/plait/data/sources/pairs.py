"""Your own pictures with texts: a CSV file with the columns ``image`` and ``text``, or a folder with captions.

A folder may hold ``captions.jsonl``, ``metadata.jsonl`` or ``metadata.csv`` (``image`` or ``file_name``, and ``text``
or ``caption``), but only one of them; without one, each picture's text is in the file of the same name that ends in
``.txt``. Rows that cannot be used are counted in the ledger with their reason and the rest goes on. Rows that share a
picture (byte for byte or pixel for pixel) or a text (whatever its case and spacing) are kept in one split, so that
nothing tested was trained on.
"""

from __future__ import annotations

import hashlib
from collections import defaultdict
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path

from plait.core.errors import DataError
from plait.core.types import Answer, MediaRef, Sample, Turn
from plait.data.ledger import Ledger
from plait.data.media import Limits, MediaError, open_image, read_media, resolve_inside
from plait.data.sources import VALIDATION, Gathered, Origin, Picture, rank, sample_id
from plait.data.sources.pair_files import Line, read_lines

SOURCE = "pairs"
_MAX_TEXT = 2_000
_BIGGEST_SHARE = 2.0  # a group may make the test split at most this much larger than asked for


@dataclass(frozen=True, slots=True, kw_only=True)
class PairsChoice:
    """What is taken; see :class:`plait.stages.data.PairsSource`, whose fields these are.

    Attributes:
        path: CSV file or folder.
        root: Pictures outside are refused.
        licence: Of the pictures.
        test_fraction: Share of the rows to hold out for the test.
        validation: Share of the rows to hold out for validation.
        min_rows: Fewer usable rows than this are an error.
        limits: Of one picture.
        max_train: At most this many in training.
        max_test: At most this many in the test.
        seed: Of the split.
    """

    path: Path
    root: Path
    licence: str
    test_fraction: float
    validation: float = 0.0
    min_rows: int
    limits: Limits
    max_train: int | None
    max_test: int | None
    seed: int


@dataclass(frozen=True, slots=True, kw_only=True)
class _Pair:
    row: str
    text: str
    path: Path
    columns: Mapping[str, str]
    sha256: str
    pixels: str
    size: tuple[int, int]
    changes: tuple[str, ...]
    group: str = ""


def gather_pairs(choice: PairsChoice, ledger: Ledger, listener: Callable[[int, int], None]) -> Gathered:
    """Read, check and split the rows; each gets a fate in the ledger.

    Args:
        choice: The settings.
        ledger: Gets one row for each row of the list and each picture and caption of the folder. After an error, the
            rows that could have been used have no fate in it yet.
        listener: Told the rows done and in all.

    Raises:
        DataError: Nothing there, a header without the two columns, no usable row, too few of them, or nothing that can
            be held out.
    """
    lines = list(read_lines(choice.path))
    if not lines:
        raise DataError(
            "there are no rows", place=str(choice.path), remedy="put at least one picture and its text there"
        )
    ledger.enter(SOURCE, (line.row for line in lines))
    pairs: list[_Pair] = []
    seen: dict[tuple[str, str], str] = {}
    for done, line in enumerate(lines, 1):
        if (pair := _check(line, choice, ledger)) is not None:
            first = seen.setdefault((pair.pixels, _folded(pair.text)), pair.row)
            if first == pair.row:
                pairs.append(pair)
            else:
                ledger.drop(pair.row, "duplicate", step="merge", detail=f"of {first}")
        if done % 50 == 0 or done == len(lines):
            listener(done, len(lines))
    _check_number(pairs, len(lines), choice, ledger=ledger)
    splits = _split(pairs, choice, ledger)
    pictures = [_picture(pair, split, choice.licence) for split, members in splits.items() for pair in members]
    for picture, pair in zip(pictures, (p for members in splits.values() for p in members), strict=True):
        ledger.keep(pair.row, split=picture.sample.meta["split"], sample=picture.sample.id, changes=pair.changes)
    origin = Origin(
        name=SOURCE,
        package=str(choice.path),
        licence=choice.licence,
        attribution="Your own data; credit it as its licence asks.",
        gives="pictures and texts",
    )
    held = {pair.group for pair in splits.get("test-concept", ())}
    facts = {"rows": len(lines), "groups": len({pair.group for pair in pairs}), "held_out_groups": len(held)}
    if validation := {pair.group for pair in splits.get(VALIDATION, ())}:
        facts["validation_groups"] = len(validation)
    return Gathered(
        pictures=tuple(sorted(pictures, key=lambda p: p.sample.id)),
        origins=(origin,),
        together=_TOGETHER,
        facts=facts,
        limits=_LIMITS,
    )


# --- checking ------------------------------------------------------------------------------------------------------


def _check(line: Line, choice: PairsChoice, ledger: Ledger) -> _Pair | None:
    """The row with its picture looked at, or None if it was dropped."""

    def drop(reason: str, detail: str = "") -> None:
        ledger.drop(line.row, reason, step="read", detail=detail)

    if line.fault:
        return drop(line.fault, line.detail)
    if not line.text:
        return drop("no-text")
    if len(line.text) > _MAX_TEXT:
        return drop("too-large", f"the text has {len(line.text):,} characters, allowed are {_MAX_TEXT:,}")
    if "://" in line.image or line.image.startswith("data:"):
        return drop("remote", line.image[:80])
    folder = choice.path if choice.path.is_dir() else choice.path.parent
    try:
        path = resolve_inside(folder.absolute() / line.image, choice.root)
        data = read_media(path, allowed_root=choice.root, limits=choice.limits)
        decoded = open_image(data, place=line.row, limits=choice.limits)
    except MediaError as error:
        return drop(error.reason, error.cause)
    size = decoded.image.size
    return _Pair(
        row=line.row,
        text=line.text,
        path=path,
        columns=line.columns,
        sha256=hashlib.sha256(data).hexdigest(),
        pixels=hashlib.sha256(repr(size).encode() + decoded.image.tobytes()).hexdigest(),
        size=size,
        changes=decoded.changes,
    )


def _check_number(pairs: list[_Pair], rows: int, choice: PairsChoice, *, ledger: Ledger) -> None:
    if len(pairs) >= max(choice.min_rows, 1):
        return
    first = next(
        (f"; the first of the others is {row.id}: {row.reason}, {row.detail or row.step}" for row in ledger.dropped()),
        "",
    )
    raise DataError(
        f"{len(pairs)} of {rows} rows can be used, at least {max(choice.min_rows, 1)} are needed{first}",
        place=str(choice.path),
        remedy="mend the rows listed in ledger.jsonl or add some, or lower data.source.min_rows",
    )


# --- splits --------------------------------------------------------------------------------------------------------


def _folded(text: str) -> str:
    return " ".join(text.casefold().split())


def _split(pairs: list[_Pair], choice: PairsChoice, ledger: Ledger) -> dict[str, list[_Pair]]:
    groups = group_rows([(pair.pixels, pair.sha256, _folded(pair.text)) for pair in pairs])
    members: dict[str, list[_Pair]] = defaultdict(list)
    for pair, group in zip(pairs, groups, strict=True):
        members[group].append(replace(pair, group=group))
    ordered = sorted(members, key=lambda g: rank(choice.seed, g))
    tested = _first_groups(ordered, members, share=choice.test_fraction, of=len(pairs))
    rest = [group for group in ordered if group not in tested]
    validated = _first_groups(rest[::-1], members, share=choice.validation, of=len(pairs))
    found = {
        "train": [pair for group in rest if group not in validated for pair in members[group]],
        VALIDATION: [pair for group in rest if group in validated for pair in members[group]],
        "test-concept": [pair for group in ordered if group in tested for pair in members[group]],
    }
    for split, setting in ((VALIDATION, "validation"), ("test-concept", "test_fraction")):
        if getattr(choice, setting) and not (found[split] and found["train"]):
            raise DataError(
                f"nothing can be held out as {split}: {len(pairs):,} rows make {len(members):,} groups with a common "
                "picture or text",
                place=str(choice.path),
                remedy=f"give more different texts, or set data.source.{setting}=0 to go without",
            )
    splits: dict[str, list[_Pair]] = {}
    for split, limit, reason in (
        ("train", choice.max_train, "over-max-train"),
        (VALIDATION, None, ""),
        ("test-concept", choice.max_test, "over-max-test"),
    ):
        by_row = sorted(found[split], key=lambda p: rank(choice.seed, p.row))
        for pair in by_row[limit:] if limit is not None else ():
            ledger.drop(pair.row, reason, step="subsample", split=split)
        splits[split] = by_row[:limit]
    return splits


def _first_groups(ordered: list[str], members: Mapping[str, list[_Pair]], *, share: float, of: int) -> set[str]:
    """The first groups that make up a share of the rows; one that would make it much larger is passed over."""
    wanted = max(1, round(share * of)) if share else 0
    taken, rows = set[str](), 0
    for group in ordered:
        if rows < wanted and rows + len(members[group]) <= max(_BIGGEST_SHARE * wanted, 1):
            taken.add(group)
            rows += len(members[group])
    return taken


def group_rows(keys: list[tuple[str, ...]]) -> list[str]:
    """Name of each row's group: rows that share any key, directly or through others, share a group."""
    parent = list(range(len(keys)))

    def find(index: int) -> int:
        while parent[index] != index:
            parent[index] = parent[parent[index]]
            index = parent[index]
        return index

    first: dict[tuple[int, str], int] = {}
    for index, row in enumerate(keys):
        for kind, key in enumerate(row):
            parent[find(index)] = find(first.setdefault((kind, key), index))
    names: dict[int, str] = {}
    for index, row in enumerate(keys):
        root = find(index)
        names[root] = min(names.get(root, "~"), hashlib.sha256(repr(row).encode()).hexdigest()[:16])
    return [names[find(index)] for index in range(len(keys))]


def _picture(pair: _Pair, split: str, licence: str) -> Picture:
    width, height = pair.size
    ref = MediaRef(modality="image", sha256=pair.sha256, uri="", width=width, height=height)
    sample = Sample(
        id=sample_id(SOURCE, pair.sha256, pair.text),
        turns=(Turn(role="user", parts=(ref,)),),
        answers=(Answer(kind="label", name="name.en", text=pair.text),),
        meta={
            "source": SOURCE,
            "licence": licence,
            "concept": pair.group,
            "split": split,
            "style": SOURCE,
            "row": pair.row,
            "columns": dict(pair.columns),
        },
    )
    return Picture(row=pair.row, sample=sample, data=pair.path)


_TOGETHER = "rows that share a picture (its bytes or its pixels) or a text, directly or through other rows"
_LIMITS = (
    "Texts are taken as they are and called `name.en` whatever their language.",
    "Wrong texts in yes/no questions are those of other pictures; nobody checked that they are wrong.",
)
