"""Checkpoint folders that are whole or not there: written apart, sealed with a manifest, renamed, verified, rotated.

``checkpoints/000200/`` holds the model's files as the caller saves them, ``resume/`` (:mod:`plait.training.state`) and
``manifest.json`` with size and sha256 of every file. What is found partial or damaged is moved to
``checkpoints/quarantine/`` and said; only finished checkpoints that rotation replaced are ever deleted.
"""

from __future__ import annotations

import contextlib
import json
import re
import shutil
from collections.abc import Callable, Generator, Iterable, Mapping
from contextvars import ContextVar
from pathlib import Path
from typing import Any

from safetensors import SafetensorError

from plait.core.device import differences
from plait.core.errors import CheckpointError, ConfigError
from plait.core.events import Events
from plait.core.files import disk_error, folder_atomic, fsync_dir
from plait.core.manifest import verify, write_manifest
from plait.training.state import Origin, read_state

QUARANTINE = "quarantine"
_DELETED = re.compile(r"\.\d+\.deleted")
_PARTIAL = re.compile(r"\.\d+\.\d+\.(tmp|old)")  # as folder_atomic names them

DEFAULTS = "defaults"
"""Name in the recorded settings under which stands, by dotted path, what each is where nobody sets it."""

FREE_TO_CHANGE = frozenset(
    {"steps", "log_every", "save_every", "keep_last", "async_save", "max_skipped_in_row", "stopping.patience"}
)
"""Settings that may differ when a run is resumed: they do not change what a step computes.

``steps`` may bend the schedule; then that is said.
"""

_NEVER = frozenset({"optimizer.kind"})
"""Settings whose change nobody can accept: what was saved has no meaning under the new value."""

_accepted: ContextVar[frozenset[str]] = ContextVar("accepted", default=frozenset())


