"""Reading lists of pictures and texts: CSV, JSON Lines, or a folder with one caption file a picture.

Nothing is opened here but the lists and captions; a row that cannot be used is handed on with its fault, and so is
every picture or caption of a folder that is not part of a row.
"""

from __future__ import annotations

import csv
import io
import json
import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from plait.core.errors import DataError
from plait.data.media import FORMATS, MediaError, read_media, sniff

_LISTS = ("captions.jsonl", "metadata.jsonl", "metadata.csv", "pairs.csv")
_ENDINGS = (*(f".{ending}" for ending in FORMATS.values()), ".jpeg")
_OTHER_ENDINGS = (
    *(".tif", ".tiff", ".heic", ".heif", ".avif", ".jxl", ".jp2", ".jfif", ".svg", ".ico", ".psd", ".tga"),
    *(".ppm", ".pgm", ".pnm", ".dng", ".cr2", ".nef", ".arw", ".raw"),
)
"""Pictures that are not read; counted even without a caption."""
_CAPTION = ".txt"
_IMAGE = ("image", "file_name")
_TEXT = ("text", "caption")
_SEPARATORS = {";": "';'", "\t": "a tab", "|": "'|'"}
_KINDS = {
    b"\xff\xfe": "UTF-16 text",
    b"\xfe\xff": "UTF-16 text",
    b"PK\x03\x04": "a ZIP archive or an Excel workbook",
    b"\x1f\x8b": "a gzip file",
    b"PAR1": "a Parquet file",
}
"""First bytes of what people hand over in place of a list."""


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
        DataError: The path is not there or is none of these; a folder has several lists or a part that cannot be read;
            the header lacks a column; the file is not UTF-8. Names ``file:line``.
    """
    if path.is_dir():
        lists = [name for name in _LISTS if (path / name).is_file()]
        if len(lists) > 1:
            raise DataError(
                f"the folder has {len(lists)} lists: {', '.join(lists)}",
                place=str(path),
                remedy=f"remove {' and '.join(lists[1:])} to use {lists[0]}, or give the file itself as the source",
            )
        yield from _read_listed(path, path / lists[0]) if lists else _read_folder(path)
    elif not path.is_file():
        raise DataError(
            "no such file or folder", place=str(path), remedy="give a CSV file (image,text) or a folder of pictures"
        )
    elif path.suffix == ".jsonl":
        yield from _read_jsonl(path)
    else:
        yield from _read_csv(path)


def _read_csv(path: Path) -> Iterator[Line]:
    content = _utf8(path)
    _check_separator(content, path)
    reader = csv.reader(io.StringIO(content, newline=""), strict=True)
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


def _check_separator(content: str, path: Path) -> None:
    lines = enumerate(content.splitlines(), 1)
    number, header = next(((number, line) for number, line in lines if line.strip()), (1, ""))
    found = next((name for separator, name in _SEPARATORS.items() if separator in header), "")
    if found and "," not in header:
        raise DataError(
            f"the separator looks like {found}, expected ','; the header is: {header[:120]}",
            place=f"{path}:{number}",
            remedy="save the file with commas between the columns; begin it with `image,text`",
        )


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


def _read_listed(folder: Path, table: Path) -> Iterator[Line]:
    """The rows of a folder's list, then the files that it does not name."""
    named: set[str] = set()
    for line in read_lines(table):
        named.add(os.path.abspath(folder / line.image))
        yield line
    for path in _walk(folder):
        if path.suffix.lower() in (*_ENDINGS, *_OTHER_ENDINGS, _CAPTION) and os.path.abspath(path) not in named:
            yield Line(row=path.relative_to(folder).as_posix(), fault="not-listed", detail=f"not in {table.name}")


def _read_folder(folder: Path) -> Iterator[Line]:
    """One row for each picture, for each other file with a caption, and for each caption that belongs to nothing."""
    paths = _walk(folder)
    there = set(paths)
    wanted = {path.with_suffix(_CAPTION) for path in paths if path.suffix.lower() != _CAPTION}
    for path in paths:
        row = path.relative_to(folder).as_posix()
        ending = path.suffix.lower()
        caption = path.with_suffix(_CAPTION)
        if path.is_symlink() and path.is_dir():
            yield Line(row=f"{row}/", fault="linked-folder", detail=f"leads to {path.readlink()}")
        elif ending == _CAPTION:
            if path not in wanted:
                yield Line(row=row, fault="no-picture", detail=f"no {path.stem}.png or the like")
        elif ending in _ENDINGS:
            yield (
                _captioned(row, caption, folder)
                if caption in there
                else Line(row=row, fault="no-caption", detail=f"no {caption.name}")
            )
        elif ending in _OTHER_ENDINGS or caption in there:
            yield Line(row=row, fault="format", detail=f"{ending or 'no ending'}; read are {', '.join(_ENDINGS)}")


def _captioned(row: str, caption: Path, folder: Path) -> Line:
    try:
        # The caption is read inside the folder only: a link may not lead to a file elsewhere.
        text = read_media(caption, allowed_root=folder).decode("utf-8-sig").strip()
    except (DataError, ValueError) as error:
        return Line(row=row, fault="no-text", detail=f"{caption.name}: {error}")
    return Line(row=row, image=row, text=text)


def _walk(folder: Path) -> list[Path]:
    """Every file below a folder and every link to a folder, which is not entered; sorted."""

    def stop(error: OSError) -> None:
        raise DataError(
            f"a folder cannot be read: {error.strerror}",
            place=str(error.filename),
            remedy=f"make it readable, or move it out of {folder}",
        ) from error

    found: list[Path] = []
    for base, folders, files in os.walk(folder, onerror=stop):
        links = (name for name in folders if os.path.islink(os.path.join(base, name)))
        found += [Path(base, name) for name in (*files, *links)]
    return sorted(found)


def _utf8(path: Path) -> str:
    try:
        data = path.read_bytes()
    except OSError as error:
        raise DataError(
            f"the file cannot be read: {error.strerror}", place=str(path), remedy="make it readable"
        ) from error
    if kind := _kind(data):
        raise DataError(
            f"the file is {kind}, expected a list as UTF-8 text",
            place=str(path),
            remedy="give a CSV file (image,text) saved as UTF-8, or the folder of the pictures",
        )
    try:
        return data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = data[: error.start].count(b"\n") + 1
        raise DataError(
            f"not UTF-8: byte 0x{data[error.start]:02x}",
            place=f"{path}:{line}",
            remedy="save the file as UTF-8",
        ) from error


def _kind(data: bytes) -> str:
    """What a file is that is no list; empty if it may be one."""
    if found := next((name for start, name in _KINDS.items() if data.startswith(start)), ""):
        return found
    if b"\0" not in data:  # a text may begin with the letters of a picture, such as BM
        return ""
    try:
        return f"a {sniff(data, place='')} picture"
    except MediaError:
        return "no text (it has zero bytes)"
