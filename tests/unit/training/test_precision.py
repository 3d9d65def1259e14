from __future__ import annotations

import math
import shutil

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from tests.unit.training.pairwise_model import dual, gradients_and_sums, pairs
from torch import nn

from plait.core.device import Compute
from plait.core.errors import ConfigError, NumericsError
from plait.core.events import Events
from plait.core.files import read_jsonl
from plait.core.tensors import Batch
from plait.objectives.contrastive import Contrastive
from plait.training.loop import fit
from plait.training.optim import Rates
from plait.training.precision import LossScale, autocast, hold_masters
from plait.training.schedule import Constant
from plait.training.settings import FitResult, Settings


def test_masters_keep_every_value_and_leave_wider_ones_alone():
    half = nn.Parameter(torch.randn(64).to(torch.bfloat16))
    before = half.detach().clone()
    wide = nn.Parameter(torch.randn(4, dtype=torch.float64))
    assert hold_masters([half, wide]) == 1
    assert (half.dtype, wide.dtype) == (torch.float32, torch.float64)
    assert torch.equal(half.detach(), before.float())


@pytest.mark.row("S2-27")
def test_small_updates_survive_in_a_master_and_vanish_without():
    weight = nn.Parameter(torch.ones(1).to(torch.bfloat16))
    lost = weight.detach().clone()
    hold_masters([weight])
    for _ in range(100):
        weight.data -= 1e-3
        lost -= 1e-3
    assert weight.item() == pytest.approx(0.9, abs=1e-5)
    assert lost.item() == 1.0


def test_autocast_runs_products_in_bfloat16_and_gives_float32_gradients():
    layer = nn.Linear(4, 4)
    with autocast("cpu", "bfloat16"):
        out = layer(torch.randn(2, 4))
    assert out.dtype == torch.bfloat16
    out.float().sum().backward()
    assert layer.weight.grad is not None
    assert layer.weight.grad.dtype == torch.float32
    with autocast("cpu", "float32"):
        assert layer(torch.randn(2, 4)).dtype == torch.float32


@pytest.mark.parametrize(("device", "dtype"), [("cpu", "float8_e4m3fn"), ("meta", "bfloat16")])
def test_what_cannot_be_done_is_refused(device, dtype):
    with pytest.raises(ConfigError, match=r"cannot train in float8_e4m3fn|no automatic bfloat16") as error:
        autocast(device, dtype)
    assert "float32" in error.value.remedy


def test_autocast_knows_float16():
    with autocast("cpu", "float16"):
        assert nn.Linear(4, 4)(torch.randn(2, 4)).dtype == torch.float16


# --- loss scaling --------------------------------------------------------------------------------------------------


@pytest.mark.row("S2-27")
@given(st.lists(st.booleans(), max_size=60))
def test_the_scale_grows_and_backs_off_as_that_of_torch(finite):
    ours = LossScale(scale=1024.0, patience=4)
    theirs = torch.amp.GradScaler("cpu", init_scale=1024.0, growth_interval=4)
    weight = nn.Parameter(torch.zeros(2))
    optimizer = torch.optim.SGD([weight], lr=0.1)
    theirs.scale(torch.zeros(1))
    for good in finite:
        weight.grad = torch.tensor([1.0, 1.0 if good else math.inf])
        theirs.unscale_(optimizer)
        theirs.step(optimizer)
        theirs.update()
        ours.update(finite=good)
        assert ours.scale == theirs.get_scale()
        assert ours.good == theirs.state_dict()["_growth_tracker"]


def test_gradients_are_divided_by_the_scale():
    grads = [torch.tensor([8.0, -2.0]), torch.tensor(3.0)]
    LossScale(scale=4.0).unscale(grads)
    assert torch.equal(grads[0], torch.tensor([2.0, -0.5]))
    assert grads[1] == 0.75
    LossScale().unscale([])  # of a step that was broken off before there was any


