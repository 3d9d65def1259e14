"""Cache of a frozen encoder's outputs: each picture is encoded once, whatever the number of epochs, runs and splits.

A cache is a folder under the encoder's key, which stands for weights, preprocessing and number format; inside, features
are found by the sha256 of the encoded picture. Features are kept in 16 bits: as they are if the encoder puts out 16,
else in float16 (relative error at most 2^-11; beyond its range an error, never a quiet infinity).
"""

import hashlib
import json
import time
from collections.abc import Callable, Container, Generator, Iterable, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import Float, Int
from safetensors.torch import save
from torch import Tensor

from plait.core import mesh
from plait.core.errors import DataError, PlaitError, ResourceError, UsageError
from plait.core.events import Events
from plait.core.files import lock, read_json, sha256_file, write_atomic
from plait.core.protocols import Encoder
from plait.core.tensors import Patches
from plait.core.types import MediaRef
from plait.data.encode import encode_media

_INDEX = "index.json"
_FORMAT = 1
_BATCH = 16
_FEW = 64  # below so many items the times say nothing about what the cache saves
_PATIENCE_S = 7200.0  # another run may be encoding very many pictures
_LOOK_EVERY_S = 0.5
_ONE = "fit pictures into a square or at their own resolution; tiles are for models with a decoder"
_PROBE = 256  # items read back to measure how long an epoch's reading takes


