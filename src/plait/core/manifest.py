"""``manifest.json``: size and sha256 of every file of a folder, so that damage is seen before anything is read."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from plait.core.errors import CheckpointError, DataError
from plait.core.files import read_json, sha256_file, write_json

MANIFEST = "manifest.json"

RESUME = "resume"
"""Folder of a checkpoint that only going on with training reads."""


def write_manifest(folder: Path, *, step: int) -> None:
    """Seal a checkpoint: size and sha256 of every file.

    Args:
        folder: With nothing more to be written into it.
        step: After which it was taken.
    """
    files = sorted(p for p in folder.rglob("*") if p.is_file())
    listed = {p.relative_to(folder).as_posix(): {"size": p.stat().st_size, "sha256": sha256_file(p)} for p in files}
    write_json(folder / MANIFEST, {"step": step, "files": listed})


def verify(folder: Path) -> None:
    """Compare a checkpoint with its manifest: all sizes first, then all digests.

    Files that the manifest does not list are ignored.

    Raises:
        CheckpointError: A file is missing, cut or changed, or the manifest is; the cause names it.
    """
    _compare(folder, model=False, remedy="resume the run: it falls back to the newest whole checkpoint")


def verify_model(folder: Path) -> None:
    """Compare what a model is made of with the manifest of its folder, if there is one; ``resume/`` is not looked at.

    Raises:
        CheckpointError: As :func:`verify`.
    """
    if (folder / MANIFEST).is_file():
        _compare(
            folder,
            model=True,
            remedy="use an undamaged copy, or another checkpoint beside it (to make this one again, delete its stage's "
            f"folder and resume the run); if you changed the file yourself, take {MANIFEST} away",
        )


def _compare(folder: Path, *, model: bool, remedy: str) -> None:
    def fail(cause: str) -> CheckpointError:
        return CheckpointError(cause, place=str(folder), remedy=remedy)

    try:
        manifest: dict[str, Any] = read_json(folder / MANIFEST)
        step = int(manifest["step"])
        files = {str(n): (int(f["size"]), str(f["sha256"])) for n, f in manifest["files"].items()}
    except (DataError, KeyError, TypeError, ValueError, AttributeError) as error:
        raise fail(f"damaged: {MANIFEST} is missing or not readable") from error
    if not model and folder.name.isdigit() and step != int(folder.name):
        raise fail(f"damaged: its manifest is that of step {step}")
    if model:
        files = {name: known for name, known in files.items() if not name.startswith(f"{RESUME}/")}
    for name, (size, _) in files.items():
        path = folder / name
        found = path.stat().st_size if path.is_file() else None
        if found != size:
            raise fail(f"damaged: {name} " + ("is missing" if found is None else f"has {found:,} bytes of {size:,}"))
    for name, (_, sha256) in files.items():
        if (found := sha256_file(folder / name)) != sha256:
            raise fail(f"damaged: sha256 of {name} is {found[:12]}…, was {sha256[:12]}… when saved")
