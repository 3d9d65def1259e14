"""Tensors on their way to disk: written at once, or copied in host memory first and written while training goes on.

What saves a model calls :func:`save_tensors` and knows nothing of either way. Within :meth:`Snapshot.taking` tensors
are copied and nothing is written; :meth:`Snapshot.write` writes the copies later, in any thread, so that weights may
move meanwhile. Buffers are kept from one snapshot to the next: memory that the system has to find first is slow to
fill.
"""

# torch's annotations are partial: its members count as partially unknown.
# pyright: reportUnknownMemberType=false, reportUnknownVariableType=false

from __future__ import annotations

import contextlib
from collections.abc import Callable, Generator, Mapping
from contextvars import ContextVar
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor

_Form = tuple[torch.Size, torch.dtype, bool]
_Place = tuple[int, torch.Size, tuple[int, ...], torch.dtype, torch.device]


class Snapshot:
    """Copies of tensors in host memory, with what is to be done with them.

    A tensor that is saved under several names or in several files is copied once.

    Example:
        >>> import tempfile
        >>> from safetensors.torch import load_file
        >>> weight, snapshot = torch.zeros(2), Snapshot()
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     with snapshot.taking():
        ...         save_tensors({"weight": weight}, Path(folder) / "a.safetensors")
        ...     _ = weight.fill_(7)  # training goes on
        ...     snapshot.write()
        ...     load_file(Path(folder) / "a.safetensors")["weight"].tolist()
        [0.0, 0.0]
    """

    def __init__(self) -> None:
        self._writes: list[Callable[[], None]] = []
        self._buffers: dict[_Form, list[Tensor]] = {}
        self._free: dict[_Form, list[Tensor]] = {}
        self._copies: dict[_Place, Tensor] = {}
        self._sources: list[Tensor] = []  # held while copying: a freed tensor's address may be given to another

    @property
    def n_bytes(self) -> int:
        """Host memory that is held."""
        return sum(buffer.nbytes for buffers in self._buffers.values() for buffer in buffers)

    @contextlib.contextmanager
    def taking(self) -> Generator[None]:
        """Copy what is saved inside the block. What the snapshot before held is gone; it must have been written."""
        self._writes = []
        self._free = {form: list(buffers) for form, buffers in self._buffers.items()}
        token = _taking.set(self)
        try:
            yield
            if any(source.is_cuda for source in self._sources):
                torch.cuda.synchronize()
        finally:
            _taking.reset(token)
            self._sources.clear()
            self._copies.clear()
        for form, unused in self._free.items():  # a model that saves less now needs no room for more
            self._buffers[form] = [kept for kept in self._buffers[form] if all(kept is not one for one in unused)]
        self._free = {}

    def write(self) -> None:
        """Do what was put off, in its order.

        Raises:
            OSError: The disk is full or not writable.
            safetensors.SafetensorError: Likewise.
        """
        for work in self._writes:
            work()
        self._writes = []

    def copy(self, tensor: Tensor) -> Tensor:
        """A contiguous copy in host memory, valid until the next snapshot is taken."""
        place = (tensor.data_ptr(), tensor.shape, tensor.stride(), tensor.dtype, tensor.device)
        if place not in self._copies:
            self._sources.append(tensor)
            form = (tensor.shape, tensor.dtype, tensor.is_cuda)
            free = self._free.get(form)
            if free:
                buffer = free.pop()
            else:
                buffer = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=tensor.is_cuda)
                self._buffers.setdefault(form, []).append(buffer)
            buffer.copy_(tensor.detach(), non_blocking=tensor.is_cuda)
            if not tensor.numel():  # all of them stand at address 0
                return buffer
            self._copies[place] = buffer
        return self._copies[place]

    def put_off(self, work: Callable[[], None]) -> None:
        """Put something off until :meth:`write`."""
        self._writes.append(work)


_taking: ContextVar[Snapshot | None] = ContextVar("snapshot", default=None)


def later(work: Callable[[], None]) -> None:
    """Do something now; within a snapshot, when that is written. It must not read what training changes."""
    snapshot = _taking.get()
    if snapshot is None:
        work()
    else:
        snapshot.put_off(work)


def held(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Tensors that keep their values until what is put off is done: themselves, or within a snapshot its copies."""
    snapshot = _taking.get()
    return {name: tensor if snapshot is None else snapshot.copy(tensor) for name, tensor in tensors.items()}


def save_tensors(tensors: Mapping[str, Tensor], path: Path, *, metadata: Mapping[str, str] | None = None) -> None:
    """Write a safetensors file, from any device and memory layout; within a snapshot, when that is written.

    Raises:
        OSError: The disk is full or not writable.
        safetensors.SafetensorError: Likewise.
    """
    kept, extra = held(tensors), dict(metadata) if metadata is not None else None

    def write() -> None:
        save_file({name: tensor.detach().cpu().contiguous() for name, tensor in kept.items()}, path, metadata=extra)

    later(write)
