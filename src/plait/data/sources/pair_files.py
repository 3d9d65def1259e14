"""Reading lists of pictures and texts: CSV, JSON Lines, or a folder with one caption file a picture.

Nothing is opened here but the lists themselves; a row that cannot be used is handed on with its fault.
"""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from plait.core.errors import DataError
from plait.data.media import FORMATS, resolve_inside

_LISTS = ("captions.jsonl", "metadata.jsonl", "metadata.csv", "pairs.csv")
_ENDINGS = (*(f".{ending}" for ending in FORMATS.values()), ".jpeg")
_IMAGE = ("image", "file_name")
_TEXT = ("text", "caption")


@dataclass(frozen=True, slots=True, kw_only=True)
class Line:
    """One row as read: ``fault`` names a reason of the ledger if it cannot be used."""

    row: str
    image: str = ""
    text: str = ""
    columns: Mapping[str, str] = field(default_factory=dict)
    fault: str = ""
    detail: str = ""


def read_lines(path: Path) -> Iterator[Line]:
    """The rows of a CSV file, a JSON Lines file or a folder.

    Raises:
        DataError: The path is not there or is none of these; the header lacks a column; the file is not UTF-8. Names
            ``file:line``.
    """
    if path.is_dir():
        table = next((path / name for name in _LISTS if (path / name).is_file()), None)
        yield from _read_folder(path) if table is None else read_lines(table)
    elif not path.is_file():
        raise DataError(
            "no such file or folder", place=str(path), remedy="give a CSV file (image,text) or a folder of pictures"
        )
    elif path.suffix == ".jsonl":
        yield from _read_jsonl(path)
    else:
        yield from _read_csv(path)


def _read_csv(path: Path) -> Iterator[Line]:
    reader = csv.reader(io.StringIO(_utf8(path), newline=""), strict=True)
    header: list[str] = []
    image = text = 0
    while True:
        try:
            cells = next(reader)
        except StopIteration:
            break
        except csv.Error as error:
            raise DataError(
                f"not a CSV file: {error}", place=f"{path}:{reader.line_num}", remedy="mend the line"
            ) from error
        if not any(cell.strip() for cell in cells):
            continue
        if not header:
            header = [cell.strip().lower() for cell in cells]
            image, text = (_column(header, names, f"{path}:{reader.line_num}") for names in (_IMAGE, _TEXT))
            continue
        row = f"{path.name}:{reader.line_num}"
        if len(cells) != len(header):
            yield Line(row=row, fault="bad-row", detail=f"{len(cells)} cells, the header has {len(header)}")
            continue
        record = dict(zip(header, cells, strict=True))
        rest = {name: cell for name, cell in record.items() if name not in (header[image], header[text])}
        yield Line(row=row, image=cells[image].strip(), text=cells[text].strip(), columns=rest)
    if not header:
        raise DataError("the file is empty", place=f"{path}:1", remedy="begin it with the header line `image,text`")


def _column(header: list[str], names: tuple[str, ...], place: str) -> int:
    found = [index for index, name in enumerate(header) if name in names]
    if len(found) != 1:
        came = ", ".join(header)[:120]
        problem = "no column" if not found else "more than one column"
        raise DataError(
            f"{problem} called {names[0]!r}; the header is: {came}",
            place=place,
            remedy="begin the file with `image,text`",
        )
    return found[0]


def _read_jsonl(path: Path) -> Iterator[Line]:
    for number, line in enumerate(_utf8(path).split("\n"), 1):
        row = f"{path.name}:{number}"
        if not line.strip():
            continue
        try:
            record: Any = json.loads(line)
        except (ValueError, RecursionError) as error:
            yield Line(row=row, fault="bad-row", detail=f"not JSON: {error}")
            continue
        values = record if isinstance(record, dict) else {}
        image, text = (
            next((values[n] for n in names if isinstance(values.get(n), str)), None) for names in (_IMAGE, _TEXT)
        )
        if image is None or text is None:
            yield Line(row=row, fault="bad-row", detail="no image and text that are strings")
            continue
        rest = {str(name): str(value) for name, value in values.items() if name not in (*_IMAGE, *_TEXT)}
        yield Line(row=row, image=image.strip(), text=text.strip(), columns=rest)


def _read_folder(folder: Path) -> Iterator[Line]:
    for path in sorted(folder.rglob("*")):
        if path.suffix.lower() not in _ENDINGS or path.is_dir():
            continue
        row = path.relative_to(folder).as_posix()
        caption = path.with_suffix(".txt")
        try:
            # The caption is read inside the folder only: a link may not lead to a file elsewhere.
            text = resolve_inside(caption, folder).read_text(encoding="utf-8-sig").strip() if caption.exists() else ""
        except (DataError, OSError, ValueError) as error:
            yield Line(row=row, fault="no-text", detail=f"{caption.name}: {error}")
        else:
            yield Line(row=row, image=row, text=text)


def _utf8(path: Path) -> str:
    data = path.read_bytes()
    try:
        return data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = data[: error.start].count(b"\n") + 1
        raise DataError(
            f"not UTF-8: byte 0x{data[error.start]:02x}",
            place=f"{path}:{line}",
            remedy="save the file as UTF-8",
        ) from error
