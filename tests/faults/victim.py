"""What ``test_kill.py`` kills: ``python victim.py FOLDER`` makes every attempt and prints how each ended, as JSON.

torch is imported once and a process is forked for each attempt, before any torch operation, so that a fork is as good
as a fresh process and starts in milliseconds.
"""

from __future__ import annotations

import importlib
import json
import os
import random
import signal
import sys
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import save_file
from torch import nn

import plait.core.snapshot as snapshot
import plait.training.checkpoint as checkpoint
import plait.training.interrupt as interrupt
import plait.training.loop as loop
from plait.core.device import Compute
from plait.core.errors import Stopped
from plait.core.events import Event, Events
from plait.core.snapshot import later, save_tensors
from plait.core.tensors import IGNORE, Batch
from plait.training.loop import fit
from plait.training.monitor import Monitor
from plait.training.optim import AdamW, Rates
from plait.training.schedule import Cosine
from plait.training.settings import Hooks, Settings

# --- a small training run ------------------------------------------------------------------------------------------


class Model(nn.Module):
    """With dropout, which draws random numbers, and batch norm, which has state that is no weight."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(7)
        self.embed = nn.Embedding(17, 12)
        self.norm = nn.BatchNorm1d(12)
        self.drop = nn.Dropout(0.3)
        self.head = nn.Linear(12, 17)

    def forward(self, token_ids: torch.Tensor) -> torch.Tensor:
        return self.head(self.drop(torch.tanh(self.norm(self.embed(token_ids).flatten(0, 1)))))


class Noisy:
    """Cross-entropy with noise from Python's and NumPy's generators; both keep half a pair of normal numbers back."""

    needs_global_batch = False

    def __init__(self, hold: Callable[[], None]) -> None:
        self.hold = hold

    def count(self, batch: Batch) -> dict[str, torch.Tensor]:
        return {"text": (batch.labels != IGNORE).sum()}

    def __call__(self, model: nn.Module, batch: Batch) -> dict[str, torch.Tensor]:
        if batch.sample_ids[0] == "3-2-0":
            self.hold()
        scale = 1 + 0.1 * random.gauss(0, 1) + 0.1 * np.random.randn()
        logits = model(batch.token_ids)
        return {
            "text": scale
            * nn.functional.cross_entropy(logits, batch.labels.flatten(), ignore_index=IGNORE, reduction="sum")
        }


class Stream:
    """Two micro-batches a step with unequal counts."""

    def __init__(self, hold: Callable[[], None]) -> None:
        self.hold = hold

    def step_batches(self, step: int) -> list[Batch]:
        if step == 3:
            self.hold()
        generator = torch.Generator().manual_seed(step)
        return [self.batch(step, size, generator) for size in (3, 2)]

    def batch(self, step: int, size: int, generator: torch.Generator) -> Batch:
        token_ids = torch.randint(17, (size, 4), generator=generator)
        labels = token_ids.roll(1, dims=1)
        labels[0, : 1 + step % 3] = IGNORE
        ids = tuple(f"{step}-{size}-{i}" for i in range(size))
        ones = torch.ones_like(labels)
        return Batch(token_ids=token_ids, labels=labels, segment_ids=ones, media={}, item_row={}, sample_ids=ids)


def train(
    folder: Path,
    *,
    steps: int = 8,
    save_every: int = 2,
    on_event: Callable[[Event], None] | None = None,
    save_model: Callable[[nn.Module, Path], None] = lambda model, path: save_tensors(model.state_dict(), path),
    hold_data: Callable[[], None] = lambda: None,
    hold_step: Callable[[], None] = lambda: None,
    hold_hook: Callable[[], None] = lambda: None,
    hold_save: Callable[[], None] = lambda: None,
    beside: bool = False,
) -> int:
    """Returns the step it resumed from, or 130 or 143 when it was stopped."""
    torch.set_num_threads(1)
    model = Model()
    settings = Settings(
        steps=steps,
        compute=Compute(device="cpu", dtype="float32", threads=1, why=()),
        seed=11,
        rates=Rates(lr=0.05),
        optimizer=AdamW(weight_decay=0.01),
        schedule=Cosine(warmup=2),
        save_every=save_every,
        keep_last=1,
        async_save=beside,
    )

    def save(temp: Path) -> None:
        if temp.name.startswith(".000004"):
            later(hold_save)
        save_model(model, temp / "model.safetensors")

    def evaluate(step: int, _: object) -> None:
        torch.rand(3)
        if step == 3:
            hold_hook()
        with (folder / "told").open("a") as file:
            file.write(f"{step}\n")

    hooks = Hooks(save_model=save, on_step=evaluate)
    events = Events(listeners=(on_event,) if on_event else ())
    try:
        return fit(
            model, Noisy(hold_step), Stream(hold_data), settings=settings, folder=folder, events=events, hooks=hooks
        ).resumed_from
    except Stopped as stopped:
        print(stopped, file=sys.stderr)
        return stopped.exit_code


# --- where it dies -------------------------------------------------------------------------------------------------


def die(*_: object, **__: object) -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def die_before(
    owner: Any, name: str, when: Callable[..., bool], *, half: Callable[..., object] = die
) -> dict[str, Any]:
    """Patch ``owner.name`` so that this process dies instead of calling it once ``when`` says so."""
    original = getattr(owner, name)

    def patched(*args: Any, **named: Any) -> Any:
        if when(*args, **named):
            half(*args, **named)
            die()
        return original(*args, **named)

    setattr(owner, name, patched)
    return {}


def call(number: int) -> Callable[..., bool]:
    """True at the call of that number."""
    left = iter(range(number - 1, -1, -1))
    return lambda *_, **__: next(left, 1) == 0


def half_a_tensor_file(tensors: dict[str, torch.Tensor], path: Path, metadata: dict[str, str] | None = None) -> None:
    save_file(tensors, path)
    os.truncate(path, path.stat().st_size // 2)


def half_a_line(monitor: Monitor, line: str) -> None:
    with (monitor.folder / "metrics.jsonl").open("a") as file:
        file.write(line[: len(line) // 2])


def half_a_model(model: nn.Module, path: Path) -> None:
    save = half_a_tensor_file if path.parent.name.startswith(".000006") else save_file
    save(model.state_dict(), path)
    if save is half_a_tensor_file:
        die()


BESIDE = {"beside": True}

# Name -> what to do in the process that is to die; returns arguments for `train`. A checkpoint has four tensor files,
# the model's last, a step two micro-batches.
POINTS: dict[str, Callable[[], dict[str, Any]]] = {
    "in the first step": lambda: die_before(loop, "accumulate", call(1)),
    "between two micro-batches": lambda: die_before(torch.Tensor, "backward", call(10)),
    "after the update, before its record": lambda: die_before(Monitor, "step", lambda _, step, *__: step == 5),
    "half a line of metrics written": lambda: die_before(
        Monitor, "_append", lambda _, line: '"step": 5,' in line, half=half_a_line
    ),
    "half of the first checkpoint written": lambda: die_before(snapshot, "save_file", call(2)),
    "half a tensor file written": lambda: die_before(snapshot, "save_file", call(10), half=half_a_tensor_file),
    "half of the model's file written": lambda: {"save_model": half_a_model},
    "sealed, not renamed": lambda: die_before(
        checkpoint, "write_manifest", lambda _, step: step == 6, half=checkpoint.write_manifest
    ),
    "renamed, not verified": lambda: die_before(checkpoint, "verify", lambda folder: folder.name == "000006"),
    "half of the old checkpoint deleted": lambda: die_before(
        checkpoint.shutil,
        "rmtree",
        lambda folder, *_, **__: Path(folder).name == ".000004.deleted",
        half=lambda folder: (folder / "manifest.json").unlink(),
    ),
    "right after a checkpoint": lambda: {"on_event": lambda e: die() if "checkpoint 000006 saved" in e.text else None},
    "after the last checkpoint, before results.csv": lambda: die_before(Monitor, "results", lambda _: True),
    "beside training, half a tensor file written": lambda: (
        die_before(snapshot, "save_file", call(10), half=half_a_tensor_file) | BESIDE
    ),
    "beside training, sealed, not renamed": lambda: (
        die_before(checkpoint, "write_manifest", lambda _, step: step == 6, half=checkpoint.write_manifest) | BESIDE
    ),
    "beside training, renamed, not verified": lambda: (
        die_before(checkpoint, "verify", lambda folder: folder.name == "000006") | BESIDE
    ),
}


# --- attempts ------------------------------------------------------------------------------------------------------


def forked(work: Callable[[], int], meanwhile: Callable[[int], None] = lambda pid: None) -> str:
    """Run ``work`` in a forked process, whose id ``meanwhile`` is told; says ``killed`` or ``exit N``."""
    pid = os.fork()
    if pid == 0:
        try:
            code = work()
        except BaseException:
            traceback.print_exc()
            code = 99
        os._exit(code)
    meanwhile(pid)
    _, status = os.waitpid(pid, 0)
    return "killed" if os.WIFSIGNALED(status) else f"exit {os.WEXITSTATUS(status)}"


def signalled(
    folder: Path, *numbers: int, hold: str, held_s: float = 20.0, grace_s: float = 0.5, beside: bool = False
) -> tuple[str, float]:
    """A run that gets signals while its fourth step is held up; and how long it lived after the last."""
    sent = [0.0]
    held = folder.with_suffix(".held")

    def wait() -> None:
        held.touch()
        time.sleep(held_s)

    def work() -> int:
        interrupt.GRACE_S = grace_s
        return train(folder, beside=beside, **{hold: wait})

    def send(pid: int) -> None:
        while not held.exists():
            time.sleep(0.01)
        for number in numbers:
            time.sleep(0.3)
            os.kill(pid, number)
            sent[0] = time.monotonic()

    ended = forked(work, send)
    return ended, time.monotonic() - sent[0]


# Name -> signal and what is going on when it comes.
PHASES: dict[str, tuple[int, dict[str, Any]]] = {
    "waiting for data": (signal.SIGINT, {"hold": "hold_data"}),
    "waiting for data, SIGTERM": (signal.SIGTERM, {"hold": "hold_data"}),
    "in a step": (signal.SIGTERM, {"hold": "hold_step"}),
    "in the hook": (signal.SIGTERM, {"hold": "hold_hook"}),
    "while saving": (signal.SIGTERM, {"hold": "hold_save", "held_s": 1.0}),
    "while saving beside training": (signal.SIGTERM, {"hold": "hold_save", "held_s": 1.0, "beside": True}),
}


def storm(root: Path, *, steps: int = 24, kills: int = 20) -> dict[str, int | str]:
    """Kill at random moments, over and over in one folder, then let it finish; every other one saves beside."""
    begun = time.monotonic()
    forked(lambda: train(root / "storm whole", steps=steps, save_every=1))
    length = time.monotonic() - begun
    chance = random.Random(1)
    hit = 0
    for attempt in range(10 * kills):
        delay = chance.uniform(0.0, 0.2 * length) if hit < kills else None

        def kill(pid: int, delay: float | None = delay) -> None:
            if delay is not None:
                time.sleep(delay)
                os.kill(pid, signal.SIGKILL)

        beside = attempt % 2 == 1
        ended = forked(lambda beside=beside: train(root / "storm", steps=steps, save_every=1, beside=beside), kill)
        if ended != "killed":
            return {"kills": hit, "ended": ended}
        hit += 1
    return {"kills": hit, "ended": "never"}


def reseeded(folder: Path, numpy_seed: int, torch_seed: int) -> str:
    """The same run from other seeds of two of the generators."""

    def work() -> int:
        loop.seed_everything = lambda _: (random.seed(1), np.random.seed(numpy_seed), torch.manual_seed(torch_seed))
        return train(folder)

    return forked(work)


def main(root: Path) -> dict[str, Any]:
    importlib.import_module("torch._dynamo")  # every optimizer does; three seconds that the forks need not spend again
    outcome: dict[str, Any] = {"whole": forked(lambda: train(root / "whole"))}
    for point, arm in POINTS.items():
        killed = forked(lambda point=point, arm=arm: train(root / point, **arm()))
        outcome[point] = [killed, forked(lambda point=point: train(root / point))]
    for name, (number, how) in PHASES.items():
        outcome[name] = signalled(root / name, number, **how)
        outcome[name + " saved"] = sorted(p.name for p in (root / name / "checkpoints").iterdir())
        outcome[name + " resumed"] = forked(lambda name=name: train(root / name))
    outcome["twice"] = signalled(root / "twice", signal.SIGINT, signal.SIGINT, hold="hold_step", grace_s=20.0)
    outcome["storm"] = storm(root)
    outcome["reseeded"] = [
        reseeded(root / name, *seeds) for name, seeds in {"a": (1, 1), "b": (2, 1), "c": (1, 2)}.items()
    ]
    return outcome


if __name__ == "__main__":
    print(json.dumps(main(Path(sys.argv[1]))))
