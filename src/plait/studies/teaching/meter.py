"""What a step of the training loop holds, in a process of its own: ``python -m plait.studies.teaching.meter``.

The job comes as JSON on standard input, what was found goes to standard output. Counted are tensors: weights,
gradients, the optimizer's state, what autograd keeps. Measured is resident memory, above that of the same process
after another, tiny model has trained. Large blocks are asked to go back to the system as soon as they are free
(``MALLOC_MMAP_THRESHOLD_``), so that it follows what is alive.
"""

from __future__ import annotations

import ctypes
import gc
import json
import statistics
import sys
import tempfile
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim.optimizer import Optimizer, register_optimizer_step_post_hook

from plait.core.device import peak_rss, reset_peak, rss
from plait.core.errors import ResourceError
from plait.core.events import Events
from plait.core.tensors import Batch
from plait.studies.teaching.lessons import Lesson
from plait.studies.teaching.samples import Rounds, Samples
from plait.studies.teaching.students import Classify, Reader, tower
from plait.training.loop import fit
from plait.training.settings import Hooks

CLASSES = 8
FIRST = 2
"""Steps that are not counted: the first one counts what autograd keeps, and makes the optimizer's state."""
THRESHOLD = {"MALLOC_MMAP_THRESHOLD_": str(2**16), "OMP_NUM_THREADS": "1"}
"""Environment of the process."""


class Watched(Classify):
    """The objective, which looks at memory where each forward pass ends.

    Attributes:
        activations: Most bytes that autograd kept in one pass of the first step, weights left out.
        held: Most bytes of gradients that were there at the end of a forward pass.
        forward: Resident memory there, at most, after the first steps.
    """

    def __init__(self, model: nn.Module) -> None:
        self.own = {weight.untyped_storage().data_ptr() for weight in model.parameters()}
        self.weights = list(model.parameters())
        self.step = self.activations = self.held = self.forward = 0

    def __call__(self, model: nn.Module, batch: Batch) -> Mapping[str, Tensor]:
        """As the plain one."""
        if self.step:
            sums = super().__call__(model, batch)
            self.forward = max(self.forward, rss()) if self.step >= FIRST else 0
        else:
            kept: dict[int, int] = {}

            def pack(tensor: Tensor) -> Tensor:
                storage = tensor.untyped_storage()
                if storage.data_ptr() not in self.own:
                    kept[storage.data_ptr()] = storage.nbytes()
                return tensor

            with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
                sums = super().__call__(model, batch)
            self.activations = max(self.activations, sum(kept.values()))
        self.held = max(self.held, _bytes([w.grad for w in self.weights if w.grad is not None]))
        return sums


def reader(job: Mapping[str, Any], *, seed: int = 0) -> Reader:
    """The model."""
    torch.manual_seed(seed)
    side = job["size"] // job["patch"]
    sizes = {name: job[name] for name in ("d", "depth", "heads", "patch")}
    return Reader(tower(**sizes, side=side), CLASSES, of="picture")


def rounds(job: Mapping[str, Any]) -> Rounds:
    """A batch of noise, again and again."""
    generator = torch.Generator().manual_seed(0)
    shape = (job["batch"], job["size"], job["size"], 3)
    samples = Samples(
        pixels=torch.rand(shape, generator=generator),
        targets=torch.randint(CLASSES, (job["batch"], 1), generator=generator),
        words=torch.zeros(job["batch"], 1, dtype=torch.long),
    )
    return Rounds(samples=samples, batch=job["batch"], seed=0, micro=job["micro"])


def measure(job: Mapping[str, Any]) -> dict[str, float | int]:
    """Train a few steps.

    Args:
        job: ``d, depth, heads, patch, size, batch, micro, dtype, steps``.

    Returns:
        Bytes: counted ``parameters, gradients, state, activations`` (of a micro-batch) and ``held``; resident above
        the empty process ``built, between`` (two steps), ``forward`` and ``peak`` (medians of steps). And ``cpu_s`` of
        a step, the median, and ``counted`` steps.

    Raises:
        ResourceError: The system does not let a process begin its peak anew.
    """
    torch.set_num_threads(1)
    tiny = {**job, "d": 8, "depth": 1, "heads": 1, "size": job["patch"] * 2, "batch": 2, "micro": 1, "steps": 2}
    _train(reader(tiny), tiny)
    _settle()
    if not reset_peak():
        raise ResourceError(
            "the peak of a process cannot begin anew here",
            place="/proc/self/clear_refs",
            remedy="leave the part `memory` out, or run it on Linux",
        )
    empty = rss()
    model = reader(job)
    _settle()
    built = rss()
    watched, state, peaks, between, times = _train(model, job)
    return {
        "parameters": _bytes(list(model.parameters())),
        "gradients": _bytes(list(model.parameters())),
        "state": state,
        "activations": watched.activations,
        "held": watched.held,
        "built": built - empty,
        "between": statistics.median(between) - empty,
        "forward": watched.forward - empty,
        "peak": statistics.median(peaks) - empty,
        "cpu_s": statistics.median(times),
        "counted": len(times),
    }


def _train(model: Reader, job: Mapping[str, Any]) -> tuple[Watched, int, list[int], list[int], list[float]]:
    watched, states = Watched(model), list[int]()
    peaks, between, times = list[int](), list[int](), list[float]()
    began = time.process_time()

    def stepped(optimizer: Optimizer, *_: Any) -> None:
        if not states:
            states.append(_bytes([v for found in optimizer.state.values() for v in found.values() if v.numel() > 1]))

    def told(step: int, _: Mapping[str, Any]) -> None:
        nonlocal began
        watched.step = step
        if step > FIRST:
            peaks.append(peak_rss())
            times.append(time.process_time() - began)
        reset_peak()
        between.append(rss())
        began = time.process_time()

    hook = register_optimizer_step_post_hook(stepped)
    try:
        with tempfile.TemporaryDirectory(prefix="plait-study-") as folder:
            fit(
                model.train(),
                watched,
                rounds(job),
                settings=Lesson(steps=job["steps"], lr=1e-4, seed=0, dtype=job["dtype"]).settings(),
                folder=Path(folder),
                events=Events(),
                hooks=Hooks(on_step=told),
            )
    finally:
        hook.remove()
    return watched, states[0] if states else 0, peaks, between[FIRST - 1 :], times


def _bytes(tensors: list[Tensor]) -> int:
    return sum(tensor.untyped_storage().nbytes() for tensor in tensors)


def _settle() -> None:
    gc.collect()
    if sys.platform == "linux":
        ctypes.CDLL(None).malloc_trim(0)


if __name__ == "__main__":
    sys.stdout.write(json.dumps(measure(json.load(sys.stdin))))
