"""The moving average of the weights: its numbers, what is shown and saved of it, and that it goes on to the bit."""

from __future__ import annotations

import math
import re
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from plait.core.device import Compute
from plait.core.errors import ConfigError
from plait.core.events import Events
from plait.core.tensors import Batch
from plait.training.average import MovingAverage
from plait.training.checkpoint import accepting
from plait.training.loop import fit
from plait.training.optim import Rates
from plait.training.schedule import Constant
from plait.training.settings import FitResult, Hooks, Settings
from plait.training.trainer import Average as AverageSpec

CPU = Compute(device="cpu", dtype="float32", threads=1, why=())


def walk(model: nn.Module, steps: int) -> None:
    generator = torch.Generator().manual_seed(steps)
    with torch.no_grad():
        for weight in model.parameters():
            weight.add_(torch.randn(weight.shape, generator=generator))


@pytest.mark.row("S4-63")
def test_once_warm_it_is_torchs():
    model = nn.Linear(3, 4)
    ours = MovingAverage(dict(model.named_parameters()), decay=0.9)
    ours.updates = 1000  # past the warm-up
    theirs = AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(0.9))
    theirs.update_parameters(model)  # the first one copies
    for step in range(12):
        walk(model, step)
        ours.update()
        theirs.update_parameters(model)
        for name, mean in theirs.module.named_parameters():
            torch.testing.assert_close(ours.tensors()[name], mean.detach(), rtol=1e-6, atol=1e-6)


@pytest.mark.row("S4-63")
def test_the_decay_warms_up():
    weight = nn.Parameter(torch.zeros(()))
    average = MovingAverage({"w": weight}, decay=0.5)
    expected = 0.0
    for step in range(12):
        weight.data.fill_(float(step))
        decay = min(0.5, (1 + step) / (10 + step))
        assert average.decay == decay
        average.update()
        expected = decay * expected + (1 - decay) * step
        assert float(average.tensors()["w"]) == pytest.approx(expected, rel=1e-5)


def test_inside_the_block_the_model_has_the_average_and_then_its_own_weights_again():
    model = nn.Linear(2, 2)
    average = MovingAverage(dict(model.named_parameters()), decay=0.9)
    walk(model, 1)
    own, mean = model.weight.detach().clone(), average.tensors()["weight"].clone()
    with average.in_place():
        assert torch.equal(model.weight, mean)
    assert torch.equal(model.weight, own)
    assert torch.equal(average.tensors()["weight"], mean)


# --- in the loop ---------------------------------------------------------------------------------------------------


class Toward:
    """The weights run after a target; at one step the loss is not a number."""

    needs_global_batch = False

    def __init__(self, broken: int = -1) -> None:
        self.broken = broken

    def count(self, batch: Batch) -> dict[str, torch.Tensor]:
        return {"gap": torch.tensor(1)}

    def __call__(self, model: nn.Module, batch: Batch) -> dict[str, torch.Tensor]:
        step = int(batch.token_ids[0, 0])
        gap = sum((weight - math.sin(step)).square().sum() for weight in model.parameters())
        return {"gap": gap * (math.nan if step == self.broken else 1.0)}


class Steps:
    def step_batches(self, step: int) -> list[Batch]:
        ids = torch.full((1, 1), step)
        return [Batch(token_ids=ids, labels=ids, segment_ids=ids + 1, media={}, item_row={}, sample_ids=(f"{step}",))]


def train(
    folder,
    *,
    average: AverageSpec | None,
    seen: list | None = None,
    broken: int = -1,
    steps: int = 8,
    said: list | None = None,
) -> tuple[nn.Module, FitResult]:
    torch.manual_seed(0)
    model = nn.Linear(3, 2)
    settings = Settings(
        steps=steps, compute=CPU, rates=Rates(lr=0.1), schedule=Constant(), save_every=4, keep_last=9, average=average
    )
    hooks = Hooks(
        save_model=lambda target: save_file(model.state_dict(), target / "model.safetensors"),
        on_step=lambda step, _: seen.append(model.weight.detach().clone()) if seen is not None else None,
    )
    events = Events(listeners=(said.append,) if said is not None else ())
    result = fit(model, Toward(broken), Steps(), settings=settings, folder=folder, events=events, hooks=hooks)
    return model, result


