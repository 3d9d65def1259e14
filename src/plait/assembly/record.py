"""``plait.json``: what a model folder is made of, so that what was trained is what is loaded."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from plait.core.errors import CheckpointError, DataError
from plait.core.files import read_json, write_json

PLAIT = "plait.json"

FORMAT = 2
"""Version of the record; another one is refused."""


def write_record(folder: Path, *, kind: str, composition: dict[str, Any], media: dict[str, Any]) -> None:
    """Write the record.

    Args:
        folder: Of the model.
        kind: Such as ``multimodal``.
        composition: Which parts, each with the digest of its weights.
        media: What the model takes, by modality.

    Raises:
        OSError: The disk is full or not writable.
    """
    write_json(folder / PLAIT, {"format": FORMAT, "kind": kind, "composition": composition, "media": media})


def read_record(folder: Path, *, kind: str) -> dict[str, Any]:
    """Read what :func:`write_record` wrote.

    Raises:
        CheckpointError: It is missing, damaged, of another format or of another kind.
    """
    record = read_fields(folder / PLAIT)
    found, format_ = record.get("kind"), record.get("format")
    if found != kind or format_ != FORMAT:
        raise CheckpointError(
            f"kind {found!r}, format {format_}; expected {kind!r}, {FORMAT}",
            place=str(folder / PLAIT),
            remedy=f"give the folder of a {kind} checkpoint, or load it with the version of plait that wrote it",
        )
    return record


def same_key(what: str, found: str, wanted: object, *, folder: Path) -> None:
    """See that a part is the one that a folder was made with.

    Args:
        what: Such as ``image tower``.
        found: Digest of what is there.
        wanted: Digest that the record has.
        folder: Of the record.

    Raises:
        CheckpointError: It is another.
    """
    if found != wanted:
        raise CheckpointError(
            f"the {what} has digest {found[:12]}, this model was trained with {str(wanted)[:12]}",
            place=str(folder / PLAIT),
            remedy=f"fetch the version of the {what} that was used, or train again",
        )


def read_fields(path: Path) -> dict[str, Any]:
    """A JSON object of a model folder.

    Raises:
        CheckpointError: It is missing, damaged or no object.
    """
    if not path.is_file():
        raise CheckpointError(f"{path.name} is missing", place=str(path.parent), remedy="give a checkpoint folder")
    try:
        record = read_json(path)
    except DataError as error:
        raise CheckpointError(error.cause, place=str(path), remedy="use an undamaged copy of the folder") from error
    if not isinstance(record, dict):
        raise CheckpointError("not a JSON object", place=str(path), remedy="use an undamaged copy of the folder")
    return record
