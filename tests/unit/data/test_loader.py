"""The loader: the same batches in the same order for any number of workers, and no trace in training's numbers."""

from __future__ import annotations

import multiprocessing
import time
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import pytest
import torch
from tests.unit.data.stream import Slow, Stream
from torch import nn

from plait.core.device import Compute
from plait.core.errors import ConfigError, DataError
from plait.core.events import Events
from plait.core.files import read_jsonl
from plait.core.tensors import IGNORE, Batch
from plait.data.loader import Loader
from plait.training.loop import fit
from plait.training.monitor import TIMING
from plait.training.settings import Hooks, OnDevice, Settings

STEPS = 6


class Counting(Stream):
    """Holds how often it was asked."""

    def __init__(self) -> None:
        self.asked = torch.zeros((), dtype=torch.long)

    def step_batches(self, step: int) -> list[Batch]:
        self.asked = self.asked + 1
        return super().step_batches(step)

    def state(self) -> Mapping[str, torch.Tensor]:
        return {"asked": self.asked}

    def restore(self, tensors: Mapping[str, torch.Tensor]) -> None:
        self.asked = tensors["asked"]


def same(one: Batch, other: Batch) -> bool:
    tensors = [(one.token_ids, other.token_ids), (one.labels, other.labels), (one.segment_ids, other.segment_ids)]
    for modality in one.media.keys() | other.media.keys():
        tensors.append((one.media[modality].values, other.media[modality].values))
        tensors.append((one.media[modality].grid, other.media[modality].grid))
        tensors.append((one.item_row[modality], other.item_row[modality]))
    return one.sample_ids == other.sample_ids and all(a.dtype == b.dtype and torch.equal(a, b) for a, b in tensors)


def processes() -> list[int]:
    return [process.pid or 0 for process in multiprocessing.active_children()]


@pytest.mark.parametrize("workers", [0, 1, 2, 4])
def test_any_number_of_workers_gives_the_batches_of_the_source_in_order(workers: int) -> None:
    with Loader(Stream(), steps=STEPS, workers=workers) as loader:
        for step in (2, 3, 4, 5, 1, 2, 0):  # resumed at 2, to the end; back; back again
            came, expected = loader.step_batches(step), Stream().step_batches(step)
            assert len(came) == len(expected)
            assert all(same(*pair) for pair in zip(came, expected, strict=True))
    assert processes() == []


def test_the_workers_end_with_the_last_step_and_with_the_block() -> None:
    loader = Loader(Stream(), steps=STEPS, workers=2)
    loader.step_batches(STEPS - 2)
    assert len(processes()) == 2
    loader.step_batches(STEPS - 1)
    deadline = time.monotonic() + 10  # they are ended, but nobody waits for that
    while processes() and time.monotonic() < deadline:
        time.sleep(0.01)
    assert processes() == []
    loader.step_batches(0)
    loader.close()
    loader.close()
    assert processes() == []


def test_workers_take_no_random_number_from_training() -> None:
    before = torch.get_rng_state(), np.random.get_state()
    with Loader(Stream(), steps=STEPS, workers=1) as loader:
        loader.step_batches(0)
        loader.step_batches(4)
    assert torch.equal(torch.get_rng_state(), before[0])
    assert np.array_equal(np.random.get_state()[1], before[1][1])


def test_a_slow_source_is_waited_for_less_with_workers_and_the_wait_is_in_the_metrics(tmp_path: Path) -> None:
    """Training takes as long as the source: without workers the source takes half of the time, with two nearly none."""
    shares: dict[int, list[float]] = {}
    for workers in (0, 2):
        with Loader(Slow(), steps=STEPS, workers=workers) as loader:
            train(tmp_path / str(workers), loader, busy_s=0.2)
        records = read_jsonl(tmp_path / str(workers) / "metrics.jsonl")
        shares[workers] = [record["data_wait"] for record in records[2:]]  # the first ones wait for the workers' start
    assert min(shares[0]) > 0.3
    assert max(shares[0]) <= 1.0
    assert sorted(shares[2])[1] < min(shares[0])


@pytest.mark.parametrize(("given", "place"), [({"workers": -1}, "workers"), ({"ahead": 0}, "ahead")])
def test_numbers_out_of_range(given: dict[str, int], place: str) -> None:
    with pytest.raises(ConfigError, match=f"{place} is") as caught:
        Loader(Stream(), steps=1, **given)
    assert caught.value.place == place
    with pytest.raises(ConfigError, match="timeout_s is 0"):
        Loader(Stream(), steps=1, timeout_s=0.0)