class Checkpoints:
    """The checkpoints of one stage.

    Args:
        folder: ``<stage>/checkpoints``; created.
        keep_last: How many finished ones to keep.
        events: Where to say what was saved, moved or deleted.

    Attributes:
        stay: Steps whose checkpoints stay in any case.

    Raises:
        ResourceError: The folder cannot be created.
    """

    def __init__(self, folder: Path, *, keep_last: int, events: Events) -> None:
        self.folder = folder
        self.keep_last = keep_last
        self.events = events
        self.stay: frozenset[int] = frozenset()
        try:
            folder.mkdir(parents=True, exist_ok=True)
            fsync_dir(folder.parent)
        except OSError as error:
            raise disk_error(error, folder) from error

    def path(self, step: int) -> Path:
        """Folder of one step, with zeros in front so that names sort."""
        return self.folder / f"{step:06d}"

    def save(self, step: int, write: Callable[[Path], None]) -> Path:
        """Let ``write`` fill a new checkpoint, seal and verify it, then delete what rotation no longer keeps.

        Raises:
            ResourceError: The disk is full or not writable; earlier checkpoints are untouched.
            CheckpointError: What was written does not read back; earlier checkpoints are untouched.
        """
        with self.writing(step) as temp:
            write(temp)
        return self.path(step)

    @contextlib.contextmanager
    def writing(self, step: int) -> Generator[Path]:
        """A folder to fill; when the block ends well it is sealed, renamed and verified, and older ones rotate.

        Raises:
            ResourceError: The disk is full or not writable; earlier checkpoints are untouched.
            CheckpointError: What was written does not read back; earlier checkpoints are untouched.
        """
        target = self.path(step)
        with folder_atomic(target) as temp:
            try:
                yield temp
            except SafetensorError as error:  # its Rust writer reports a full disk as its own type
                raise disk_error(OSError(str(error)), target) from error
            write_manifest(temp, step=step)
        verify(target)
        self._rotate()

    def newest(self) -> Path | None:
        """The newest checkpoint that verifies, or None where none was ever finished.

        Whatever is newer and partial or damaged is moved to quarantine and named in a warning.

        Raises:
            CheckpointError: There were finished checkpoints and none verifies.
        """
        for leftover in sorted(self.folder.iterdir()):
            if _DELETED.fullmatch(leftover.name):
                shutil.rmtree(leftover)  # rotation had decided; the process died on the way
            elif _PARTIAL.fullmatch(leftover.name):
                self._quarantine(leftover, "partial: the process ended while it was written")
        damaged: list[str] = []
        for folder in reversed(list_checkpoints(self.folder)):
            try:
                verify(folder)
            except CheckpointError as error:
                self._quarantine(folder, error.cause)
                damaged.append(f"{folder.name} ({error.cause})")
            else:
                return folder
        if damaged:
            raise CheckpointError(
                f"none of {len(damaged)} checkpoints is whole: {'; '.join(damaged)}",
                place=str(self.folder / QUARANTINE),
                remedy="put a good copy back into checkpoints/, or resume again to start this stage over",
            )
        return None

    def whole(self, step: int) -> Path | None:
        """The checkpoint of one step if it is there and verifies; a damaged one is moved to quarantine and named."""
        folder = self.path(step)
        if not folder.is_dir():
            return None
        try:
            verify(folder)
        except CheckpointError as error:
            self._quarantine(folder, error.cause)
            return None
        return folder

    def _rotate(self) -> None:
        for folder in list_checkpoints(self.folder)[: -self.keep_last]:
            if int(folder.name) in self.stay:
                continue
            doomed = folder.with_name(f".{folder.name}.deleted")
            try:
                # First out of sight in one stroke: half a deletion must not look like a damaged checkpoint.
                folder.rename(doomed)
                fsync_dir(self.folder)
                shutil.rmtree(doomed)
            except OSError as error:
                raise disk_error(error, folder) from error

    def _quarantine(self, folder: Path, reason: str) -> None:
        base = self.folder / QUARANTINE / folder.name.lstrip(".")
        target, number = base, 1
        while target.exists():
            number += 1
            target = base.with_name(f"{base.name}-{number}")
        try:
            target.parent.mkdir(exist_ok=True)
            folder.rename(target)
            fsync_dir(target.parent)
            fsync_dir(self.folder)
        except OSError as error:
            raise disk_error(error, folder) from error
        self.events.warning(
            f"checkpoint {folder.name} is {reason}; moved to {target}", checkpoint=folder.name, moved_to=str(target)
        )


def list_checkpoints(folder: Path) -> list[Path]:
    """Finished checkpoints, oldest first, unverified; names that are no step number are somebody else's."""
    if not folder.is_dir():
        return []
    return sorted((p for p in folder.iterdir() if p.is_dir() and p.name.isdigit()), key=lambda p: int(p.name))


# --- may this checkpoint be continued? -----------------------------------------------------------------------------


@contextlib.contextmanager
def accepting(keys: Iterable[str]) -> Generator[None]:
    """Within the block these settings may differ from those of a checkpoint: somebody saw the difference and agreed.

    Raises:
        ConfigError: One of them can never be accepted.
    """
    if never := sorted(_NEVER & set(keys)):
        raise ConfigError(
            f"a change of {never[0]} cannot be accepted: what was saved has no meaning under another one",
            place="--accept",
            remedy="put it back, or start a new run",
        )
    token = _accepted.set(frozenset(keys))
    try:
        yield
    finally:
        _accepted.reset(token)


