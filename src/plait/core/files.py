"""Run folders and files that survive a power cut: temp → fsync → rename → fsync of the directory."""

from __future__ import annotations

import contextlib
import errno
import hashlib
import json
import os
import re
import shutil
import socket
from collections.abc import Generator, Iterable, Mapping
from pathlib import Path
from typing import Any

from plait.core.errors import DataError, ResourceError, UsageError

RUNS = Path("runs")
"""Where runs go unless told otherwise, relative to the working directory."""

_DISK_ERRORS = frozenset({errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EACCES, errno.EPERM, errno.EFBIG, errno.EIO})

_DONE = "done.json"
_LOCK = "run.lock"


# --- atomic writes -------------------------------------------------------------------------------------------------


def fsync_dir(folder: Path) -> None:
    """Make renames inside ``folder`` durable."""
    fd = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


def write_atomic(path: Path, content: str | bytes) -> None:
    """Replace ``path`` as a whole: a reader sees the old file or the new one, never a part.

    Raises:
        ResourceError: The disk is full or not writable; the old file is untouched.
    """
    data = content.encode() if isinstance(content, str) else content
    temp = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with temp.open("wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        temp.replace(path)
        fsync_dir(path.parent)
    except OSError as error:
        raise disk_error(error, path) from error
    finally:
        with contextlib.suppress(OSError):
            temp.unlink(missing_ok=True)


@contextlib.contextmanager
def folder_atomic(path: Path) -> Generator[Path]:
    """Fill a temporary folder that becomes ``path`` only if the block ends well.

    An existing ``path`` is replaced only after the new one is complete on disk.

    Raises:
        ResourceError: The disk is full or not writable; the old folder is untouched.
    """
    temp = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    shutil.rmtree(temp, ignore_errors=True)
    try:
        temp.mkdir(parents=True)
        yield temp
        _sync_tree(temp)
        if path.exists():
            old = path.with_name(f".{path.name}.{os.getpid()}.old")
            path.rename(old)
            temp.rename(path)
            shutil.rmtree(old)
        else:
            temp.rename(path)
        fsync_dir(path.parent)
    except OSError as error:
        # The block may read, too: only what a disk refuses is said to be the disk's fault.
        if error.errno in _DISK_ERRORS:
            raise disk_error(error, path) from error
        raise
    finally:
        shutil.rmtree(temp, ignore_errors=True)


def check_empty(folder: Path) -> None:
    """See that nothing would be overwritten.

    Raises:
        UsageError: Something is there.
    """
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise UsageError("the target is there and not empty", place=str(folder), remedy="name a new folder")


def _sync_tree(folder: Path) -> None:
    for file in folder.rglob("*"):
        if file.is_file():
            fd = os.open(file, os.O_RDONLY)
            try:
                os.fsync(fd)
            finally:
                os.close(fd)
        else:
            fsync_dir(file)
    fsync_dir(folder)


def disk_error(error: OSError, path: Path) -> ResourceError:
    """Turn an OSError into one that says how much room there is and what to do."""
    free = shutil.disk_usage(existing_parent(path)).free
    return ResourceError(
        f"cannot write: {error.strerror or error} ({free / 2**20:,.0f} MiB free)",
        place=str(path),
        remedy="free some disk space or choose another folder, then `plait resume` the run",
    )


def existing_parent(path: Path) -> Path:
    """The nearest folder on the way up that exists."""
    path = path.absolute()
    return next(p for p in (path, *path.parents) if p.is_dir())


# --- JSON and JSON Lines -------------------------------------------------------------------------------------------


def write_json(path: Path, value: Any) -> None:
    """Write pretty JSON atomically."""
    write_atomic(path, json.dumps(value, indent=2, ensure_ascii=False, default=str) + "\n")


def read_json(path: Path) -> Any:
    """Read JSON.

    Raises:
        DataError: The file is missing or not JSON.
    """
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise DataError("file not found", place=str(path), remedy="run the stage that writes it") from error
    except ValueError as error:
        raise DataError(
            f"not valid JSON: {error}", place=str(path), remedy="delete it and run the stage again"
        ) from error


def write_jsonl(path: Path, records: Iterable[Mapping[str, Any]]) -> None:
    """Write JSON Lines atomically."""
    write_atomic(path, "".join(json.dumps(r, ensure_ascii=False, default=str) + "\n" for r in records))


def read_jsonl(path: Path) -> list[dict[str, Any]]:
    """Read JSON Lines.

    Raises:
        DataError: A line is not JSON; names the line.
    """
    records: list[dict[str, Any]] = []
    with path.open(encoding="utf-8") as file:
        for number, line in enumerate(file, 1):
            try:
                records.append(json.loads(line))
            except ValueError as error:
                raise DataError(
                    f"not valid JSON: {error}", place=f"{path}:{number}", remedy="mend or remove the line"
                ) from error
    return records


def sha256_file(path: Path) -> str:
    """Hex digest of a file's bytes."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


# --- run and stage folders -----------------------------------------------------------------------------------------


def new_run(name: str, root: Path, *, contents: Mapping[str, str]) -> Path:
    """Create ``root/<name>-0001`` with the next free number and point ``root/latest`` at it.

    Args:
        name: Of the recipe.
        root: Where runs go; made if it is missing.
        contents: Files the folder is born with, so that no kill leaves a run without its recipe.

    Raises:
        ResourceError: The disk is full or not writable, or ``root`` is no folder.
    """
    temp = root / f".{name}.{os.getpid()}.tmp"
    try:
        root.mkdir(parents=True, exist_ok=True)
        shutil.rmtree(temp, ignore_errors=True)
        temp.mkdir()
        for file, content in contents.items():
            write_atomic(temp / file, content)
        taken = [int(m[1]) for p in root.iterdir() if (m := re.fullmatch(re.escape(name) + r"-(\d{4,})", p.name))]
        folder = _rename_to_free(temp, root, name, number=max(taken, default=0) + 1)
        fsync_dir(root)
        point_latest(folder)
    except OSError as error:
        raise disk_error(error, root) from error
    finally:
        shutil.rmtree(temp, ignore_errors=True)
    return folder


def _rename_to_free(temp: Path, root: Path, name: str, *, number: int) -> Path:
    """Take the first free number; another process may be taking the same one, and only one rename succeeds."""
    while True:
        folder = root / f"{name}-{number:04d}"
        try:
            temp.rename(folder)
        except OSError as error:
            if error.errno not in (errno.ENOTEMPTY, errno.EEXIST):
                raise
            number += 1
        else:
            return folder


def point_latest(folder: Path) -> None:
    """Make ``runs/latest`` a link to ``folder``, atomically.

    Raises:
        ResourceError: The disk is full or not writable.
    """
    link = folder.parent / "latest"
    temp = folder.parent / f".latest.{os.getpid()}"
    try:
        temp.unlink(missing_ok=True)
        temp.symlink_to(folder.name)
        temp.replace(link)
    except OSError as error:
        raise disk_error(error, link) from error


def find_run(name: str, root: Path = RUNS) -> Path:
    """Resolve ``runs/latest``, ``latest``, ``quickstart-0007`` or any path to a run folder.

    Raises:
        UsageError: No such run; lists the newest ones.
    """
    for candidate in (Path(name), root / name):
        if (candidate / "recipe.yaml").is_file():
            return candidate.resolve()
    found = [p.parent for p in root.glob("*/recipe.yaml") if not p.parent.is_symlink()]
    known = [p.name for p in sorted(found, key=lambda p: p.stat().st_mtime, reverse=True)[:5]]
    raise UsageError(
        f"no run called {name!r}",
        place=str(root.absolute()),
        remedy=f"choose one of: {', '.join(known)}" if known else "start one with `plait run quickstart`",
    )


def stage_folder(run: Path, number: int, name: str) -> Path:
    """``run/01-data``."""
    return run / f"{number:02d}-{name}"


def mark_done(folder: Path, *, kind: str, previous: Path | None, summary: Mapping[str, Any]) -> None:
    """Seal a stage folder: from now on it is complete and `resume` skips it.

    ``summary`` is what the report and the closing lines show; it must be plain data.
    """
    back = os.path.relpath(previous, folder) if previous is not None else None
    made_from = seal(previous) if previous is not None else None
    write_json(folder / _DONE, {"kind": kind, "previous": back, "made_from": made_from, "summary": dict(summary)})


def seal(folder: Path) -> str:
    """Digest of a finished stage's seal: changes when what the stage made changes.

    Raises:
        DataError: The stage is not finished.
    """
    if not (folder / _DONE).is_file():
        raise DataError("the stage is not finished", place=str(folder), remedy="finish it with `plait resume`")
    return sha256_file(folder / _DONE)


def read_done(folder: Path) -> dict[str, Any] | None:
    """The seal written by :func:`mark_done`, or None while the stage is not finished."""
    path = folder / _DONE
    return read_json(path) if path.is_file() else None


def _back(folder: Path | None) -> Generator[tuple[Path, dict[str, Any]]]:
    """A finished stage's folder with its seal, then those of the stages before it, newest first."""
    while folder is not None and (done := read_done(folder)) is not None:
        yield folder, done
        folder = (folder / done["previous"]).resolve() if done["previous"] else None


def find_stage(folder: Path | None, kind: str) -> Path:
    """Walk back from a finished stage folder to the nearest one of ``kind``.

    Raises:
        DataError: There is none on the way.
    """
    for at, done in _back(folder):
        if done["kind"] == kind:
            return at
    raise DataError(
        f"no finished {kind!r} stage before this one",
        place=str(folder),
        remedy=f"put a {kind!r} stage earlier in the recipe, or finish it with `plait resume`",
    )


def find_model(folder: Path | None) -> Path:
    """Walk back from a finished stage folder to the nearest one that made a multimodal model, and give its folder.

    Such a stage names it, relative to its own folder, as ``model`` in the summary of its seal.

    Raises:
        DataError: There is none on the way.
    """
    for at, done in _back(folder):
        if model := done["summary"].get("model"):
            return at / str(model)
    raise DataError(
        "no finished stage before this one made a multimodal model",
        place=str(folder),
        remedy="put a 'tune' stage earlier in the recipe, or finish it with `plait resume`",
    )


@contextlib.contextmanager
def lock(run: Path) -> Generator[None]:
    """Hold a run folder for this process.

    Raises:
        UsageError: Another living process on this machine holds it.
    """
    import fcntl

    path = run / _LOCK
    with path.open("a+") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            file.seek(0)
            raise UsageError(
                f"the run is in use by {file.read().strip() or 'another process'}",
                place=str(run),
                remedy="wait for it or stop that process",
            ) from error
        file.truncate(0)
        file.write(f"process {os.getpid()} on {socket.gethostname()}\n")
        file.flush()
        yield
