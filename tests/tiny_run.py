"""A training run of milliseconds, for tests that damage, stop or continue one."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn

from plait.core.device import Compute
from plait.core.events import Events
from plait.core.snapshot import save_tensors
from plait.core.tensors import IGNORE, Batch
from plait.data.order import Order
from plait.training.loop import fit
from plait.training.optim import Rates
from plait.training.settings import Batches, FitResult, Hooks, Settings

CPU = Compute(device="cpu", dtype="float32", threads=torch.get_num_threads(), why=())
VOCABULARY = 5


class Counted:
    """Cross-entropy as sums and counts."""

    needs_global_batch = False

    def count(self, batch: Batch) -> dict[str, torch.Tensor]:
        return {"text": (batch.labels != IGNORE).sum()}

    def __call__(self, model: nn.Module, batch: Batch) -> dict[str, torch.Tensor]:
        logits = model(nn.functional.one_hot(batch.token_ids, VOCABULARY).float())
        return {"text": nn.functional.cross_entropy(logits.flatten(0, 1), batch.labels.flatten(), reduction="sum")}


def rows(token_ids: torch.Tensor, *ids: str) -> Batch:
    """Rows whose labels are themselves, turned round."""
    ones = torch.ones_like(token_ids)
    return Batch(token_ids=token_ids, labels=token_ids.flip(1), segment_ids=ones, media={}, item_row={}, sample_ids=ids)


class Stream:
    """Two new rows a step."""

    def step_batches(self, step: int) -> list[Batch]:
        token_ids = torch.randint(VOCABULARY, (2, 3), generator=torch.Generator().manual_seed(step))
        return [rows(token_ids, f"{step}-0", f"{step}-1")]


class Epochs:
    """Six samples in an order of their own each epoch, three a step in two micro-batches: an epoch ends every second
    step."""

    def __init__(self) -> None:
        self.order = Order(number=6, batch_size=3, seed=3)
        self.samples = torch.randint(VOCABULARY, (6, 3), generator=torch.Generator().manual_seed(9))

    def step_batches(self, step: int) -> list[Batch]:
        items = self.order.batch(step).tolist()
        return [rows(self.samples[part], *(f"s{i}" for i in part)) for part in (items[:2], items[2:])]


def tiny_model() -> nn.Module:
    torch.manual_seed(1)
    return nn.Sequential(nn.Linear(VOCABULARY, 8), nn.Dropout(0.2), nn.Linear(8, VOCABULARY))


def train(
    folder: Path,
    *,
    model: nn.Module | None = None,
    batches: Batches | None = None,
    objective: Any = None,
    steps: int = 6,
    seen: list[Any] | None = None,
    save_model: Callable[[Path], None] | None = None,
    on_step: Callable[[int, Mapping[str, Any]], None] | None = None,
    evaluate: Callable[[], float | Mapping[str, float]] | None = None,
    **changes: Any,
) -> FitResult:
    """Six steps of a model with dropout; a checkpoint each second step, the newest two stay."""
    model = model or tiny_model()
    plain = {"save_every": 2, "keep_last": 2, "rates": Rates(lr=0.05), "context": {"steps": steps}}
    return fit(
        model,
        objective or Counted(),
        batches or Stream(),
        settings=Settings(steps=steps, compute=CPU, **(plain | changes)),
        folder=folder,
        events=Events(listeners=(seen.append,) if seen is not None else ()),
        hooks=Hooks(
            save_model=save_model or (lambda temp: save_tensors(model.state_dict(), temp / "model.safetensors")),
            on_step=on_step,
            evaluate=evaluate,
        ),
    )


def files(folder: Path) -> dict[str, bytes]:
    """Every tensor file of every checkpoint, byte for byte.

    Those of the generators aside: beartype, which checks types in tests, draws from Python's. ``test_kill.py``, whose
    runs are processes of their own, compares them too.
    """
    found = (folder / "checkpoints").rglob("*.safetensors")
    return {p.relative_to(folder).as_posix(): p.read_bytes() for p in found if p.name != "rng.safetensors"}


def names(folder: Path) -> list[str]:
    """What lies in the folder of checkpoints."""
    return sorted(p.name for p in (folder / "checkpoints").iterdir())