def check_origin(checkpoint: Path, now: Origin, *, events: Events) -> None:
    """Compare the run that wrote a checkpoint with the one that wants to continue it.

    Says which free settings changed, and warns of others that were accepted and of another machine or libraries. A
    setting newer than the checkpoint is no change while it is at its default.

    Raises:
        ConfigError: Settings outside :data:`FREE_TO_CHANGE` changed that :func:`accepting` does not name; lists each
            with both values.
        CheckpointError: The weights that do not train are others.
    """
    record = read_state(checkpoint)
    changed = changed_settings(record["settings"], now.settings)
    refused = {key: line for key, line in changed.items() if not _free(key) and key not in _accepted.get()}
    if refused:
        consent = " ".join(f"--accept {key}" for key in refused)
        agree = "" if _NEVER & refused.keys() else f"go on all the same with `plait resume RUN {consent}`, "
        raise ConfigError(
            f"{len(refused)} settings are not those of the checkpoint: {'; '.join(refused.values())}",
            place=str(checkpoint),
            remedy=f"put them back, {agree}or start a new run (free to change: {', '.join(_free_of(now.settings))})",
        )
    for key, line in changed.items():
        if _free(key):
            events.note(f"setting changed since the checkpoint: {line}")
        else:
            events.warning(f"setting changed since the checkpoint, and accepted: {line}", accepted=key)
    if record["frozen_sha256"] != now.frozen:
        raise CheckpointError(
            f"the frozen weights are others: sha256 {now.frozen[:12]}…, {record['frozen_sha256'][:12]}… when saved",
            place=str(checkpoint),
            remedy="give the run the same base model and stage before it, or start a new run",
        )
    lines = differences(record["fingerprint"], now.fingerprint)
    if lines:
        events.warning(
            f"resumed elsewhere, so the result will not be bit-identical: {'; '.join(lines)}", differences=list(lines)
        )


def changed_settings(then: Mapping[str, Any], now: Mapping[str, Any]) -> dict[str, str]:
    """Dotted key → ``key: old -> new`` for every leaf that differs.

    Args:
        then: Settings of the checkpoint. What they lack is newer than it.
        now: Settings of the run, with their defaults under :data:`DEFAULTS`; newer ones at these are left out.
    """
    then, defaults = _without_defaults(then), now.get(DEFAULTS, {})
    old, new = _leaves(then), _leaves(_known(_without_defaults(now), then, defaults))
    keys = [*old, *(k for k in new if k not in old)]
    return {k: f"{k}: {_shown(old, k)} -> {_shown(new, k)}" for k in keys if _shown(old, k) != _shown(new, k)}


def _without_defaults(settings: Mapping[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in settings.items() if name != DEFAULTS}


def _known(
    now: Mapping[str, Any], then: Mapping[str, Any], defaults: Mapping[str, Any], *, prefix: str = ""
) -> dict[str, Any]:
    """``now`` without what ``then`` has not and nobody set."""
    found: dict[str, Any] = {}
    for name, value in now.items():
        path = f"{prefix}{name}"
        if name in then:
            inner = then[name]
            both = isinstance(value, Mapping) and isinstance(inner, Mapping)
            found[name] = _known(value, inner, defaults, prefix=f"{path}.") if both else value
        elif path not in defaults or _plain(defaults[path]) != _plain(value):
            found[name] = value
    return found


def _plain(value: Any) -> str:
    """As text in which a tuple is a list and the order of a mapping is nothing."""
    return json.dumps(value, ensure_ascii=False, default=str, sort_keys=True)


def _free(key: str) -> bool:
    head, _, rest = key.partition(".")
    return (rest if head == "context" else key) in FREE_TO_CHANGE


def _free_of(settings: Mapping[str, Any]) -> list[str]:
    """Names of settings that may change and are there; "steps" is none if some part of the run has steps of its own."""
    keys = _leaves(_without_defaults(settings))
    bound = {key.rpartition(".")[2] for key in keys if not _free(key)}
    return sorted({key.rpartition(".")[2] for key in keys if _free(key)} - bound)


def _leaves(value: Any, prefix: str = "") -> dict[str, Any]:
    if isinstance(value, Mapping) and value:
        return {
            k: leaf
            for key, inner in value.items()
            for k, leaf in _leaves(inner, f"{prefix}.{key}" if prefix else str(key)).items()
        }
    return {prefix: value}


def _shown(leaves: Mapping[str, Any], key: str) -> str:
    return json.dumps(leaves[key], ensure_ascii=False, default=str) if key in leaves else "not set"
