"""``plait export MODEL --to hf FOLDER``: a model in a layout that other tools load."""

from __future__ import annotations

import argparse
import dataclasses
import sys
from pathlib import Path

from plait.cli.output import Out
from plait.core.errors import UsageError


def add(parser: argparse.ArgumentParser) -> None:
    """Arguments of the verb."""
    parser.add_argument("model", help="a run, a stage's folder or a checkpoint")
    parser.add_argument(
        "--to",
        choices=["hf"],
        required=True,
        help="hf: Hugging Face transformers; AutoModelForImageTextToText and AutoProcessor load the folder",
    )
    parser.add_argument("folder", type=Path, help="where to write: a new folder, or an empty one")
    parser.add_argument(
        "--runs", type=Path, default=Path("runs"), metavar="FOLDER", help="where run folders are (default: runs)"
    )


def main(args: argparse.Namespace, out: Out) -> int:
    """Write the folder, and say what is different there."""
    from plait.core.files import check_empty
    from plait.inference.load import find_model_folder, load

    check_empty(args.folder)
    folder = find_model_folder(args.model, args.runs)
    _say(f"loading {folder}")
    model = load(folder, say=_say)
    from plait.assembly.llava import export_llava
    from plait.assembly.multimodal import Multimodal

    if not isinstance(model, Multimodal):
        raise UsageError(
            "this is a folder of Hugging Face's already", place=str(folder), remedy="copy it, or name a model of Plait"
        )
    done = export_llava(model, args.folder)
    out.line(f"{done.folder}: {done.layout}, {done.weights:,} weights in {done.dtype}")
    out.line(f"a picture is {done.tokens_per_picture} tokens {done.image_token} (id {done.image_token_id})")
    for note in done.notes:
        out.line(f"note: {note}")
    out.result({**dataclasses.asdict(done), "notes": list(done.notes)})
    return 0


def _say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)
