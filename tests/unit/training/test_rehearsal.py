"""A caller may take the place of training."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import nn

from plait.core.device import Compute
from plait.core.events import Events
from plait.core.tensors import Batch
from plait.training.loop import fit
from plait.training.rehearsal import rehearsal, rehearsing
from plait.training.settings import Settings


class Squares:
    needs_global_batch = False

    def count(self, batch: Batch) -> dict[str, torch.Tensor]:
        return {"square": torch.tensor(len(batch.sample_ids))}

    def __call__(self, model: nn.Module, batch: Batch) -> dict[str, torch.Tensor]:
        return {"square": model(torch.ones(1, 1)).square().sum()}


class Same:
    def step_batches(self, step: int) -> list[Batch]:
        ids = torch.ones(1, 1, dtype=torch.long)
        return [Batch(token_ids=ids, labels=ids, segment_ids=ids, media={}, item_row={}, sample_ids=("a",))]


def train(folder, *, steps=3):
    compute = Compute(device="cpu", dtype="float32", threads=torch.get_num_threads(), why=())
    settings = Settings(steps=steps, compute=compute)
    return fit(nn.Linear(1, 1), Squares(), Same(), settings=settings, folder=folder, events=Events())


def test_it_is_asked_instead_and_may_train_less(tmp_path):
    seen = []

    def instead(asked):
        seen.append(asked)
        assert rehearsal() is None
        rest = {name: getattr(asked, name) for name in ("model", "objective", "batches", "folder", "events", "hooks")}
        return fit(
            rest.pop("model"),
            rest.pop("objective"),
            rest.pop("batches"),
            **rest,
            settings=replace(asked.settings, steps=1),
        )

    with rehearsing(instead):
        assert train(tmp_path / "a").step == 1
        assert rehearsal() is instead
    assert seen[0].settings.steps == 3
    assert train(tmp_path / "b").step == 3


def test_what_it_raises_ends_the_stage_and_the_rehearsal(tmp_path):
    class Enough(Exception): ...

    def instead(asked):
        raise Enough

    with pytest.raises(Enough), rehearsing(instead):
        train(tmp_path)
    assert rehearsal() is None
    assert not list(tmp_path.iterdir())
