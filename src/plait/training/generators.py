"""Random-number generators of the process: kept with a checkpoint, put back, left as they were."""

from __future__ import annotations

import contextlib
import random
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor


def rng_state() -> tuple[dict[str, Tensor], dict[str, Any]]:
    """States of Python's, NumPy's and torch's global generators, as tensors and plain scalars."""
    version, words, gauss = random.getstate()
    kind, keys, position, has_gauss, cached = np.random.get_state(legacy=True)
    tensors = {
        "python": torch.tensor(words, dtype=torch.int64),
        "numpy": torch.from_numpy(np.asarray(keys).astype(np.int64)),
        "torch.cpu": torch.get_rng_state(),
    }
    if torch.cuda.is_initialized():  # a run on the CPU must not wake the GPUs
        tensors |= {f"torch.cuda.{i}": state for i, state in enumerate(torch.cuda.get_rng_state_all())}
    return tensors, {"python": [version, gauss], "numpy": [kind, int(position), int(has_gauss), float(cached)]}


def set_rng_state(tensors: Mapping[str, Tensor], scalars: Mapping[str, Any]) -> None:
    """Put back what :func:`rng_state` returned; generators of GPUs that are not here are left out."""
    version, gauss = scalars["python"]
    random.setstate((version, tuple(tensors["python"].tolist()), gauss))
    kind, position, has_gauss, cached = scalars["numpy"]
    np.random.set_state((kind, tensors["numpy"].numpy().astype(np.uint32), position, has_gauss, cached))
    torch.set_rng_state(tensors["torch.cpu"])
    for i in range(torch.cuda.device_count()):
        if f"torch.cuda.{i}" in tensors:
            torch.cuda.set_rng_state(tensors[f"torch.cuda.{i}"], i)


def rng_restorer() -> Callable[[], None]:
    """Remember the generators, in some microseconds; returns what puts them back."""
    python, numpy_state, cpu = random.getstate(), np.random.get_state(legacy=True), torch.get_rng_state()
    cuda = torch.cuda.get_rng_state_all() if torch.cuda.is_initialized() else []

    def put_back() -> None:
        random.setstate(python)
        np.random.set_state(numpy_state)
        torch.set_rng_state(cpu)
        if cuda:
            torch.cuda.set_rng_state_all(cuda)

    return put_back


@contextlib.contextmanager
def rng_kept() -> Iterator[None]:
    """Leave the generators as they were, whatever the block draws."""
    put_back = rng_restorer()
    try:
        yield
    finally:
        put_back()
