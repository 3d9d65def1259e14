"""Memory and time of steps, and whether micro-batches change the gradient."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Mapping
from typing import Any

import torch

from plait.core.errors import PlaitError
from plait.studies.teaching.lessons import Lesson
from plait.studies.teaching.meter import THRESHOLD, reader, rounds
from plait.studies.teaching.students import Classify
from plait.studies.training import Memory
from plait.training.held import compare, held

Kind = dict[str, Any]


def kinds(memory: Memory) -> list[Kind]:
    """All kinds of steps: micro-batches at each size in float32, other formats at the first size."""
    same = {name: getattr(memory, name) for name in ("d", "depth", "heads", "patch", "batch", "steps")}
    found = [
        {**same, "size": size, "micro": micro, "dtype": "float32"} for size in memory.sizes for micro in memory.micro
    ]
    whole = {"size": memory.sizes[0], "micro": memory.batch}
    return [*found, *({**same, **whole, "dtype": dtype} for dtype in memory.dtypes if dtype != "float32")]


def measured(kind: Kind) -> tuple[Kind, dict[str, float]]:
    """One process of a kind.

    Raises:
        PlaitError: It ended without a word.
    """
    done = subprocess.run(
        [sys.executable, "-m", "plait.studies.teaching.meter"],
        input=json.dumps(kind),
        capture_output=True,
        text=True,
        check=False,
        env={**os.environ, **THRESHOLD},
    )
    if done.returncode:
        last = (done.stderr.strip().splitlines() or [f"exit code {done.returncode}"])[-1]
        raise PlaitError(
            f"a step could not be measured: {last}",
            place=f"{kind['size']} pixels, micro-batches of {kind['micro']}, {kind['dtype']}",
            remedy="a smaller memory.batch or memory.d, or parts without `memory`",
        )
    return kind, {name: float(value) for name, value in json.loads(done.stdout).items()}


def expected_peak(one: Mapping[str, float]) -> float:
    """The sum of what is alive at once: weights and state, and the most of activations and gradients together.

    Activations stand beside the gradients of the micro-batches before; they go as the last gradients come.

    Example:
        >>> one = {"parameters": 10, "state": 20, "gradients": 10, "activations": 25, "held": 0}
        >>> expected_peak(one), expected_peak({**one, "held": 10}), expected_peak({**one, "activations": 5})
        (55, 65, 40)
    """
    return one["parameters"] + one["state"] + max(one["activations"] + one["held"], one["gradients"])


def gradient_gaps(memory: Memory) -> list[dict[str, Any]]:
    """Largest difference of a part's gradient from that of the whole batch, over its norm, in float64 and float32."""
    found: list[dict[str, Any]] = []
    for size in memory.sizes:
        for dtype in (torch.float64, torch.float32):
            kind = {**kinds(memory)[0], "size": size, "batch": memory.batch, "micro": memory.batch}
            model = reader(kind).train()
            settings = Lesson(steps=1, lr=1e-4, seed=0).settings()
            with held(model, Classify(), settings, dtype=dtype) as still:
                whole = still.gradient(rounds(kind).step_batches(0))
                for micro in memory.micro[1:]:
                    parts = still.gradient(rounds({**kind, "micro": micro}).step_batches(0))
                    gap = compare(whole.of, parts.of)
                    about = {"size": size, "micro": micro, "dtype": str(dtype).removeprefix("torch.")}
                    found.append({**about, "gap": gap.largest, "loss": abs(parts.sums.loss - whole.sums.loss)})
    return found
