"""One checkpoint of several processes: each writes its own pieces, one manifest seals all, any number of them reads it.

Pieces are safetensors files with their place in the whole tensor in the header, as PyTorch's distributed checkpoint
(:mod:`torch.distributed.checkpoint`) lays them out for Hugging Face; nothing is pickled on disk. Processes share one
file system. Tensors are plain (the same on every rank, written once) or ``DTensor`` of any placement.
"""

from __future__ import annotations

import contextlib
import warnings
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path

import torch
import torch.distributed.checkpoint as dcp
from safetensors import SafetensorError
from torch import Tensor
from torch.distributed.checkpoint import CheckpointException, HuggingFaceStorageReader, HuggingFaceStorageWriter
from torch.distributed.checkpoint.metadata import TensorStorageMetadata

from plait.core import mesh
from plait.core.errors import CheckpointError, PlaitError, ResourceError
from plait.core.files import disk_error
from plait.training.checkpoint import Checkpoints, verify
from plait.training.state import require_same

SHARDS = "shards"
"""Folder of the pieces inside a checkpoint."""


def save_together(
    checkpoints: Checkpoints, step: int, tensors: Mapping[str, Tensor], *, write: Callable[[Path], None]
) -> Path:
    """Save one checkpoint from all processes; every one of them calls this.

    It is written, sealed, renamed and verified as any other; a fault of one process is raised in all of them, and then
    there is no checkpoint.

    Args:
        checkpoints: Where it goes.
        step: Finished steps.
        tensors: Of this rank; what several have under one name is the same, or pieces of the same.
        write: Fills in what is no shard; called on rank 0 only, with the folder.

    Raises:
        ResourceError: The disk is full or not writable, in this process or another one.
        CheckpointError: What was written does not read back.
    """
    folder: Path | None = None
    with contextlib.ExitStack() as sealed:
        with mesh.agreed(checkpoints.path(step)):
            if mesh.rank() == 0:
                folder = sealed.enter_context(checkpoints.writing(step))
        folder = Path(mesh.gather(str(folder))[0])
        with mesh.agreed(checkpoints.path(step)):  # apart: who fails here would not be there for what follows
            (folder / SHARDS).mkdir(exist_ok=True)
        with mesh.agreed(checkpoints.path(step)):
            _write_pieces(folder / SHARDS, tensors)
            if mesh.rank() == 0:
                write(folder)
        with mesh.agreed(checkpoints.path(step)):
            sealed.close()
    return checkpoints.path(step)


def load_together(checkpoint: Path, into: Mapping[str, Tensor], *, partly: bool = False) -> None:
    """Read a checkpoint into tensors of any placement, in place, whatever number of processes wrote it.

    Every process calls this; rank 0 verifies the checkpoint before any tensor is touched.

    Args:
        checkpoint: Its folder.
        into: Filled; what is not there is an error.
        partly: The checkpoint may have more.

    Raises:
        CheckpointError: A piece is missing or damaged, or names, shapes or dtypes are others; nothing was changed then.
    """
    with mesh.agreed(checkpoint):
        if mesh.rank() == 0:
            verify(checkpoint)
    with mesh.agreed(checkpoint):
        saved = forms(checkpoint)
        _same_forms({n: f for n, f in saved.items() if n in into} if partly else saved, into, checkpoint)
    with mesh.agreed(checkpoint):
        _read(checkpoint, dict(into))


def read_whole(checkpoint: Path) -> dict[str, Tensor]:
    """All tensors of a checkpoint as they were before they were cut up, in one process: for an export.

    Raises:
        CheckpointError: A piece is missing or damaged.
    """
    verify(checkpoint)
    tensors = {name: torch.empty(m.size, dtype=m.properties.dtype) for name, m in forms(checkpoint).items()}
    _read(checkpoint, tensors)
    return tensors


def _write_pieces(folder: Path, tensors: Mapping[str, Tensor]) -> None:
    writer = HuggingFaceStorageWriter(path=str(folder), save_distributed=True)
    try:
        with _one_process():
            dcp.save(dict(tensors), storage_writer=writer, no_dist=not mesh.active())
    except CheckpointException as error:
        rank, (fault, _) = next(iter(error.failures.items()))
        if isinstance(fault, SafetensorError):
            fault = OSError(str(fault))
        if isinstance(fault, OSError) and not isinstance(fault, PlaitError):
            raise disk_error(fault, folder.parent) from error
        raise ResourceError(
            f"process {rank} of {mesh.world()} could not write its pieces: {fault}",
            place=str(folder),
            remedy="see what that process says, then resume all of them",
        ) from error


def forms(checkpoint: Path) -> dict[str, TensorStorageMetadata]:
    """Shape and dtype of every whole tensor.

    Raises:
        CheckpointError: A header cannot be read, or pieces do not make up a tensor.
    """
    try:
        found = HuggingFaceStorageReader(path=str(checkpoint / SHARDS)).read_metadata().state_dict_metadata
    except (OSError, SafetensorError, ValueError, KeyError) as error:
        raise CheckpointError(
            f"pieces cannot be read: {error}", place=str(checkpoint / SHARDS), remedy="use an undamaged checkpoint"
        ) from error
    forms: dict[str, TensorStorageMetadata] = {}
    for name, form in found.items():
        assert isinstance(form, TensorStorageMetadata)  # the format knows nothing else
        there = sum(chunk.sizes.numel() for chunk in form.chunks)
        if there != form.size.numel():
            raise CheckpointError(
                f"{name} of shape {list(form.size)} has {form.size.numel():,} elements, its pieces hold {there:,}",
                place=str(checkpoint / SHARDS),
                remedy="use an undamaged checkpoint",
            )
        forms[name] = form
    return forms


def _same_forms(saved: Mapping[str, TensorStorageMetadata], into: Mapping[str, Tensor], place: Path) -> None:
    then = {name: f"{str(m.properties.dtype).removeprefix('torch.')} {list(m.size)}" for name, m in saved.items()}
    now = {name: f"{str(t.dtype).removeprefix('torch.')} {list(t.shape)}" for name, t in into.items()}
    require_same(then, now, place=place)


def _read(checkpoint: Path, into: dict[str, Tensor]) -> None:
    reader = HuggingFaceStorageReader(path=str(checkpoint / SHARDS))
    try:
        with _one_process(), torch.no_grad():
            dcp.load(into, storage_reader=reader, no_dist=not mesh.active())
    except CheckpointException as error:
        rank, (fault, _) = next(iter(error.failures.items()))
        raise CheckpointError(
            f"process {rank} of {mesh.world()} could not read its pieces: {fault}",
            place=str(checkpoint / SHARDS),
            remedy="see that nothing else writes to the folder, then resume",
        ) from error


@contextlib.contextmanager
def _one_process() -> Iterator[None]:
    """Without the remark of torch that one process is one process."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="torch.distributed is disabled", category=UserWarning)
        yield
