"""Shards: plain tar files that any WebDataset reader streams, each with an index for verified random access.

``train-000.tar`` holds, sample after sample, ``<key>.json`` (:meth:`plait.core.types.Sample.to_json`) and the pictures,
sounds and videos that belong to it (``<key>.png``, ``<key>.wav``; ``<key>.0.png``, ``<key>.1.wav`` if several).
``train-000.tar.idx`` is JSON Lines: a header with the size and sha256 of the whole shard and with the number of shards
and samples in the whole split, then name, offset, size and sha256 of each member. A picture or sound of several samples
is stored once; ``uri`` in each says where. The same samples give the same bytes: no times, no owners, samples in the
order given.

A shard is checked whole against its index before the first sample is read from it, and a split is only read if all its
shards are there. Nothing is unpacked to disk, no member is run.
"""

from __future__ import annotations

import hashlib
import io
import json
import mmap
import re
import tarfile
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import asdict, dataclass, replace
from itertools import islice
from pathlib import Path
from types import TracebackType

from plait.core import held_out
from plait.core.errors import DataError
from plait.core.files import write_atomic
from plait.core.types import MediaRef, Sample, Text, Turn
from plait.data.media import FORMATS, sniff
from plait.data.sounds import SOUNDS, sniff_sound
from plait.data.videos import VIDEOS, sniff_video

MAX_SHARD_BYTES = 128 * 2**20
"""A new shard is begun beyond this; a shard is made in memory."""

_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,90}")
_SHARD = re.compile(r"(?P<split>[A-Za-z0-9][A-Za-z0-9_-]*)-(?P<number>\d{3,})\.tar")
_FORMAT = 2
_RECORD = ".json"