Encode = Callable[[Sequence[MediaRef]], tuple[Tensor, list[list[int]]]]
"""Features of media, and of each the grid of its items, as :func:`plait.data.encode.encode_media` gives them."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Fill:
    """What filling the cache took.

    Attributes:
        computed: Items encoded now.
        reused: Items found in the cache.
        duplicates: Items whose bytes another item of the same request has, too.
        seconds: Time spent encoding, now and when the reused items were made.
        read_seconds: Time to read all items back once, measured on a part of them.
        bytes: Size of the features on disk.
    """

    computed: int
    reused: int
    duplicates: int
    seconds: float
    read_seconds: float
    bytes: int

    @property
    def items_per_s(self) -> float:
        """Items encoded a second."""
        return (self.computed + self.reused) / max(self.seconds, 1e-9)

    @property
    def break_even_epochs(self) -> float:
        """Epochs after which the cache took less time than encoding in every epoch: fill / (fill - read)."""
        saved = self.seconds - self.read_seconds
        return self.seconds / saved if saved > 0 else float("inf")

    def __str__(self) -> str:
        text = f"features: {self.computed:,} computed, {self.reused:,} reused, {self.duplicates:,} duplicates; "
        text += f"{self.items_per_s:,.0f} items/s, {self.bytes / 2**20:,.0f} MiB"
        if self.computed + self.reused < _FEW:
            return text
        saved = self.seconds - self.read_seconds
        if saved <= 0:
            return f"{text}; reading takes as long as encoding: the cache does not pay"
        return f"{text}; saves {saved:,.1f} s an epoch, pays off after {self.break_even_epochs:.2f} epochs"


@dataclass(frozen=True, slots=True)
class _Chunk:
    """Rows, whose they are, and the file that they are mapped from; on the way to another process without the rows."""

    values: Any
    items: Sequence[Sequence[Any]]
    path: Path | None


class FeatureStore:
    """Cached features by the sha256 of their picture or sound, memory-mapped.

    Attributes:
        d_out: Width of a feature.
        dtype: Of the features.
        fill: How the cache was filled for this request.
    """

    fill: Fill

    def __init__(self, d_out: int, dtype: torch.dtype) -> None:
        self.d_out = d_out
        self.dtype = dtype
        self._items: dict[str, tuple[Tensor, list[list[int]]]] = {}
        self._chunks: list[_Chunk] = []

    def __getstate__(self) -> dict[str, Any]:
        """For a process that makes batches: files are mapped there anew; only what has no file is carried along."""
        loose = [chunk for chunk in self._chunks if not chunk.path]
        if len(loose) > 1:  # one tensor instead of many, which stays: what is handed over must not end with this call
            filed = [chunk for chunk in self._chunks if chunk.path]
            self._items, self._chunks = {}, []
            for chunk in filed:
                self.add(chunk.values, chunk.items, path=chunk.path)
            self.add(torch.cat([chunk.values for chunk in loose]), [item for chunk in loose for item in chunk.items])
        state = {name: value for name, value in vars(self).items() if name != "_items"}
        return state | {"_chunks": [replace(chunk, values=None) if chunk.path else chunk for chunk in self._chunks]}

    def __setstate__(self, state: Mapping[str, Any]) -> None:
        vars(self).update(state)
        chunks, self._items, self._chunks = self._chunks, {}, []
        for chunk in chunks:
            self.add(_map(chunk.path) if chunk.path else chunk.values, chunk.items, path=chunk.path)

    def __len__(self) -> int:
        return len(self._items)

    def __contains__(self, sha256: str) -> bool:
        return sha256 in self._items

    def __call__(self, sha256s: Sequence[str]) -> Patches:
        """Features of media, in this order; one may be named more than once, and a picture may be several items.

        Raises:
            DataError: An item is not in the cache.
        """
        missing = [s for s in sha256s if s not in self._items]
        if missing:
            raise DataError(
                f"{len(missing)} of {len(sha256s)} items have no cached features; the first is {missing[0][:12]}",
                place="feature cache",
                remedy="hand all media of the run to cached_features",
            )
        parts = [self._items[s] for s in sha256s]
        values = torch.cat([p[0] for p in parts]) if parts else torch.zeros(0, self.d_out, dtype=self.dtype)
        grid = [row for _, rows in parts for row in rows]
        return Patches(values=values, grid=torch.tensor(grid, dtype=torch.long).view(-1, 3))

    def one_each(self, sha256s: Sequence[str]) -> Patches:
        """Features of pictures that are one item each, for who takes a row of the grid for a picture.

        Raises:
            DataError: A picture is not in the cache, or is several items; says which.
        """
        found = self(sha256s)
        if len(found.grid) != len(sha256s):
            name = next(s for s in sha256s if len(self._items[s][1]) != 1)
            raise DataError(
                f"the picture is {len(self._items[name][1])} items (grid {self._items[name][1]}), one is read here",
                place=f"picture {name[:12]}",
                remedy=_ONE,
            )
        return found

    def grids(self, sha256s: Iterable[str]) -> Int[Tensor, "grid 3"]:
        """The grids of media as far as they are here, each once."""
        found = {tuple(row) for s in sha256s if s in self._items for row in self._items[s][1]}
        return torch.tensor(sorted(found), dtype=torch.long).view(-1, 3)

    def add(self, values: Float[Tensor, "n d"], pictures: Sequence[Sequence[Any]], *, path: Path | None = None) -> None:
        """Take in one chunk.

        Args:
            values: Its rows.
            pictures: Of each in order its sha256, then frames, rows and columns of each of its items.
            path: File that the rows are mapped from.
        """
        self._chunks.append(_Chunk(values, pictures, path))
        start = 0
        for sha256, *numbers in pictures:
            grid = [[int(n) for n in numbers[at : at + 3]] for at in range(0, len(numbers), 3)]
            stop = start + sum(frames * rows * columns for frames, rows, columns in grid)
            self._items[sha256] = (values[start:stop], grid)
            start = stop


class FreshFeatures(FeatureStore):
    """Features that are computed anew each time they are asked for: nothing is kept, on disk or in memory.

    What comes is bit for bit what :func:`cached_features` keeps, if the encoder gives the same for a picture whatever
    stands beside it in a batch.

    Args:
        media: All that may be asked for; equal bytes are one.
        read: As in :func:`cached_features`.
        prepare: As there.
        encoder: As there.
    """

    def __init__(
        self,
        media: Sequence[MediaRef],
        *,
        read: Callable[[MediaRef], bytes],
        prepare: Callable[[Any], Patches],
        encoder: Encoder,
    ) -> None:
        super().__init__(encoder.d_out, torch.float16)
        self._refs = {ref.sha256: ref for ref in media}
        self._read, self._prepare, self._encoder = read, prepare, encoder

    def __getstate__(self) -> dict[str, Any]:
        raise TypeError("features that are computed anew need the encoder, which stays where training is")

    def __len__(self) -> int:
        return len(self._refs)

    def __contains__(self, sha256: str) -> bool:
        return sha256 in self._refs

    def __call__(self, sha256s: Sequence[str]) -> Patches:
        """Features of media, encoded now; each once, however often it is named.

        Raises:
            DataError: A medium is unknown, or cannot be read or decoded.
            NumericsError: A feature is not finite in 16 bits.
        """
        if missing := [s for s in sha256s if s not in self._refs]:
            raise DataError(
                f"{len(missing)} of {len(sha256s)} items are unknown; the first is {missing[0][:12]}",
                place="features",
                remedy="hand all media of the run over at the start",
            )
        once = list(dict.fromkeys(sha256s))
        now = FeatureStore(self.d_out, self.dtype)
        if not once:
            return now([])
        values, grids = encode_media(
            [self._refs[s] for s in once], read=self._read, prepare=self._prepare, encoder=self._encoder
        )
        now.add(values, [(s, *grid) for s, grid in zip(once, grids, strict=True)])
        return now(sha256s)

    def one_each(self, sha256s: Sequence[str]) -> Patches:
        """As of a cache.

        Raises:
            DataError: As :meth:`__call__`, or a picture is several items.
        """
        found = self(sha256s)
        if len(found.grid) != len(sha256s):
            raise DataError(
                f"{len(sha256s)} pictures are {len(found.grid)} items, one each is read here",
                place="features",
                remedy=_ONE,
            )
        return found


def cached_features(
    media: Sequence[MediaRef],
    *,
    read: Callable[[MediaRef], bytes],
    prepare: Callable[[Any], Patches],
    encoder: Encoder,
    key: str,
    folder: Path,
    events: Events,
    chunk_items: int = 128,
) -> FeatureStore:
    """Features of all media, from the cache where they are, else computed and kept.

    Work is kept chunk by chunk: what a killed process had finished is not computed again. A damaged chunk is removed,
    an event says so, and its items are computed anew. While another process fills the same cache, this one waits, and
    then takes over what that one computed. Of several processes that train together, the first one fills it.

    Args:
        media: Pictures, sounds or videos; equal bytes are encoded once.
        read: Gives the encoded bytes of one.
        prepare: RGB picture to raw pixels, :class:`~plait.data.sounds.Sound` to raw samples, or
            :class:`~plait.data.videos.Video` to frames of raw pixels, as the encoder wants them; one item or several.
        encoder: These to features.
        key: Digest of the encoder's weights, preprocessing and number format.
        folder: Where caches lie; this one becomes a folder in it.
        events: Told progress, damage, and at the end what it took.
        chunk_items: Items a file.

    Raises:
        DataError: An item cannot be read or decoded, or its bytes are not those its sha256 names.
        NumericsError: A feature is not finite in 16 bits.
        ResourceError: The disk is full, finished chunks are kept; or another process keeps this cache for two hours.
    """
    place = folder / key[:16]
    place.mkdir(parents=True, exist_ok=True)
    unique: dict[str, MediaRef] = {}
    for ref in media:
        unique.setdefault(ref.sha256, ref)

    def encode(refs: Sequence[MediaRef]) -> tuple[Tensor, list[list[int]]]:
        return encode_media(refs, read=read, prepare=prepare, encoder=encoder)

    def filled() -> tuple[_Cache, int]:
        if mesh.rank():  # the first one has filled it: whoever only reads needs no lock, unless its disk is another
            cache = _Cache(place, key, events, owned=False)
            if unique.keys() <= cache.known:
                return cache, 0
        with _held(place, events):
            cache = _Cache(place, key, events)
            missing = [ref for sha256, ref in unique.items() if sha256 not in cache.known]
            cache.fill(missing, encode, chunk_items=chunk_items)
            return cache, len(missing)

    cache, computed = mesh.first_then_others(filled)
    store = cache.open(encoder.d_out)
    counts = {"computed": computed, "reused": len(unique) - computed, "duplicates": len(media) - len(unique)}
    seconds, size = cache.cost(unique.keys())
    fill = Fill(**counts, seconds=seconds, bytes=size, read_seconds=_read_time(store, list(unique)))
    store.fill = fill
    events.note(str(fill), **counts, seconds=round(seconds, 2), items_per_s=round(fill.items_per_s, 1), bytes=size)
    return store


@contextmanager
def _held(place: Path, events: Events) -> Generator[None]:
    """The cache's lock, waited for."""
    begun = time.monotonic()
    with ExitStack() as stack:
        said = False
        while True:
            try:
                stack.enter_context(lock(place))
                break
            except UsageError as error:
                holder = error.cause.removeprefix("the run is in use by ")
                waited = time.monotonic() - begun
                if waited >= _PATIENCE_S:
                    raise ResourceError(
                        f"the feature cache is still in use by {holder} after {waited:,.0f} s of waiting",
                        place=str(place),
                        remedy="wait for that run or stop it, then `plait resume` this one",
                    ) from error
                if not said:
                    events.note(f"the feature cache is being filled by {holder}: waiting for it", place=str(place))
                    said = True
                events.progress("features: waiting for another run", 0, 0, waited_s=round(waited))
                time.sleep(_LOOK_EVERY_S)
        yield