@pytest.mark.row("S4-63")
def test_the_average_is_what_is_shown_saved_and_left(tmp_path):
    plain: list[torch.Tensor] = []
    shown: list[torch.Tensor] = []
    raw, _ = train(tmp_path / "raw", average=None, seen=plain)
    model, result = train(tmp_path / "used", average=AverageSpec(decay=0.5), seen=shown)
    torch.manual_seed(0)
    mean = nn.Linear(3, 2).weight.detach().clone()
    for step, weight in enumerate(plain):
        decay = min(0.5, (1 + step) / (10 + step))
        mean = decay * mean + (1 - decay) * weight
        torch.testing.assert_close(shown[step], mean)
    saved = load_file(result.checkpoint / "model.safetensors")
    resume = load_file(result.checkpoint / "resume" / "weights.safetensors")
    assert torch.equal(model.weight, shown[-1])
    assert torch.equal(saved["weight"], shown[-1])
    assert torch.equal(resume["weight"], raw.weight)  # training itself goes on as without


@pytest.mark.row("S4-63")
def test_an_average_that_is_not_used_is_only_kept(tmp_path):
    raw, _ = train(tmp_path / "raw", average=None)
    model, result = train(tmp_path / "kept", average=AverageSpec(decay=0.5, use=False))
    saved = load_file(result.checkpoint / "model.safetensors")
    assert torch.equal(model.weight, raw.weight)
    assert torch.equal(saved["weight"], raw.weight)
    assert not torch.equal(load_file(result.checkpoint / "resume" / "average.safetensors")["weight"], raw.weight)


@pytest.mark.row("S4-63")
def test_it_goes_on_to_the_bit(tmp_path):
    model, result = train(tmp_path, average=AverageSpec(decay=0.7))
    before = {path.name: load_file(path) for path in (result.checkpoint / "resume").glob("*.safetensors")}
    shutil.rmtree(result.checkpoint)
    again, second = train(tmp_path, average=AverageSpec(decay=0.7))
    assert second.resumed_from == 4
    assert torch.equal(model.weight, again.weight)
    for name, tensors in before.items():
        for key, value in load_file(second.checkpoint / "resume" / name).items():
            # beartype, which checks types here, draws from Python's generator itself.
            assert key == "python" or torch.equal(value, tensors[key]), (name, key)


def test_an_average_that_a_run_takes_up_later_begins_with_the_weights_it_has_then(tmp_path):
    plain: list[torch.Tensor] = []
    train(tmp_path / "raw", average=None, seen=plain)
    train(tmp_path / "late", average=None, steps=4)
    with pytest.raises(ConfigError, match="average") as error:
        train(tmp_path / "late", average=AverageSpec(decay=0.5))
    keys = re.findall(r"--accept ([\w.]+)", error.value.remedy)
    assert set(keys) == {"average.decay", "average.use"}
    shown: list[torch.Tensor] = []
    said: list = []
    with accepting(keys):
        model, result = train(tmp_path / "late", average=AverageSpec(decay=0.5), seen=shown, said=said)
    assert result.resumed_from == 4
    assert any("000004 has no moving average: it begins with the weights of step 4" in event.text for event in said)
    mean = plain[3].clone()
    for step, weight in enumerate(plain[4:]):
        decay = min(0.5, (1 + step) / (10 + step))
        mean = decay * mean + (1 - decay) * weight
        torch.testing.assert_close(shown[step], mean)
    assert torch.equal(model.weight, shown[-1])


def test_a_step_that_is_left_out_does_not_enter(tmp_path):
    model, result = train(tmp_path, average=AverageSpec(decay=0.7), broken=3)
    assert result.skipped == 1
    assert model.weight.isfinite().all()
    shown: list[torch.Tensor] = []
    train(tmp_path / "again", average=AverageSpec(decay=0.7), broken=3, seen=shown)
    assert torch.equal(shown[2], shown[3])