Entry = tuple[Sample, Mapping[str, bytes]]
"""A sample and the encoded media stored with it, by sha256; what is not given must have a ``uri`` already."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Member:
    """One file inside a shard: where its bytes lie and what they must hash to."""

    name: str
    offset: int
    size: int
    sha256: str


@dataclass(frozen=True, slots=True, kw_only=True)
class _Header:
    """First line of an index: what the whole shard must be, and the split that it is a part of."""

    format: int = _FORMAT
    shard: str
    size: int
    sha256: str
    samples: int
    members: int
    shards: int
    split_samples: int


# --- writing -------------------------------------------------------------------------------------------------------


def write_shards(
    folder: Path, name: str, entries: Iterable[Entry], *, max_bytes: int = MAX_SHARD_BYTES
) -> list[Sample]:
    """Write samples as ``<name>-000.tar``, ``<name>-001.tar``, ... with their indexes.

    Args:
        folder: Where; exists.
        name: Split, such as ``train``.
        entries: Samples with the pictures and sounds to store, consumed one by one.
        max_bytes: A shard is closed when it is at least this large.

    Returns:
        The samples with every ``uri`` filled in.

    Raises:
        DataError: Two samples have one id, an id is not usable as a file name, or a picture or sound is missing or has
            another hash.
        ResourceError: The disk is full; no part of a shard is left under a final name.
    """
    written: list[Sample] = []
    seen: set[str] = set()
    stored: dict[str, str] = {}
    closed: list[_Shard] = []
    shard: _Shard | None = None
    for sample, media in entries:
        if sample.id in seen:
            raise DataError(
                "two samples have the same id", place=f"{name}/{sample.id}", remedy="give each its own content"
            )
        seen.add(sample.id)
        shard = shard or _Shard(f"{name}-{len(closed):03d}.tar")
        written.append(shard.add(sample, media, stored))
        if shard.size >= max_bytes:
            shard.write(folder)
            closed.append(shard)
            shard = None
    if shard:
        shard.write(folder)
        closed.append(shard)
    # Only now is it known how many shards there are. A tar without an index is unfinished and never read.
    for shard in closed:
        shard.write_index(folder, shards=len(closed), split_samples=len(written))
    return written


class _Shard:
    """A shard being made."""

    def __init__(self, name: str) -> None:
        if not _SHARD.fullmatch(name):
            raise DataError(f"{name!r} cannot be a shard's name", remedy="use letters, digits, - and _")
        self._name = name
        self._file = io.BytesIO()
        self._tar = tarfile.TarFile(fileobj=self._file, mode="w", format=tarfile.USTAR_FORMAT)
        self._members: list[Member] = []
        self._samples = 0
        self._whole = 0, ""

    @property
    def size(self) -> int:
        return self._file.tell()

    def add(self, sample: Sample, media: Mapping[str, bytes], stored: dict[str, str]) -> Sample:
        """Append one sample; ``stored`` maps the sha256 of what is already in this split to its uri."""
        new = {ref.sha256: ref for ref in sample.media() if ref.sha256 in media and ref.sha256 not in stored}
        files: list[tuple[str, bytes]] = []
        for position, (sha256, ref) in enumerate(new.items()):
            data = media[sha256]
            if hashlib.sha256(data).hexdigest() != sha256:
                raise DataError(
                    f"{_a(ref)} has another sha256 than its reference",
                    place=sample.id,
                    remedy="hash the bytes you hand over",
                )
            ending = _ending(ref, data, place=sample.id)
            member = f"{sample.id}.{ending}" if len(new) == 1 else f"{sample.id}.{position}.{ending}"
            files.append((member, data))
            stored[sha256] = f"{self._name}#{member}"
        placed = _place(sample, stored)
        record = json.dumps(placed.to_json(), ensure_ascii=False, separators=(",", ":"))
        self._append(f"{sample.id}{_RECORD}", record.encode())
        for member, data in files:
            self._append(member, data)
        self._samples += 1
        return placed

    def write(self, folder: Path) -> None:
        """Write the tar and give its memory back."""
        self._tar.close()
        content = self._file.getvalue()
        self._whole = len(content), hashlib.sha256(content).hexdigest()
        write_atomic(folder / self._name, content)
        self._file.close()

    def write_index(self, folder: Path, *, shards: int, split_samples: int) -> None:
        """Write the index of a written tar."""
        size, sha256 = self._whole
        header = _Header(
            shard=self._name,
            size=size,
            sha256=sha256,
            samples=self._samples,
            members=len(self._members),
            shards=shards,
            split_samples=split_samples,
        )
        lines = (json.dumps(asdict(line)) + "\n" for line in (header, *self._members))
        write_atomic(folder / f"{self._name}.idx", "".join(lines))

    def _append(self, name: str, data: bytes) -> None:
        if not _NAME.fullmatch(name):
            raise DataError(
                f"{name!r} cannot be a member's name", place=self._name, remedy="make ids of letters, digits, - and _"
            )
        info = tarfile.TarInfo(name)
        info.size = len(data)
        info.mode = 0o644
        self._tar.addfile(info, io.BytesIO(data))
        padded = -(-len(data) // tarfile.BLOCKSIZE) * tarfile.BLOCKSIZE
        offset = self._file.tell() - padded
        self._members.append(Member(name=name, offset=offset, size=len(data), sha256=hashlib.sha256(data).hexdigest()))


def _a(ref: MediaRef) -> str:
    return {"audio": "a sound", "video": "a video"}.get(ref.modality, "a picture")


def _ending(ref: MediaRef, data: bytes, *, place: str) -> str:
    """The ending of a file's name, by what its bytes are."""
    if ref.modality == "audio":
        return SOUNDS[sniff_sound(data, place=place)]
    return VIDEOS[sniff_video(data, place=place)] if ref.modality == "video" else FORMATS[sniff(data, place=place)]


def _place(sample: Sample, stored: Mapping[str, str]) -> Sample:
    turns = [
        Turn(
            role=turn.role,
            parts=tuple(_place_part(part, stored, sample.id) for part in turn.parts),
            trained=turn.trained,
        )
        for turn in sample.turns
    ]
    return replace(sample, turns=tuple(turns))