def test_the_state_of_a_source_goes_through_the_loader_and_back() -> None:
    source = Counting()
    with Loader(source, steps=STEPS) as loader:
        ahead = OnDevice(loader, "cpu")
        ahead.step_batches(0)
        kept = {name: value.clone() for name, value in ahead.state().items()}
        ahead.step_batches(1)
        ahead.restore(kept)
    assert source.asked.item() == kept["asked"].item() == 1
    with Loader(Stream(), steps=STEPS) as loader:
        OnDevice(loader, "cpu").restore({})
        assert OnDevice(loader, "cpu").state() == {}


def test_a_source_with_a_state_is_not_asked_ahead() -> None:
    with pytest.raises(ConfigError, match="Counting holds a state") as caught:
        Loader(Counting(), steps=STEPS, workers=1)
    assert caught.value.place == "workers"


def test_a_step_beyond_the_last_one() -> None:
    with Loader(Stream(), steps=2, workers=1) as loader, pytest.raises(DataError, match="step 2 of 2"):
        loader.step_batches(2)


def test_a_source_that_cannot_be_handed_over_says_so() -> None:
    source = Stream()
    source.account = lambda grid: grid  # type: ignore[attr-defined]
    with Loader(source, steps=2, workers=1) as loader, pytest.raises(ConfigError, match="Stream cannot be handed"):
        loader.step_batches(0)
    assert processes() == []


# --- training ------------------------------------------------------------------------------------------------------


class Model(nn.Module):
    """With dropout, which draws random numbers."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(7)
        self.embed = nn.Embedding(17, 12)
        self.drop = nn.Dropout(0.3)
        self.head = nn.Linear(12, 17)

    def forward(self, token_ids: torch.Tensor) -> torch.Tensor:
        return self.head(self.drop(torch.tanh(self.embed(token_ids).flatten(0, 1))))


class Loss:
    needs_global_batch = False

    def count(self, batch: Batch) -> dict[str, torch.Tensor]:
        return {"text": (batch.labels != IGNORE).sum()}

    def __call__(self, model: nn.Module, batch: Batch) -> dict[str, torch.Tensor]:
        logits = model(batch.token_ids)
        return {
            "text": nn.functional.cross_entropy(logits, batch.labels.flatten(), ignore_index=IGNORE, reduction="sum")
        }


class Cut(Exception):
    pass


def train(folder: Path, loader: Loader, *, cut: int = 0, busy_s: float = 0.0) -> Model:
    """Train, or up to a step."""

    def on_step(step: int, _: object) -> None:
        time.sleep(busy_s)

    def save_model(_: Path) -> None:
        pass

    class Until:
        def step_batches(self, step: int) -> object:
            if cut and step == cut:
                raise Cut
            return loader.step_batches(step)

    model = Model()
    settings = Settings(
        steps=STEPS,
        compute=Compute(device="cpu", dtype="float32", threads=torch.get_num_threads(), why=()),
        seed=11,
        save_every=1,
    )
    hooks = Hooks(on_step=on_step, save_model=save_model)
    folder.mkdir(exist_ok=True)
    fit(model, Loss(), Until(), settings=settings, folder=folder, events=Events(), hooks=hooks)
    return model


def lasting(folder: Path) -> list[dict[str, object]]:
    return [{k: v for k, v in record.items() if k not in TIMING} for record in read_jsonl(folder / "metrics.jsonl")]


def test_stopped_and_resumed_with_another_number_of_workers_gives_the_same_bits(tmp_path: Path) -> None:
    whole = train(tmp_path / "whole", Loader(Stream(), steps=STEPS)).state_dict()
    for before, after in ((4, 0), (0, 1), (1, 4)):
        folder = tmp_path / f"{before} then {after}"
        with Loader(Stream(), steps=STEPS, workers=before) as loader, pytest.raises(Cut):
            train(folder, loader, cut=3)
        with Loader(Stream(), steps=STEPS, workers=after) as loader:
            resumed = train(folder, loader).state_dict()
        assert [name for name in whole if not torch.equal(whole[name], resumed[name])] == []
        assert lasting(folder) == lasting(tmp_path / "whole")