@pytest.mark.row("S2-27")
@pytest.mark.parametrize("rows", [14, 5])
def test_the_scale_multiplies_gradients_alone_also_of_a_pairwise_loss_in_pieces(rows):
    """A power of 2: to the bit."""
    micro = pairs(micro_batch=rows).step_batches(0)
    plain, sums = gradients_and_sums(dual(), Contrastive(), micro)
    scaled, again = gradients_and_sums(dual(), Contrastive(), micro, scale=1024.0)
    assert (len(micro) > 1) == (rows < 14)
    assert again == sums
    assert all(torch.equal(scaled[name], 1024 * gradient) for name, gradient in plain.items())


class Squares:
    """Fits ``y = 3 x`` by a product under autocast; ``factor`` makes the gradient large or small."""

    needs_global_batch = False

    def __init__(self, factor: float = 1.0) -> None:
        self.factor = factor

    def count(self, batch: Batch) -> dict[str, torch.Tensor]:
        return {"fit": torch.tensor(batch.token_ids.numel())}

    def __call__(self, model: nn.Module, batch: Batch) -> dict[str, torch.Tensor]:
        x = batch.token_ids.float().view(-1, 1) / 8
        return {"fit": self.factor * (model(x).float() - 3 * x).square().sum()}


class Numbers:
    def step_batches(self, step: int) -> list[Batch]:
        ids = torch.arange(8).view(8, 1) + step % 3
        ones = torch.ones_like(ids)
        names = tuple(f"{step}-{row}" for row in range(8))
        return [Batch(token_ids=ids, labels=ids, segment_ids=ones, media={}, item_row={}, sample_ids=names)]


def train(
    folder, dtype: str, *, factor: float = 1.0, steps: int = 40, objective: Squares | None = None, **changes
) -> tuple[nn.Module, FitResult]:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(1, 16), nn.Tanh(), nn.Linear(16, 1))
    settings = Settings(
        steps=steps,
        compute=Compute(device="cpu", dtype=dtype, threads=1, why=()),
        rates=Rates(lr=0.02),
        **({"schedule": Constant()} | changes),
    )
    result = fit(model, objective or Squares(factor), Numbers(), settings=settings, folder=folder, events=Events())
    return model, result


@pytest.mark.row("S2-27")
@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_a_run_in_half_precision_ends_where_float32_ends(tmp_path, dtype):
    """Losses over the last ten steps. Seen: within 1 % in float16, 6 % in bfloat16."""
    for name in ("float32", dtype):
        train(tmp_path / name, name, steps=80)
    full, half = (
        sum(record["loss"] for record in read_jsonl(tmp_path / name / "metrics.jsonl")[-10:])
        for name in ("float32", dtype)
    )
    assert half == pytest.approx(full, rel=0.15)


@pytest.mark.row("S2-27")
def test_an_overflow_leaves_the_step_out_halves_the_scale_and_is_counted(tmp_path):
    """A loss of 1e-1 times 2**16 has gradients above 65,504, float16's largest number."""
    _, result = train(tmp_path, "float16", factor=3.0)
    records = read_jsonl(tmp_path / "metrics.jsonl")
    assert result.overflowed > 0
    assert result.skipped == 0
    scales = [record["loss_scale"] for record in records]
    assert scales[0] == 2**16
    assert scales[-1] == 2**16 / 2**result.overflowed
    over = [record["step"] for record in records if record["grad_norm"] is None]
    assert len(over) == result.overflowed
    assert records[-1]["loss"] < 0.2 * records[0]["loss"]


def test_a_loss_in_float16_is_scaled_in_float32(tmp_path):
    """There a loss of 1 times 2**16 would be infinite, at every scale down to 2**15, whatever its gradients."""

    class Half(Squares):
        def __call__(self, model: nn.Module, batch: Batch) -> dict[str, torch.Tensor]:
            x = batch.token_ids.float().view(-1, 1) / 8
            loss = (model(x) - (3 * x).half()).square().sum()
            assert loss.dtype == torch.float16
            return {"fit": loss}

    _, result = train(tmp_path, "float16", objective=Half())
    records = read_jsonl(tmp_path / "metrics.jsonl")
    assert records[0]["loss"] * 2**16 > 65_504
    assert result.skipped == 0
    assert records[-1]["loss_scale"] == 2**16 / 2**result.overflowed
    assert sum(record["grad_norm"] is None for record in records) == result.overflowed < 5
    assert records[-1]["loss"] < 0.2 * records[0]["loss"]