def _place_part(part: Text | MediaRef, stored: Mapping[str, str], sample: str) -> Text | MediaRef:
    if isinstance(part, Text):
        return part
    uri = stored.get(part.sha256, part.uri)
    if not uri:
        raise DataError(f"the sample has {_a(part)} that was not handed over", place=sample, remedy="pass its bytes")
    return replace(part, uri=uri)


# --- reading -------------------------------------------------------------------------------------------------------


def split_names(folder: Path) -> list[str]:
    """The splits that have shards in a folder, sorted."""
    return sorted({match["split"] for path in folder.glob("*.tar") if (match := _SHARD.fullmatch(path.name))})


def shards_sha256(folder: Path) -> str:
    """One digest over all shards of a folder, by name, from their indexes: what ``sha256sum *.tar | sha256sum`` gives.

    Raises:
        DataError: A shard has no index or a damaged one.
    """
    digest = hashlib.sha256()
    for path in sorted(folder.glob("*.tar")):
        header, _ = _read_index(path)
        digest.update(f"{header.sha256}  {path.name}\n".encode())
    return digest.hexdigest()


class ShardReader:
    """Random access to one split; what its samples show may lie in any shard of the folder.

    Files are mapped, not read: memory is the system's page cache. Each shard is verified when it is first touched.

    Example::

        with ShardReader(run / "01-data/shards", "test-concept") as reader:
            sample = reader[0]
            picture = decode_image(reader.media(sample.media()[0]), place=sample.id)

    Raises:
        DataError: There is no such split; a shard or an index is missing, cut off, changed or exchanged (names it).
    """

    def __init__(self, folder: Path, name: str) -> None:
        held_out.check(name, folder)
        self.folder = folder
        self.name = name
        self._shards: dict[str, _Mapped] = {}
        numbers = {
            int(m["number"])
            for p in folder.glob(f"{name}-*.tar*")
            if (m := _SHARD.match(p.name)) and m["split"] == name
        }
        if not numbers:
            known = ", ".join(split_names(folder)) or "none"
            raise DataError(f"no split called {name!r}", place=str(folder), remedy=f"choose one of: {known}")
        self._samples: list[tuple[str, str]] = []
        try:
            self._open_split(numbers)
        except DataError:
            self.close()
            raise

    def __len__(self) -> int:
        return len(self._samples)

    def __getitem__(self, index: int) -> Sample:
        shard, member = self._samples[index]
        return Sample.from_json(json.loads(self._open(shard).read(member)))

    def __iter__(self) -> Iterator[Sample]:
        return (self[index] for index in range(len(self)))

    def media(self, ref: MediaRef) -> bytes:
        """Encoded bytes of a picture or sound, checked against the reference.

        Raises:
            DataError: The reference points outside the folder, to nothing, or to other bytes.
        """
        shard, _, member = ref.uri.partition("#")
        if not _SHARD.fullmatch(shard) or not _NAME.fullmatch(member):
            raise DataError(
                f"the reference {ref.uri!r} does not name a member of a shard", place=str(self.folder), remedy=_REBUILD
            )
        data = self._open(shard).read(member)
        if hashlib.sha256(data).hexdigest() != ref.sha256:
            raise DataError(
                "the bytes are not those the sample was made with", place=f"{self.folder}/{ref.uri}", remedy=_REBUILD
            )
        return data

    def close(self) -> None:
        """Give the files back."""
        for shard in self._shards.values():
            shard.close()
        self._shards.clear()

    def __enter__(self) -> ShardReader:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _open_split(self, numbers: set[int]) -> None:
        """Open all shards of the split; ``numbers`` are those of the files there are."""
        first = self._open(self._shard_name(0))
        shards, samples = first.split
        lost = islice((number for number in range(shards) if number not in numbers), 3)
        if names := ", ".join(map(self._shard_name, lost)):
            raise first.refused(f"it is one of {shards:,} of its split; not there: {names}")
        if max(numbers) >= shards:
            raise first.refused(f"it is one of {shards:,} of its split, but there is {self._shard_name(max(numbers))}")
        for number in range(shards):
            name = self._shard_name(number)
            shard = self._open(name)
            if shard.split != first.split:
                raise shard.refused(f"it is of another split than {self._shard_name(0)}")
            self._samples += [(name, member) for member in shard.members if member.endswith(_RECORD)]
        if len(self._samples) != samples:
            raise first.refused(f"its split has {len(self._samples):,} samples, its index says {samples:,}")

    def _shard_name(self, number: int) -> str:
        return f"{self.name}-{number:03d}.tar"

    def _open(self, shard: str) -> _Mapped:
        if shard not in self._shards:
            self._shards[shard] = _Mapped(self.folder / shard)
        return self._shards[shard]


