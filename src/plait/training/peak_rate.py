"""What the device can do at most, measured once a run: the rate of large matrix products, which MFU is a share of."""

from __future__ import annotations

import contextlib
import contextvars
import functools
from collections.abc import Generator
from pathlib import Path
from typing import Any

from plait.core.device import Compute
from plait.core.errors import PlaitError
from plait.core.events import Events
from plait.core.files import read_json, write_json

RATES = "rates.json"
"""In the run folder: FLOP/s of matrix products by device, number format and threads."""

_KEPT: contextvars.ContextVar[dict[str, float] | None] = contextvars.ContextVar("rates", default=None)
_FILE: contextvars.ContextVar[Path | None] = contextvars.ContextVar("rates file", default=None)


@contextlib.contextmanager
def keeping_rates(run: Path) -> Generator[None]:
    """In the block what is measured is kept in a run's folder, and taken from there."""
    file = run / RATES
    tokens = _KEPT.set(_read(file)), _FILE.set(file)
    try:
        yield
    finally:
        _KEPT.reset(tokens[0])
        _FILE.reset(tokens[1])


def peak_rate(compute: Compute, *, events: Events) -> float:
    """FLOP/s of matrix products in a number format with the threads of a run; about 0.6 s where it is not known yet.

    Every run has a measurement of its own machine at its own time, and goes on with it when it is resumed; another
    device, format or number of threads is measured anew.
    """
    from plait.core.speed import gemm_peak

    known, file = _KEPT.get(), _FILE.get()
    known = _without_run() if known is None else known
    name = f"{_device(compute)}, {compute.dtype}, {compute.threads} threads"
    if name not in known:
        known[name] = gemm_peak(compute.dtype, device=compute.device)
        events.note(
            f"matrix products: {known[name] / 1e9:,.0f} GFLOP/s ({name}), which MFU is a share of", rate=known[name]
        )
        if file is not None:
            write_json(file, known)
    return known[name]


@functools.cache
def _without_run() -> dict[str, float]:
    """What this process has measured where there is no run."""
    return {}


def _read(file: Path) -> dict[str, float]:
    try:
        found: Any = read_json(file) if file.is_file() else {}
    except PlaitError:  # measured again
        return {}
    return {str(k): float(v) for k, v in found.items() if isinstance(v, int | float)} if isinstance(found, dict) else {}


def _device(compute: Compute) -> str:
    if compute.device != "cuda":
        return compute.device
    import torch

    return torch.cuda.get_device_name()