def test_a_step_broken_off_because_its_scaled_loss_is_not_finite_is_an_overflow(tmp_path):
    """A loss of 1e36 is a number of float32; times 2**16 it is none, and there is no gradient."""
    start, _ = train(tmp_path / "start", "float32", steps=1, schedule=Constant(warmup=1))
    model, result = train(tmp_path, "float16", factor=1e36, steps=3)
    records = read_jsonl(tmp_path / "metrics.jsonl")
    assert (result.skipped, result.overflowed) == (0, 3)
    assert [record["loss_scale"] for record in records] == [2.0**16, 2.0**15, 2.0**14]
    assert [record["grad_norm"] for record in records] == [None] * 3
    assert all(math.isfinite(record["loss"]) for record in records)
    assert all(torch.equal(one, other) for one, other in zip(model.parameters(), start.parameters(), strict=True))


@pytest.mark.row("S2-27")
def test_small_gradients_survive_because_the_loss_is_scaled(tmp_path):
    """Gradients of 1e-8 are zero in float16; times 2**16 they are not. AdamW makes the same steps of them."""
    model, _ = train(tmp_path / "small", "float16", factor=1e-7, steps=5, clip_norm=None)
    reference, _ = train(tmp_path / "full", "float32", factor=1e-7, steps=5, clip_norm=None)
    start, _ = train(tmp_path / "start", "float32", steps=1, schedule=Constant(warmup=1))
    for weight, other, before in zip(model.parameters(), reference.parameters(), start.parameters(), strict=True):
        moved = (weight - before).norm()
        assert moved > 0.9 * (other - before).norm() > 0


@pytest.mark.row("S2-27")
def test_the_scale_is_saved_and_goes_on_to_the_bit(tmp_path):
    whole, first = train(tmp_path, "float16", factor=3.0, steps=12, save_every=6, keep_last=9)
    shutil.rmtree(tmp_path / "checkpoints" / "000012")
    again, second = train(tmp_path, "float16", factor=3.0, steps=12, save_every=6, keep_last=9)
    assert second.resumed_from == 6
    assert first.overflowed == second.overflowed > 0
    for one, other in zip(whole.parameters(), again.parameters(), strict=True):
        assert torch.equal(one, other)


def test_what_no_scale_helps_ends_the_run(tmp_path):
    """Gradients that are not finite at any scale are faults of the samples or the model, not overflows."""

    class Broken(Squares):
        def __call__(self, model: nn.Module, batch: Batch) -> dict[str, torch.Tensor]:
            value = super().__call__(model, batch)["fit"]
            value.register_hook(lambda grad: grad * math.inf)
            return {"fit": value}

    model = nn.Linear(1, 1)
    settings = Settings(steps=60, compute=Compute(device="cpu", dtype="float16", threads=1, why=()))
    with pytest.raises(NumericsError, match="10 steps in a row"):
        fit(model, Broken(), Numbers(), settings=settings, folder=tmp_path, events=Events())


@pytest.mark.row("S2-27")
def test_float64_trains_as_it_is(tmp_path):
    model = nn.Linear(1, 1).double()

    class Double(Squares):
        def __call__(self, model: nn.Module, batch: Batch) -> dict[str, torch.Tensor]:
            x = batch.token_ids.double().view(-1, 1)
            return {"fit": (model(x) - 3 * x).square().sum()}

    settings = Settings(steps=3, compute=Compute(device="cpu", dtype="float64", threads=1, why=()))
    fit(model, Double(), Numbers(), settings=settings, folder=tmp_path, events=Events())
    assert model.weight.dtype == torch.float64
