"""Model files on this machine: converted once, checked on every use, loaded without network or noise."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import re
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

from plait.core.errors import CheckpointError, PlaitError
from plait.core.events import Events
from plait.core.files import folder_atomic, read_json, sha256_file, write_json
from plait.core.packages import home, package, verify

_SEAL = "converted.json"


def converted(name: str, make: Callable[[Path, Path], None], *, version: int, events: Events) -> Path:
    """Folder of a package's weights in our form, made on first use under ``home()/converted``.

    It appears as a whole or not at all: a conversion that is killed leaves only a temporary folder, which the next one
    removes. A damaged folder is made anew, and an event says so.

    Args:
        name: Of the package.
        make: Given the unpacked package and an empty folder, fills that folder.
        version: Of ``make``; another one makes the folder anew.
        events: Where to say what is done.

    Raises:
        ResourceError: The package is not fetched or damaged, or the disk is full.
    """
    folder = home() / "converted" / name
    source = package(name).sha256
    if folder.is_dir():
        fault = _fault(folder, source, version)
        if not fault:
            return folder
        events.warning(f"{name}: converting again, because {fault}", place=str(folder))
    package_folder = verify(name)
    _sweep(folder)
    events.note(f"converting {name} once ({package(name).mebibytes} MiB)", place=str(folder))
    with folder_atomic(folder) as target:
        make(package_folder, target)
        files = {p.relative_to(target).as_posix(): sha256_file(p) for p in sorted(target.rglob("*")) if p.is_file()}
        write_json(target / _SEAL, {"package": source, "version": version, "files": files})
    return folder


def fingerprint(folder: Path) -> str:
    """Digest of everything in a model folder that decides its output: weights, configuration, tokenizer.

    Raises:
        CheckpointError: There are no safetensors weights.
    """
    files = sorted(p for p in folder.rglob("*") if p.suffix in (".safetensors", ".json", ".txt", ".model", ".jinja"))
    if not any(p.suffix == ".safetensors" for p in files):
        raise CheckpointError(
            "no safetensors weights; pickled ones are not opened",
            place=str(folder),
            remedy="convert the model with save_pretrained(folder), which writes safetensors",
        )
    return digest({p.relative_to(folder).as_posix(): sha256_file(p) for p in files})


def digest(value: object) -> str:
    """Hex digest of plain data."""
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Without the progress bars that transformers draws for every file it loads, in this block only."""
    from transformers.utils import logging

    shown = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        if shown:
            logging.enable_progress_bar()


def _fault(folder: Path, source: str, version: int) -> str:
    """Why a converted folder cannot be used; empty if it can."""
    try:
        seal = read_json(folder / _SEAL)
    except PlaitError as error:
        return str(error)
    if (seal["package"], seal["version"]) != (source, version):
        return "it was made from another package version or by another converter"
    for name, wanted in seal["files"].items():
        path = folder / name
        if not path.is_file() or sha256_file(path) != wanted:
            return f"{name} is {'damaged' if path.is_file() else 'missing'}"
    return ""


def _sweep(folder: Path) -> None:
    """Remove what killed conversions left behind; those of living processes stay."""
    for path in folder.parent.glob(f".{folder.name}.*"):
        match = re.fullmatch(r"(\d+)\.(tmp|old)", path.name.removeprefix(f".{folder.name}."))
        if match and not _alive(int(match[1])):
            shutil.rmtree(path, ignore_errors=True)


def _alive(process: int) -> bool:
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    return True