def _read_time(store: FeatureStore, sha256s: list[str]) -> float:
    """Seconds to gather all items once, from a part of them."""
    part = sha256s[:_PROBE]
    begun = time.perf_counter()
    for start in range(0, len(part), _BATCH):
        store(part[start : start + _BATCH])
    return (time.perf_counter() - begun) * len(sha256s) / max(len(part), 1)


# --- on disk -------------------------------------------------------------------------------------------------------


class _Cache:
    """Chunks of one key: safetensors files, and an index that names only whole ones.

    Args:
        folder: Where they are.
        key: Theirs.
        events: Told damage and progress.
        owned: Whether nobody else writes here now: then what is not whole is removed.
    """

    def __init__(self, folder: Path, key: str, events: Events, *, owned: bool = True) -> None:
        self.folder, self.events = folder, events
        self._head = {"format": _FORMAT, "key": key}
        self._chunks: list[dict[str, Any]] = []
        for chunk in self._read_index(events):
            path = folder / chunk["file"]
            if path.is_file() and sha256_file(path) == chunk["sha256"]:
                self._chunks.append(chunk)
            else:
                state = "damaged" if path.is_file() else "missing"
                text = f"feature cache: {chunk['file']} is {state}; its {len(chunk['items'])} items are computed again"
                events.warning(text, place=str(path))
        self.known = {item[0] for chunk in self._chunks for item in chunk["items"]}
        if not owned:
            return
        whole = {chunk["file"] for chunk in self._chunks}
        for path in folder.glob("*.safetensors"):
            if path.name not in whole:
                path.unlink()
        for path in folder.glob(".*.tmp"):  # of killed writers: whoever has the lock writes alone
            path.unlink()

    def fill(self, missing: Sequence[MediaRef], encode: Encode, *, chunk_items: int) -> None:
        """Encode and keep, chunk by chunk."""
        begun = time.perf_counter()
        for start in range(0, len(missing), chunk_items):
            refs = missing[start : start + chunk_items]
            at = time.perf_counter()
            values, grids = encode(refs)
            pictures = [(ref.sha256, *grid) for ref, grid in zip(refs, grids, strict=True)]
            self.append(values, pictures, time.perf_counter() - at)
            done = start + len(refs)
            speed = done / (time.perf_counter() - begun)
            self.events.progress("features", done, len(missing), items_per_s=round(speed, 1))

    def append(self, values: Tensor, items: list[tuple[Any, ...]], seconds: float) -> None:
        """Keep one chunk: first the file, then its line in the index."""
        number = max((int(c["file"][6:11]) for c in self._chunks), default=-1) + 1
        data = save({"values": values.contiguous()})
        name = f"chunk-{number:05d}.safetensors"
        write_atomic(self.folder / name, data)
        digest = hashlib.sha256(data).hexdigest()
        chunk = {"file": name, "sha256": digest, "bytes": len(data), "seconds": round(seconds, 4), "items": items}
        self._chunks.append(chunk)
        self.known |= {item[0] for item in items}
        write_atomic(self.folder / _INDEX, json.dumps(self._head | {"chunks": self._chunks}))

    def open(self, d_out: int) -> FeatureStore:
        """All chunks, memory-mapped."""
        paths = [self.folder / chunk["file"] for chunk in self._chunks]
        mapped = [_map(path) for path in paths]
        store = FeatureStore(d_out, mapped[0].dtype if mapped else torch.float16)
        for values, chunk, path in zip(mapped, self._chunks, paths, strict=True):
            store.add(values, chunk["items"], path=path)
        return store

    def cost(self, wanted: Container[str]) -> tuple[float, int]:
        """Seconds it took to compute the wanted items, and their bytes; parts of chunks by their share."""
        seconds = size = 0.0
        for chunk in self._chunks:
            share = sum(item[0] in wanted for item in chunk["items"]) / len(chunk["items"])
            seconds += share * chunk["seconds"]
            size += share * chunk["bytes"]
        return seconds, round(size)

    def _read_index(self, events: Events) -> list[dict[str, Any]]:
        path = self.folder / _INDEX
        if not path.is_file():
            return []
        try:
            index = read_json(path)
            if isinstance(index, dict) and {k: index.get(k) for k in self._head} == self._head:
                return index["chunks"]
            cause = f"its index is of another key or format than {self._head}"
        except PlaitError as error:
            cause = str(error)
        events.warning(f"feature cache: everything is computed again, because {cause}", place=str(path))
        return []


def _map(path: Path) -> Tensor:
    """The tensor ``values`` of a safetensors file, read from disk only where it is touched."""
    with path.open("rb") as file:
        length = int.from_bytes(file.read(8), "little")
        entry = json.loads(file.read(length))["values"]
    dtype = {"BF16": torch.bfloat16, "F16": torch.float16}[entry["dtype"]]
    rows, width = entry["shape"]
    # Copy on write: torch wants writable memory, and the file stays as it is.
    raw = np.memmap(path, dtype=np.int16, mode="c", offset=8 + length + entry["data_offsets"][0], shape=(rows, width))
    return torch.from_numpy(raw).view(dtype)
