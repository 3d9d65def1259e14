"""Model files on this machine: converted once, checked on every use, loaded without network or noise."""

from __future__ import annotations

import contextlib
import hashlib
import json
from collections.abc import Callable, Collection, Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from plait.core.errors import CheckpointError, ConfigError, PlaitError
from plait.core.events import Events
from plait.core.files import folder_atomic, read_json, sha256_file, write_json
from plait.core.packages import home, locate, package, sweep, verify

if TYPE_CHECKING:
    from torch import Tensor, nn

IMAGE_TOWER, TEXT_TOWER = "efficientnet-lite0", "minilm"
"""Names of the towers that packages carry; any other name is a folder."""
WHISPER = "whisper-tiny-en"
"""The audio tower that a package carries; any other name is a folder."""
SMOLLM2 = "smollm2"
"""The decoder that a package carries; any other name is a folder."""

_SEAL = "converted.json"
_NOT_OUTPUT = frozenset({"generation_config.json", _SEAL})


def converted(name: str, make: Callable[[Path, Path], None], *, version: int, events: Events) -> Path:
    """Folder of a package's weights in our form, made on first use under ``home()/converted``.

    It appears as a whole or not at all: a conversion that is killed leaves only a temporary folder, which the next one
    removes. A damaged folder is made anew, and an event says so. Of several processes, the first one makes it.

    Args:
        name: Of the package.
        make: Given the unpacked package and an empty folder, fills that folder.
        version: Of ``make``; another one makes the folder anew.
        events: Where to say what is done.

    Raises:
        ResourceError: The package is not fetched or damaged, or the disk is full.
    """
    from plait.core import mesh  # imports torch

    return mesh.first_then_others(lambda: _converted(name, make, version=version, events=events))


def _converted(name: str, make: Callable[[Path, Path], None], *, version: int, events: Events) -> Path:
    folder = home() / "converted" / name
    source = package(name).sha256
    if folder.is_dir():
        fault = _fault(folder, source, version)
        if not fault:
            return folder
        events.warning(f"{name}: converting again, because {fault}", place=str(folder))
    package_folder = verify(name)
    sweep(folder)
    events.note(f"converting {name} once ({package(name).mebibytes} MiB)", place=str(folder))
    with folder_atomic(folder) as target:
        make(package_folder, target)
        files = {p.relative_to(target).as_posix(): sha256_file(p) for p in sorted(target.rglob("*")) if p.is_file()}
        write_json(target / _SEAL, {"package": source, "version": version, "files": files})
    return folder


def find_tower(name: str, packaged: str) -> Path:
    """Folder of a tower: of its package, or the local Hugging Face folder that the name is. Opens no weights.

    Args:
        name: Of the tower.
        packaged: The one name that stands for a package.

    Raises:
        ConfigError: Neither that name nor a folder with a ``config.json``.
        ResourceError: The package is not fetched.
    """
    return _find(name, packaged, what="tower")


def find_audio_tower(name: str) -> Path:
    """Folder of an audio tower's package or of a local model; opens no weights.

    Raises:
        ConfigError: Neither the known name nor a folder with a ``config.json``.
        ResourceError: The package is not fetched.
    """
    return _find(name, WHISPER, what="audio tower")


def find_decoder(name: str) -> Path:
    """Folder of a decoder's package or of a local model; opens no weights.

    Raises:
        ConfigError: Neither the known name nor a folder with a ``config.json``.
        ResourceError: The package is not fetched.
    """
    return _find(name, SMOLLM2, what="decoder")


def _find(name: str, packaged: str, *, what: str) -> Path:
    if name == packaged:
        return locate(name)
    folder = Path(name)
    if not (folder / "config.json").is_file():
        raise ConfigError(
            f"no {what} called {name!r}: neither a known name nor a folder with a config.json",
            place=name,
            remedy=f"use {packaged!r}, or the path of a Hugging Face model folder on this disk",
        )
    return folder


def fingerprint(folder: Path) -> str:
    """Digest of everything in a model folder that decides its output: weights, configuration, tokenizer.

    How transformers would generate is no part of it: our engine does not read it, and transformers writes it
    differently from one version to the next, so that a model trained elsewhere would be refused here.

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
    kept = [path for path in files if path.name not in _NOT_OUTPUT]
    return digest({p.relative_to(folder).as_posix(): sha256_file(p) for p in kept})


def digest(value: object) -> str:
    """Hex digest of plain data."""
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()


def load_weights(module: nn.Module, path: Path, *, prefix: str = "", names: Collection[str] | None = None) -> None:
    """Put the tensors of a safetensors file into a module that has exactly these.

    Args:
        module: Where they go.
        path: The file.
        prefix: Take only those whose names begin so, and cut it off.
        names: Of the module's tensors, those that the file has; None: all of them.

    Raises:
        CheckpointError: The file is damaged, or of another shape; names a tensor with both shapes.
    """
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    try:
        loaded = load_file(path)
    except (OSError, SafetensorError) as error:
        raise CheckpointError(f"cannot be read: {error}", place=str(path), remedy="use an undamaged copy") from error
    weights = {name.removeprefix(prefix): value for name, value in loaded.items() if name.startswith(prefix)}
    put_weights(module, weights, path, names=names)


def put_weights(
    module: nn.Module, weights: Mapping[str, Tensor], path: Path, *, names: Collection[str] | None = None
) -> None:
    """Put tensors into a module that has exactly these.

    Args:
        module: Has them after this.
        weights: By the module's own names.
        path: Where they come from, for errors.
        names: Of the module's tensors, those that there must be; None: all of them.

    Raises:
        CheckpointError: They are others, or of another shape; names a tensor with both shapes.
    """
    wanted = {name: tuple(value.shape) for name, value in module.state_dict().items()}
    if names is not None:
        wanted = {name: shape for name, shape in wanted.items() if name in names}
    found = {name: tuple(value.shape) for name, value in weights.items()}
    if wanted != found:
        wrong = sorted(name for name in wanted.keys() | found.keys() if wanted.get(name) != found.get(name))
        raise CheckpointError(
            f"{len(wrong)} of {len(wanted)} tensors do not fit, such as {wrong[0]}: "
            f"expected {wanted.get(wrong[0])}, came {found.get(wrong[0])}",
            place=str(path),
            remedy="config.json and model.safetensors must come from the same checkpoint",
        )
    module.load_state_dict(dict(weights), strict=names is None)


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


@contextlib.contextmanager
def unreported() -> Iterator[None]:
    """Without transformers' table of weights that are missing or left over, where a caller looks at them one by one."""
    from transformers.utils import logging

    level = logging.get_verbosity()
    logging.set_verbosity_error()
    try:
        yield
    finally:
        logging.set_verbosity(level)


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
