"""``plait embed MODEL --image PATH --text TEXT``: pictures, texts and sounds as vectors of one space, and how near."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from itertools import combinations_with_replacement
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from plait.cli.output import Out
from plait.core.errors import DataError, ResourceError, UsageError

if TYPE_CHECKING:
    from PIL import Image
    from torch import Tensor

    from plait.assembly.dual import Dual
    from plait.assembly.views import ViewModel
    from plait.data.sounds import Sound

    Embedded = tuple[list[str], Tensor]

Opened = TypeVar("Opened")
_KINDS = {"image": "pictures", "text": "texts", "audio": "sounds"}


def add(parser: argparse.ArgumentParser) -> None:
    """Arguments of the verb."""
    parser.add_argument("model", help="a run, a pretrain stage's folder, or a checkpoint of a dual encoder")
    parser.add_argument("--image", nargs="+", action="extend", default=[], metavar="PATH", help="pictures")
    parser.add_argument("--text", nargs="+", action="extend", default=[], metavar="TEXT", help="texts")
    parser.add_argument(
        "--sound",
        nargs="+",
        action="extend",
        default=[],
        metavar="PATH",
        help="sounds (mono WAV, at the rate of the model's audio tower), where it was trained with `spoken`",
    )
    parser.add_argument(
        "--top", type=int, default=5, metavar="N", help="how many of the nearest are shown (default: 5)"
    )
    parser.add_argument(
        "--out",
        type=Path,
        metavar="FILE",
        help="also write the vectors: safetensors with `image`, `text` and `audio`, n x d",
    )
    parser.add_argument(
        "--runs", type=Path, default=Path("runs"), metavar="FOLDER", help="where run folders are (default: runs)"
    )


def main(args: argparse.Namespace, out: Out) -> int:
    """Embed, say what is nearest, and write vectors where they are wanted; 4 if a file could not be read."""
    if not args.image and not args.text and not args.sound:
        remedy = "give --image PATH, --text TEXT or --sound PATH"
        raise UsageError("there is nothing to embed", place="plait embed", remedy=remedy)
    if args.top < 1:
        raise UsageError(f"--top is {args.top}, expected 1 or more", place="--top", remedy="give --top N")
    if args.out is not None and args.out.is_dir():
        raise UsageError("--out is a folder", place=str(args.out), remedy="give --out FILE")
    from plait.inference.load import find_dual_folder, load_dual

    folder = find_dual_folder(args.model, args.runs)
    refused: list[DataError] = []
    names, pictures = _opened(args.image, _picture, refused)
    dual = load_dual(folder, say=lambda text: print(text, file=sys.stderr, flush=True))
    if args.sound:
        dual.check_hears(place=args.sound[0])
    heard, sounds = _opened(args.sound, partial(_sound, dual=dual), refused)
    items: dict[str, Embedded] = {
        "image": (names, dual.embed_pictures(pictures).cpu()),
        "text": (args.text, dual.embed_texts(args.text).cpu()),
        "audio": (heard, dual.embed_sounds(sounds).cpu()),
    }
    for line in _told(items, top=args.top):
        out.line(line)
    dimension = items["image"][1].shape[1]
    if args.out is not None:
        _write(args.out, items, model=folder)
        counts = ", ".join(f"{len(items[kind][0])} {what}" for kind, what in _KINDS.items())
        out.line(f"{args.out}: {counts}; {dimension} numbers each")
    if out.json:  # cosines of all with all take memory
        faults = [fault.as_dict() for fault in refused]
        out.result({"model": str(folder), "dimension": dimension, **_record(items), "refused": faults})
    if refused:
        given = len(args.image) + len(args.sound)
        print(f"{len(refused)} of {given} files could not be read", file=sys.stderr)
    return DataError.exit_code if refused else 0


def _told(items: Mapping[str, Embedded], *, top: int) -> Iterator[str]:
    """Each item with what is nearest to it of every other kind that was given; of its own if it is alone."""
    for kind, (listed, vectors) in items.items():
        others = [among for other, among in items.items() if other != kind and among[0]]
        for row, name in enumerate(listed):
            yield name
            for among in others:
                yield from nearest(vectors[row], among, top=top)
            if not others:
                yield from nearest(vectors[row], items[kind], top=top, own=row)


def _record(items: Mapping[str, Embedded]) -> dict[str, Any]:
    """Names by kind, and cosines of all with all."""
    record: dict[str, Any] = {
        what: items[kind][0] for kind, what in zip(items, ("images", "texts", "sounds"), strict=True)
    }
    record["cosine"] = (items["image"][1] @ items["text"][1].T).tolist()
    record["cosines"] = {
        f"{one}-{other}": (items[one][1] @ items[other][1].T).tolist()
        for one, other in combinations_with_replacement(items, 2)
    }
    return record


def nearest(vector: Tensor, among: Embedded, *, top: int, own: int | None = None) -> list[str]:
    """A line for each of those nearest to a vector, with the cosine.

    Args:
        vector: Of unit length.
        among: Names and vectors of those that may be near.
        top: How many are shown at most.
        own: Which of them the vector itself is; none is its own neighbor.
    """
    cosine = among[1] @ vector
    order = [other for other in cosine.argsort(descending=True, stable=True).tolist() if other != own]
    return [f"  {cosine[other]:+.3f}  {among[0][other]}" for other in order[:top]]


def _opened(
    paths: Sequence[str], decode: Callable[[bytes, str], Opened], refused: list[DataError]
) -> tuple[list[str], list[Opened]]:
    """Those that can be read; what was wrong with the others is said at once, and put into ``refused``."""
    from plait.data.media import read_media

    names: list[str] = []
    found: list[Opened] = []
    for path in paths:
        file = Path(path).absolute()
        try:
            found.append(decode(read_media(file, allowed_root=Path(file.anchor)), path))
            names.append(path)
        except DataError as fault:
            refused.append(fault)
            print(f"left out: {fault}", file=sys.stderr)
    return names, found


def _picture(data: bytes, place: str) -> Image.Image:
    from plait.data.media import decode_image

    return decode_image(data, place=place)


def _sound(data: bytes, place: str, *, dual: Dual | ViewModel) -> Sound:
    from plait.data.sounds import decode_sound

    sound = decode_sound(data, place=place)
    if dual.audio is not None:  # another rate, or too long: of this one alone
        dual.audio.prepare(sound)
    return sound


def _write(path: Path, items: Mapping[str, Embedded], *, model: Path) -> None:
    import json

    from safetensors.torch import save

    from plait.core.files import write_atomic

    given = {kind: item for kind, item in items.items() if item[0] or kind != "audio"}
    metadata = {kind: json.dumps(listed, ensure_ascii=False) for kind, (listed, _) in given.items()}
    metadata |= {"format": "pt", "model": str(model)}
    data = save({kind: rows.contiguous() for kind, (_, rows) in given.items()}, metadata=metadata)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        write_atomic(path, data)
    except OSError as error:
        raise ResourceError(
            f"cannot be written: {error.strerror}", place=str(path), remedy="name a file in a folder of yours"
        ) from error
