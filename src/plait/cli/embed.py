"""``plait embed MODEL --image PATH --text TEXT``: pictures and texts as vectors of one space, and how near they are."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from plait.cli.output import Out
from plait.core.errors import DataError, ResourceError, UsageError

if TYPE_CHECKING:
    from PIL import Image
    from torch import Tensor

    Embedded = tuple[Sequence[str], Tensor]


def add(parser: argparse.ArgumentParser) -> None:
    """Arguments of the verb."""
    parser.add_argument("model", help="a run, a pretrain stage's folder, or a checkpoint of a dual encoder")
    parser.add_argument("--image", nargs="+", action="extend", default=[], metavar="PATH", help="pictures")
    parser.add_argument("--text", nargs="+", action="extend", default=[], metavar="TEXT", help="texts")
    parser.add_argument(
        "--top", type=int, default=5, metavar="N", help="how many of the nearest are shown (default: 5)"
    )
    parser.add_argument(
        "--out", type=Path, metavar="FILE", help="also write the vectors: safetensors with `image` and `text`, n x d"
    )
    parser.add_argument(
        "--runs", type=Path, default=Path("runs"), metavar="FOLDER", help="where run folders are (default: runs)"
    )


def main(args: argparse.Namespace, out: Out) -> int:
    """Embed, say what is nearest, and write vectors where they are wanted; 4 if a picture could not be read."""
    if not args.image and not args.text:
        raise UsageError("there is nothing to embed", place="plait embed", remedy="give --image PATH or --text TEXT")
    if args.top < 1:
        raise UsageError(f"--top is {args.top}, expected 1 or more", place="--top", remedy="give --top N")
    if args.out is not None and args.out.is_dir():
        raise UsageError("--out is a folder", place=str(args.out), remedy="give --out FILE")
    from plait.inference.load import find_dual_folder, load_dual

    folder = find_dual_folder(args.model, args.runs)
    names, pictures, refused = _pictures(args.image)
    dual = load_dual(folder, say=lambda text: print(text, file=sys.stderr, flush=True))
    image, text = dual.embed_pictures(pictures).cpu(), dual.embed_texts(args.text).cpu()
    pictured, written = (names, image), (args.text, text)
    for items, among in ((pictured, written if args.text else pictured), (written, pictured if names else written)):
        for line in nearest(items, among, top=args.top):
            out.line(line)
    if args.out is not None:
        _write(args.out, {"image": image, "text": text}, {"image": names, "text": args.text}, model=folder)
        out.line(f"{args.out}: {len(names)} pictures and {len(args.text)} texts, {image.shape[1]} numbers each")
    out.result(
        {
            "model": str(folder),
            "dimension": image.shape[1],
            "images": names,
            "texts": args.text,
            "cosine": (image @ text.T).tolist(),
            "cosine_of_images": (image @ image.T).tolist(),
            "cosine_of_texts": (text @ text.T).tolist(),
            "refused": [fault.as_dict() for fault in refused],
        }
    )
    if refused:
        print(f"{len(refused)} of {len(args.image)} pictures could not be read", file=sys.stderr)
    return DataError.exit_code if refused else 0


def nearest(items: Embedded, among: Embedded, *, top: int) -> list[str]:
    """A block of lines for each item: what is nearest to it, with the cosine.

    Args:
        items: Names and their vectors.
        among: Those that may be near; where they are the items themselves, none is its own neighbor.
        top: How many are shown at most.
    """
    lines: list[str] = []
    cosine = items[1] @ among[1].T
    for row, name in enumerate(items[0]):
        order = cosine[row].argsort(descending=True, stable=True).tolist()
        order = [other for other in order if items is not among or other != row]
        lines.append(name)
        lines += [f"  {cosine[row, other]:+.3f}  {among[0][other]}" for other in order[:top]]
    return lines


def _pictures(paths: Sequence[str]) -> tuple[list[str], list[Image.Image], list[DataError]]:
    """Those that can be read, and what was wrong with the others, which is said at once."""
    from plait.data.media import MediaError, decode_image, read_media

    names: list[str] = []
    pictures: list[Image.Image] = []
    refused: list[DataError] = []
    for path in paths:
        file = Path(path).absolute()
        try:
            pictures.append(decode_image(read_media(file, allowed_root=Path(file.anchor)), place=path))
            names.append(path)
        except MediaError as fault:
            refused.append(fault)
            print(f"left out: {fault}", file=sys.stderr)
    return names, pictures, refused


def _write(path: Path, vectors: dict[str, Tensor], names: dict[str, list[str]], *, model: Path) -> None:
    import json

    from safetensors.torch import save

    from plait.core.files import write_atomic

    metadata = {side: json.dumps(listed, ensure_ascii=False) for side, listed in names.items()}
    metadata |= {"format": "pt", "model": str(model)}
    data = save({side: rows.contiguous() for side, rows in vectors.items()}, metadata=metadata)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        write_atomic(path, data)
    except OSError as error:
        raise ResourceError(
            f"cannot be written: {error.strerror}", place=str(path), remedy="name a file in a folder of yours"
        ) from error