_REBUILD = "run the data stage again (remove its folder first); do not edit shards by hand"


class _Mapped:
    """One shard, mapped and verified."""

    def __init__(self, path: Path) -> None:
        self._path = path
        header, self.members = _read_index(path)
        self.split: tuple[int, int] = header.shards, header.split_samples
        try:
            with path.open("rb") as file:
                size = file.seek(0, io.SEEK_END)
                if size != header.size:
                    raise self.refused(f"it has {size:,} bytes, its index says {header.size:,}")
                self._map = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
        except OSError as error:
            raise self.refused(f"it cannot be read: {error.strerror}") from error
        found = hashlib.sha256(self._map).hexdigest()
        if found != header.sha256:
            self.close()
            raise self.refused(f"its sha256 is {found[:12]}…, its index says {header.sha256[:12]}…")

    def read(self, name: str) -> bytes:
        member = self.members.get(name)
        if member is None:
            raise self.refused(f"it has no member {name!r}")
        data = self._map[member.offset : member.offset + member.size]
        if hashlib.sha256(data).hexdigest() != member.sha256:
            raise self.refused(f"{name} changed after the shard was opened")
        return data

    def close(self) -> None:
        self._map.close()

    def refused(self, cause: str) -> DataError:
        """The error that says what is wrong with this shard."""
        return DataError(f"shard {self._path.name} is refused: {cause}", place=str(self._path), remedy=_REBUILD)


def _read_index(path: Path) -> tuple[_Header, dict[str, Member]]:
    index = path.with_name(f"{path.name}.idx")
    try:
        first, *lines = (json.loads(line) for line in index.read_text(encoding="utf-8").splitlines())
        if first["format"] != _FORMAT:
            raise ValueError(f"it has format {first['format']}, this version reads {_FORMAT}")
        header = _Header(**first)
        members = {line["name"]: Member(**line) for line in lines}
        samples = sum(name.endswith(_RECORD) for name in members)
        stated = (header.shard, header.members, header.members, header.samples)
        sound = stated == (path.name, len(lines), len(members), samples)
        sound = sound and header.shards >= 1 and header.split_samples >= samples
        sound = sound and isinstance(header.shards, int) and isinstance(header.sha256, str)
        sound = sound and all(_inside(member, header.size) for member in members.values())
    except FileNotFoundError as error:
        raise DataError(
            f"shard {path.name} has no index: it was not finished", place=str(index), remedy=_REBUILD
        ) from error
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise DataError(
            f"the index of {path.name} cannot be used: {error}", place=str(index), remedy=_REBUILD
        ) from error
    if not sound:
        raise DataError(
            f"the index of {path.name} does not belong to it or is incomplete", place=str(index), remedy=_REBUILD
        )
    return header, members


def _inside(member: Member, size: int) -> bool:
    placed = min(member.offset, member.size) >= 0 and member.offset + member.size <= size
    return placed and bool(_NAME.fullmatch(member.name))
