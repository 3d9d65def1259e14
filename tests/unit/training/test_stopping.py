"""Evaluation while training: the best checkpoint stays and is the result, patience ends the run."""

from __future__ import annotations

import math
import os
import shutil
import signal
import time
from collections.abc import Callable, Iterable

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from torch import nn

from plait.core.device import Compute
from plait.core.errors import ConfigError, Stopped
from plait.core.events import Events
from plait.core.files import read_jsonl
from plait.core.tensors import Batch
from plait.training import interrupt
from plait.training.loop import fit
from plait.training.monitor import TIMING
from plait.training.optim import Rates
from plait.training.schedule import Constant
from plait.training.settings import FitResult, Hooks, Settings, Stopping
from plait.training.trainer import Average

CPU = Compute(device="cpu", dtype="float32", threads=1, why=())
POINTS, WIDTH = 12, 60


def points(seed: int, count: int = POINTS) -> tuple[torch.Tensor, torch.Tensor]:
    """Noisy values of a smooth function: twelve of them are learned by heart."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.rand(count, 1, generator=generator) * 4 - 2
    return x, torch.sin(2 * x) + 0.5 * torch.randn(count, 1, generator=generator)


class Fit:
    needs_global_batch = False

    def count(self, batch: Batch) -> dict[str, torch.Tensor]:
        return {"fit": torch.tensor(POINTS)}

    def __call__(self, model: nn.Module, batch: Batch) -> dict[str, torch.Tensor]:
        x, y = points(0)
        return {"fit": (model(x) - y).square().sum()}


class Same:
    def step_batches(self, step: int) -> list[Batch]:
        ids = torch.ones(1, 1, dtype=torch.long)
        return [Batch(token_ids=ids, labels=ids, segment_ids=ids, media={}, item_row={}, sample_ids=("all",))]


def network() -> nn.Module:
    torch.manual_seed(3)
    return nn.Sequential(nn.Linear(1, WIDTH), nn.Tanh(), nn.Linear(WIDTH, WIDTH), nn.Tanh(), nn.Linear(WIDTH, 1))


def valid(model: nn.Module) -> float:
    x, y = points(1, 200)
    with torch.no_grad():
        return float((model(x) - y).square().mean())


def train(
    folder,
    *,
    steps: int = 300,
    stopping: Stopping | None = None,
    average: Average | None = None,
    evaluate: Callable[[nn.Module], float] = valid,
    told: dict[int, dict] | None = None,
    seen: list | None = None,
) -> tuple[nn.Module, FitResult]:
    model = network()
    settings = Settings(
        steps=steps,
        compute=CPU,
        rates=Rates(lr=0.01),
        schedule=Constant(),
        save_every=25,
        keep_last=2,
        stopping=stopping,
        average=average,
    )
    hooks = Hooks(
        save_model=lambda target: save_file(model.state_dict(), target / "model.safetensors"),
        evaluate=lambda: evaluate(model),
        on_step=lambda step, values: told.update({step: dict(values)}) if told is not None else None,
    )
    events = Events(listeners=(seen.append,) if seen is not None else ())
    result = fit(model, Fit(), Same(), settings=settings, folder=folder, events=events, hooks=hooks)
    return model, result


def lasting(records: Iterable[dict]) -> list[dict]:
    """Without what tells about the machine."""
    return [{key: value for key, value in record.items() if key not in TIMING} for record in records]


@pytest.fixture(scope="module")
def curve(tmp_path_factory) -> list[float]:
    """The validation loss after each step of a run that never stops."""
    folder = tmp_path_factory.mktemp("curve")
    train(folder, stopping=Stopping(every=1))
    return [record["evaluation"] for record in read_jsonl(folder / "metrics.jsonl")]


@pytest.mark.row("S4-63")
def test_an_overfitting_run_stops_at_the_optimum_of_validation(tmp_path, curve):
    best = min(range(len(curve)), key=curve.__getitem__) + 1
    assert 10 < best < 200
    assert curve[-1] > 1.1 * min(curve)  # it does overfit
    model, result = train(tmp_path, stopping=Stopping(every=5, patience=6))
    assert result.best is not None
    step, value = result.best
    assert abs(step - best) <= 5 * 6
    assert result.step == step + 5 * 6  # patience, and not a step more
    assert value == curve[step - 1]
    assert valid(model) == value  # the model that is left is the best one
    assert result.checkpoint.name == f"{step:06d}"
    saved = load_file(result.checkpoint / "model.safetensors")
    assert torch.equal(saved["0.weight"], model[0].weight)


@pytest.mark.row("S4-63")
def test_the_best_checkpoint_is_never_rotated_away(tmp_path, curve):
    _, result = train(tmp_path, stopping=Stopping(every=5))
    assert result.best is not None
    names = sorted(path.name for path in (tmp_path / "checkpoints").iterdir())
    assert names == [f"{result.best[0]:06d}", "000275", "000300"]
    assert result.step == 300


@pytest.mark.row("S4-63")
def test_a_stopped_run_stays_stopped_and_goes_on_with_more_patience(tmp_path):
    model, first = train(tmp_path, stopping=Stopping(every=5, patience=4))
    again, second = train(tmp_path, stopping=Stopping(every=5, patience=4))
    assert (second.step, second.best, second.checkpoint) == (first.step, first.best, first.checkpoint)
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), again.parameters(), strict=True))
    _, third = train(tmp_path, stopping=Stopping(every=5, patience=8))
    assert third.resumed_from == first.step
    assert third.best is not None
    assert third.step == third.best[0] + 5 * 8


@pytest.mark.row("S4-63")
def test_a_run_cut_off_on_the_way_ends_the_same(tmp_path):
    model, whole = train(tmp_path, stopping=Stopping(every=5, patience=4))
    assert whole.best is not None
    for path in (tmp_path / "checkpoints").iterdir():
        if int(path.name) > whole.best[0]:
            shutil.rmtree(path)
    again, rest = train(tmp_path, stopping=Stopping(every=5, patience=4))
    assert rest.resumed_from == whole.best[0]
    assert (rest.step, rest.best) == (whole.step, whole.best)
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), again.parameters(), strict=True))


@pytest.mark.row("S4-63")
def test_without_a_whole_best_checkpoint_the_run_ends_with_the_last_model_and_says_so(tmp_path):
    _, first = train(tmp_path, stopping=Stopping(every=5, patience=4))
    assert first.best is not None
    best, copy = first.checkpoint, tmp_path / "copy"
    shutil.copytree(best, copy)
    last = load_file(tmp_path / "checkpoints" / f"{first.step:06d}" / "model.safetensors")
    (best / "model.safetensors").write_bytes(b"cut")

    for damaged in (True, False):
        seen: list = []
        model, result = train(tmp_path, stopping=Stopping(every=5, patience=4), seen=seen)
        warnings = [event.text for event in seen if event.kind == "warning"]
        assert any(text.startswith(f"checkpoint {best.name} is damaged") for text in warnings) == damaged
        assert f"the model is that of step {first.step}" in warnings[-1]
        assert (result.step, result.best, result.checkpoint.name) == (first.step, first.best, f"{first.step:06d}")
        assert torch.equal(model[0].weight, last["0.weight"])
        assert not best.exists()
    assert (tmp_path / "checkpoints" / "quarantine" / best.name / "model.safetensors").read_bytes() == b"cut"

    shutil.copytree(copy, best)  # as the warning says
    model, result = train(tmp_path, stopping=Stopping(every=5, patience=4))
    assert (result.checkpoint, valid(model)) == (best, first.best[1])


@pytest.mark.row("S4-63")
def test_an_evaluation_given_up_after_a_signal_is_made_when_resumed(tmp_path, monkeypatch):
    expected: dict[int, dict] = {}
    model, whole = train(tmp_path / "whole", stopping=Stopping(every=5, patience=4), told=expected)
    monkeypatch.setattr(interrupt, "GRACE_S", 0.1)
    told: dict[int, dict] = {}
    asked: list[int] = []

    def slow(of: nn.Module) -> float:
        asked.append(1)
        if len(asked) == 3:
            os.kill(os.getpid(), signal.SIGTERM)
            time.sleep(60)
        return valid(of)

    with pytest.raises(Stopped):
        train(tmp_path / "cut", stopping=Stopping(every=5, patience=4), evaluate=slow, told=told)
    assert (tmp_path / "cut" / "checkpoints" / "000015").is_dir()
    assert max(told) == 14  # the step is told with its evaluation or not at all
    again, rest = train(tmp_path / "cut", stopping=Stopping(every=5, patience=4), evaluate=slow, told=told)
    assert (rest.resumed_from, rest.step, rest.best) == (15, whole.step, whole.best)
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), again.parameters(), strict=True))
    records = [read_jsonl(tmp_path / name / "metrics.jsonl") for name in ("cut", "whole")]
    assert lasting(records[0]) == lasting(records[1])
    assert list(records[0][14]) == list(records[1][14])  # the fields' order, too
    assert lasting(told.values()) == lasting(expected.values())
    assert "evaluation" in told[15]


def test_a_signal_while_a_resumed_step_is_evaluated_stops_before_the_next_batch(tmp_path, monkeypatch):
    monkeypatch.setattr(interrupt, "GRACE_S", 0.1)
    told: dict[int, dict] = {}
    asked: list[int] = []

    def signalled(of: nn.Module) -> float:
        asked.append(1)
        os.kill(os.getpid(), signal.SIGTERM)
        if len(asked) == 1:
            time.sleep(60)
        return valid(of)

    stopping = Stopping(every=5)
    for _ in range(2):
        with pytest.raises(Stopped, match="after step 5 of 300, which is saved"):
            train(tmp_path, stopping=stopping, evaluate=signalled, told=told)
        assert max(told) == 4
    assert len(asked) == 2
    assert len(read_jsonl(tmp_path / "metrics.jsonl")) == 5
    _, result = train(tmp_path, stopping=stopping, steps=10, told=told)
    assert (result.resumed_from, list(told)) == (5, list(range(1, 11)))
    assert [r["step"] for r in read_jsonl(tmp_path / "metrics.jsonl") if "evaluation" in r] == [5, 10]


def test_a_step_that_is_no_longer_to_be_evaluated_is_told_and_so_are_the_next(tmp_path, monkeypatch):
    """The last step of a run is evaluated; that of a longer one is not."""
    monkeypatch.setattr(interrupt, "GRACE_S", 0.1)
    told: dict[int, dict] = {}

    def endless(_: nn.Module) -> float:
        os.kill(os.getpid(), signal.SIGTERM)
        time.sleep(60)
        return 0.0

    with pytest.raises(Stopped):
        train(tmp_path, steps=3, stopping=Stopping(every=5), evaluate=endless, told=told)
    _, result = train(tmp_path, steps=6, stopping=Stopping(every=5), told=told)
    assert (result.resumed_from, list(told)) == (3, [1, 2, 3, 4, 5, 6])
    assert [step for step, values in told.items() if "evaluation" in values] == [5, 6]


@pytest.mark.row("S4-63")
def test_the_average_is_evaluated_and_left_where_it_is_used(tmp_path):
    model, result = train(tmp_path, stopping=Stopping(every=5, patience=4), average=Average(decay=0.9))
    assert result.best is not None
    assert valid(model) == result.best[1]
    assert torch.equal(load_file(result.checkpoint / "model.safetensors")["0.weight"], model[0].weight)


@given(
    values=st.lists(st.floats(-5, 5) | st.just(math.nan), min_size=1, max_size=30),
    gain=st.floats(0, 1),
    higher=st.booleans(),
)
def test_the_best_is_the_first_that_nothing_beats_by_the_least_gain(values, gain, higher):
    stopping = Stopping(every=1, least_gain=gain, higher=higher)
    best: float | None = None
    for value in values:
        if stopping.gains(value, best):
            assert best is None or (value - best if higher else best - value) >= gain
            best = value
        elif best is not None and not math.isnan(value):
            assert (value <= best + gain) if higher else (value >= best - gain)
    assert (best is None) == all(math.isnan(value) for value in values)


def test_nothing_to_evaluate_with_is_an_error(tmp_path):
    settings = Settings(steps=1, compute=CPU, stopping=Stopping(every=1))
    with pytest.raises(ConfigError, match="nothing evaluates"):
        fit(network(), Fit(), Same(), settings=settings, folder=tmp_path, events=Events())


@pytest.mark.parametrize("given", [{"every": 0}, {"every": 1, "patience": -1}, {"every": 1, "least_gain": -1.0}])
def test_numbers_that_cannot_be_are_refused(given):
    with pytest.raises(ConfigError):
        Stopping(**given)
