"""Pictures out of shards, as data: URIs. Bytes go into the page as they are; nothing here decodes them."""

from __future__ import annotations

import base64
import json
import re
import tarfile
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from plait.core.yamltext import is_mapping
from plait.report.folder import RunFolder, records
from plait.report.markup import Html, el

SIZE_LIMIT = 128 * 1024
"""Largest picture put into a page, in bytes; a larger one is named with its size instead."""

_SHARD = re.compile(r"[\w.-]+-\d{3,}\.tar")
_FIRST = re.compile(r"(?!instruct-)([\w.-]+)-000\.tar")
_MAGIC = (
    (b"\x89PNG\r\n\x1a\n", "image/png"),
    (b"\xff\xd8\xff", "image/jpeg"),
    (b"GIF8", "image/gif"),
)


@dataclass(frozen=True, slots=True)
class Picture:
    """One picture and what is known of it.

    Attributes:
        data: The bytes; None if it is missing or too large.
        why: Why there are none.
        names: What it is called, by the name of the question: ``name.en``, ``name.zh``.
        meta: ``source``, ``licence`` and so on.
    """

    data: bytes | None
    why: str = ""
    names: dict[str, str] = field(default_factory=dict[str, str])
    meta: dict[str, Any] = field(default_factory=dict[str, Any])

    def show(self, alt: str) -> Html:
        """The picture, or words in its place."""
        data = self.data or b""
        mime = next((mime for magic, mime in _MAGIC if data.startswith(magic)), None)
        mime = "image/webp" if data[:4] == b"RIFF" and data[8:12] == b"WEBP" else mime
        if self.data is None or mime is None:
            return el("span", self.why or "not a picture a browser shows", cls="nopicture")
        uri = f"data:{mime};base64,{base64.b64encode(data).decode()}"
        return el("img", attrs={"src": uri, "alt": alt, "loading": "lazy"})


def splits(shards: Path, known: Iterable[str] = ()) -> list[str]:
    """Names of the splits that hold pictures: the known ones in their order, then others, ``train`` first."""
    names = [match[1] for path in shards.iterdir() if (match := _FIRST.fullmatch(path.name))]
    order = [name for name in known if name in names]
    return order + sorted(set(names) - set(order), key=lambda name: (name != "train", name))


def first(run: RunFolder, shards: Path, split: str, *, count: int) -> list[Picture]:
    """The first pictures of a split: keys are digests, so they are as good as drawn by lot."""
    path = shards / f"{split}-000.tar"
    found: list[Picture] = []
    try:
        with tarfile.open(path, "r:") as tar:
            for member in tar:
                if len(found) == count:
                    break
                if member.name.endswith(".json"):
                    found += _pictures(tar, member, path.name)[:1]
    except (tarfile.TarError, OSError, ValueError) as error:
        run.fault(f"{run.relative(path)}: pictures cannot be read: {error}")
    return found


def at(run: RunFolder, shards: Path | None, uris: Iterable[str]) -> dict[str, Picture]:
    """The pictures that ``shard.tar#member`` references name; each shard is opened once."""
    wanted: dict[str, list[str]] = {}
    for uri in dict.fromkeys(uris):
        wanted.setdefault(uri.partition("#")[0], []).append(uri)
    found: dict[str, Picture] = {}
    for shard, its in wanted.items():
        # A record may come from anywhere: a name that is no shard's never becomes a path.
        if shards is None or not _SHARD.fullmatch(shard) or not (shards / shard).is_file():
            found |= {uri: Picture(None, f"shard {shard or 'unnamed'} not found") for uri in its}
            continue
        try:
            with tarfile.open(shards / shard, "r:") as tar:
                for uri in its:
                    member = uri.partition("#")[2]
                    found[uri] = _read(tar, member, _record(tar, f"{member.partition('.')[0]}.json"))
        except (tarfile.TarError, OSError, ValueError) as error:
            run.fault(f"{run.relative(shards / shard)}: pictures cannot be read: {error}")
    return found


def attribution(pictures: Iterable[Picture], card: str) -> Html:
    """Whose the pictures are: source, licence, and the words of the data card on that source."""
    sources = dict.fromkeys(
        (str(p.meta.get("source", "unknown source")), str(p.meta.get("licence", "licence unknown")))
        for p in pictures
        if p.data
    )
    said: list[str] = []
    for source, licence in sources:
        words = re.search(rf"^- \*\*{re.escape(source)}\*\*[^\n]*\n((?:  \S[^\n]*\n?)+)", card, re.MULTILINE)
        more = f": {' '.join(words[1].split())}" if words else ""
        said.append(f"{source} ({licence}){more}")
    return el("p", f"Pictures: {' · '.join(said)}", cls="credit") if said else Html("")


def _pictures(tar: tarfile.TarFile, member: tarfile.TarInfo, shard: str) -> list[Picture]:
    record = _record(tar, member.name)
    parts = [part for turn in records(record.get("turns")) for part in records(turn.get("parts"))]
    uris = [part["uri"] for part in parts if part.get("modality") == "image" and isinstance(part.get("uri"), str)]
    return [_read(tar, uri.partition("#")[2], record) for uri in uris if uri.partition("#")[0] == shard]


def _record(tar: tarfile.TarFile, name: str) -> dict[str, Any]:
    try:
        file = tar.extractfile(name)
    except KeyError:
        return {}
    value = json.loads(file.read()) if file else {}
    return value if is_mapping(value) else {}


def _read(tar: tarfile.TarFile, name: str, record: dict[str, Any]) -> Picture:
    meta = record.get("meta")
    names = {str(answer.get("name", "")): str(answer.get("text", "")) for answer in records(record.get("answers"))}
    known = Picture(None, f"{name} not found", names, meta if is_mapping(meta) else {})
    try:
        member = tar.getmember(name)
        file = tar.extractfile(member)
    except KeyError:
        return known
    if file is None:
        return known
    if member.size > SIZE_LIMIT:
        return Picture(None, f"{member.size / 1024:,.0f} KiB: too large to show here", known.names, known.meta)
    return Picture(file.read(), "", known.names, known.meta)
