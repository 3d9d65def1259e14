"""MoCo: the loop of the paper's Algorithm 1, and a queue and a copy that move once a step that was taken."""

from __future__ import annotations

import copy
import math
import os
import signal
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tests.tiny_run import files, train
from tests.unit.objectives.test_views import some
from tests.unit.objectives.view_ranks import (
    QUEUE,
    RATE,
    STEPS,
    WIDTH,
    Tower,
    momentum_run,
    pieces,
    step,
    views,
)
from torch import Tensor, nn
from torch.nn import functional

from plait.core.errors import ConfigError, DataError, Stopped
from plait.core.protocols import Paced, Pairwise
from plait.core.tensors import IGNORE, Batch, Patches
from plait.objectives.momentum import MomentumContrast, momentum_nce, take_view
from plait.training.optim import SGD, Rates
from plait.training.schedule import Constant
from plait.training.state import TrainState


def built(model: nn.Module, **how: Any) -> MomentumContrast:
    return MomentumContrast(model, **({"width": WIDTH, "queue": QUEUE, "momentum": 0.7, "temperature": 0.2} | how))


def state(model: nn.Module, objective: nn.Module) -> dict[str, Tensor]:
    return {name: tensor.clone() for name, tensor in TrainState(model, objective).tensors().items()}


def same(one: dict[str, Tensor], other: dict[str, Tensor]) -> None:
    assert one.keys() == other.keys()
    assert [name for name in one if not torch.equal(one[name], other[name])] == []


# --- the loss ------------------------------------------------------------------------------------------------------


@pytest.mark.row("S2-23")
@pytest.mark.parametrize("cells", [1, 2**20])
def test_the_loss_is_a_cross_entropy_whose_first_class_is_right(cells: int) -> None:
    query, key, queue = some(5), some(5, seed=1).detach(), some(9, seed=2).detach()
    logits = torch.cat([(query * key).sum(1, keepdim=True), query @ queue.T], 1) / 0.1
    expected = functional.cross_entropy(logits, torch.zeros(5, dtype=torch.long), reduction="sum")
    found = momentum_nce(query, key, queue, temperature=0.1, cells=cells)
    assert found.item() == pytest.approx(expected.item(), rel=1e-12)
    one, other = (torch.autograd.grad(loss, query)[0] for loss in (found, expected))
    torch.testing.assert_close(one, other, rtol=1e-10, atol=1e-12)
    assert torch.autograd.gradcheck(lambda q: momentum_nce(q, key, queue, temperature=0.5), (query,))


@pytest.mark.parametrize("size", [1, 63])
def test_all_alike_cost_the_log_of_the_queue_and_one(size: int) -> None:
    alike = torch.eye(3, dtype=torch.float64)[:1]
    loss = momentum_nce(alike.repeat(4, 1), alike.repeat(4, 1), alike.repeat(size, 1)) / 4
    assert loss.item() == pytest.approx(math.log(size + 1), rel=1e-12)


def algorithm_1(batches: Sequence[Batch]) -> dict[str, Any]:
    """The paper's pseudo-code, with modules of torch."""
    f_q = Tower()
    f_k = copy.deepcopy(f_q)
    first = torch.randn(QUEUE, WIDTH, generator=torch.Generator().manual_seed(0)).double()
    queue, losses = list(functional.normalize(first, dim=1)), []
    for whole in batches:
        x = whole.media["image"].values
        q = functional.normalize(f_q.tower(x[::2]), dim=1)
        k = functional.normalize(f_k.tower(x[1::2]), dim=1).detach()
        logits = torch.cat([(q * k).sum(1, keepdim=True), q @ torch.stack(queue).T], 1)
        loss = functional.cross_entropy(logits / 0.2, torch.zeros(len(q), dtype=torch.long))
        losses.append(loss.item())
        gradients = torch.autograd.grad(loss, [*f_q.parameters()])
        with torch.no_grad():
            for weight, gradient in zip(f_q.parameters(), gradients, strict=True):
                weight.sub_(RATE * gradient)
            for slow, weight in zip(f_k.parameters(), f_q.parameters(), strict=True):
                slow.copy_(0.7 * slow + 0.3 * weight)
        queue = [*queue, *k][-QUEUE:]
    return {"losses": losses, "f_q": f_q, "f_k": f_k, "queue": torch.stack(queue)}


@pytest.mark.row("S2-23")
def test_it_is_the_papers_algorithm() -> None:
    """Classes are unknown to the paper, so they are here."""
    batches = [views([IGNORE] * 12, seed=at) for at in range(STEPS)]
    expected, model = algorithm_1(batches), Tower()
    objective, losses = built(model), []
    for at, whole in enumerate(batches):
        objective.pace(at, STEPS)
        gradient, sums = step(model, objective, pieces(whole, [5]))
        losses.append(sums.loss)
        with torch.no_grad():
            for name, weight in model.named_parameters():
                weight.sub_(RATE * gradient[name])
    objective.pace(STEPS, STEPS)
    assert losses == pytest.approx(expected["losses"], rel=1e-12)
    torch.testing.assert_close(objective.keys, expected["queue"], rtol=1e-12, atol=1e-13)
    for slow, right in (("f_q", dict(model.named_parameters())), ("f_k", dict(objective.key.named_buffers()))):
        for name, weight in expected[slow].named_parameters():
            torch.testing.assert_close(right[name], weight.detach(), rtol=1e-12, atol=1e-13)


# --- the queue and the copy ----------------------------------------------------------------------------------------


@pytest.mark.row("S2-23")
@given(sizes=st.lists(st.integers(2, 9), min_size=1, max_size=5), length=st.integers(1, 12))
@settings(max_examples=15)
def test_the_queue_holds_the_last_keys_in_the_order_of_rows(sizes: list[int], length: int) -> None:
    model = Tower()
    objective = built(model, queue=length)
    expected = objective.keys
    for at, size in enumerate(sizes):
        whole = views([IGNORE] * size, seed=at)
        with torch.no_grad():
            keys = objective.embed(model, whole).vectors["key"]
        step(model, objective, pieces(whole, [1]))
        expected = torch.cat([expected, keys])[-length:]
        assert objective.queue.shape == (length, WIDTH)
        torch.testing.assert_close(objective.keys, expected, rtol=1e-12, atol=1e-13)
    assert int(objective.head) == sum(sizes) % length


@pytest.mark.row("S2-23")
@pytest.mark.parametrize("momentum", [0.0, 0.9, 0.999])
def test_the_copy_follows_by_the_formula_once_a_step(momentum: float) -> None:
    model = Tower()
    objective = built(model, momentum=momentum)
    expected = {name: weight.detach().clone() for name, weight in model.named_parameters()}
    for at in range(3):
        step(model, objective, [views(seed=at)])
        with torch.no_grad():
            for weight in model.parameters():
                weight.add_(torch.randn_like(weight))
        for _ in range(2):  # the second time there is nothing to follow
            objective.pace(at + 1, 3)
        expected = {n: momentum * expected[n] + (1 - momentum) * w.detach() for n, w in model.named_parameters()}
        for name, slow in objective.key.named_buffers():
            torch.testing.assert_close(slow, expected[name], rtol=1e-14, atol=1e-15)


@pytest.mark.row("S2-23")
def test_no_gradient_goes_through_keys() -> None:
    model, whole = Tower(), views()
    objective = built(model)
    found = objective.embed(model, whole)
    assert found.vectors["query"].requires_grad
    assert not found.vectors["key"].requires_grad
    assert [*objective.parameters()] == []
    assert all(not buffer.requires_grad for buffer in objective.buffers())
    objective.loss(found)["moco"].backward()
    assert all(buffer.grad is None for buffer in objective.buffers())


def test_what_does_not_learn_is_not_copied() -> None:
    model = Tower()
    model.tower[0].requires_grad_(False)
    assert set(dict(built(model).key.named_buffers())) == {n for n, w in model.named_parameters() if w.requires_grad}
    half = built(Tower().bfloat16())
    assert {buffer.dtype for buffer in half.key.buffers()} == {torch.float32}  # a thousandth of a step is kept


def test_nothing_moves_without_gradients() -> None:
    model = Tower()
    objective = built(model)
    step(model, objective, [views()])
    before = state(model, objective)
    with torch.no_grad():
        objective(model, views(seed=1))
    same(state(model, objective), before)


def test_a_key_of_the_querys_class_is_no_negative() -> None:
    model = Tower()
    objective = built(model, queue=6)
    step(model, objective, [views([0, 1, 2, IGNORE, 1, 0])])
    found = objective.embed(model, views([1, IGNORE], seed=1))
    query, key = found.vectors["query"], found.vectors["key"]
    expected = momentum_nce(query[:1], key[:1], objective.queue[[0, 2, 3, 5]], temperature=0.2)
    expected = expected + momentum_nce(query[1:], key[1:], objective.queue, temperature=0.2)
    with torch.no_grad():
        assert objective.loss(found)["moco"].item() == pytest.approx(expected.item(), rel=1e-12)
    step(model, objective, [views([3] * 6)])
    with pytest.raises(DataError, match="all 6 keys in the queue are of class 3"):
        objective(model, views([3, 1]))


@pytest.mark.parametrize("at", [0, 1])
def test_views_of_several_lines_are_taken_apart(at: int) -> None:
    grid = torch.tensor([[1, 2, 1], [1, 1, 1], [1, 1, 3], [2, 1, 1]])
    whole = replace(
        views([0, 1]),
        media={"image": Patches(values=torch.arange(8.0)[:, None], grid=grid)},
        item_row={"image": torch.tensor([1, 0, 0, 1])},
    )
    found = take_view(whole, at)
    assert found.media["image"].values[:, 0].tolist() == [[2, 0, 1], [3, 4, 5, 6, 7]][at]
    assert found.media["image"].grid.tolist() == [grid[[1, 0]].tolist(), grid[[2, 3]].tolist()][at]
    assert found.item_row["image"].tolist() == [0, 1]


# --- a whole run ---------------------------------------------------------------------------------------------------


class Views:
    """Six rows a step in two pieces, in float32."""

    def __init__(self, *, of: Sequence[int] = range(9), broken: Sequence[int] = (), cut: Sequence[int] = (2,)) -> None:
        self.of, self.broken, self.cut = of, broken, cut

    def step_batches(self, step: int) -> list[Batch]:
        whole = views([0, 1, IGNORE, 2, 1, 3], seed=self.of[step])
        values = whole.media["image"].values.float()
        if step in self.broken:
            values[4] = math.nan
        whole = replace(whole, media={"image": Patches(values=values, grid=whole.media["image"].grid)})
        return pieces(whole, self.cut)


def run(folder: Path, batches: Views, *, steps: int, model: nn.Module | None = None, **how: Any) -> dict[str, Tensor]:
    model = model or Tower().float()
    objective = built(model, queue=QUEUE)
    plain: dict[str, Any] = {
        "optimizer": SGD(momentum=0.9),
        "rates": Rates(lr=0.05),
        "schedule": Constant(),
        "context": {"steps": 6},
    }
    train(folder, model=model, objective=objective, batches=batches, steps=steps, **(plain | how))
    return state(model, objective)


@pytest.mark.row("S2-23")
@pytest.mark.parametrize("at", [1, 2, 5])
def test_a_run_that_was_stopped_goes_on_to_the_same_bits(tmp_path: Path, at: int) -> None:
    expected = run(tmp_path / "whole", Views(), steps=6)

    def stop(now: int, _: object) -> None:
        if now == at:
            os.kill(os.getpid(), signal.SIGTERM)

    with pytest.raises(Stopped):
        run(tmp_path / "parts", Views(), steps=6, on_step=stop)
    same(run(tmp_path / "parts", Views(), steps=6), expected)
    assert int(expected["objective.stepped"]) == 1
    last = "checkpoints/000006/resume/weights.safetensors"
    assert files(tmp_path / "parts")[last] == files(tmp_path / "whole")[last]


@pytest.mark.row("S2-23")
@pytest.mark.parametrize("cut", [(), (2,)])
def test_a_step_that_is_left_out_leaves_nothing(tmp_path: Path, cut: tuple[int, ...]) -> None:
    """Step 3 is not a number: all ends as if it had not been."""
    expected = run(tmp_path / "five", Views(of=(0, 1, 3, 4, 5), cut=cut), steps=5)
    same(run(tmp_path / "six", Views(broken=(2,), cut=cut), steps=6), expected)


class Small(Tower):
    """No more than three rows at once."""

    def forward(self, batch: Batch) -> tuple[Tensor, Tensor]:
        if len(batch.labels) > 3:
            raise torch.OutOfMemoryError("CUDA out of memory.")
        return super().forward(batch)


@pytest.mark.row("S2-23")
def test_a_step_done_again_in_smaller_pieces_queues_its_keys_once(tmp_path: Path) -> None:
    expected = run(tmp_path / "large", Views(cut=()), steps=3)
    found = run(tmp_path / "small", Views(cut=()), steps=3, model=Small().float())
    for name, right in expected.items():
        torch.testing.assert_close(found[name], right, rtol=1e-4, atol=1e-5)
    assert int(found["objective.head"]) == 3 * 6 % QUEUE


# --- what is refused -----------------------------------------------------------------------------------------------


@pytest.mark.row("S2-23")
def test_batch_norm_that_takes_statistics_is_refused_and_a_frozen_one_is_exact() -> None:
    model = Tower(nn.BatchNorm1d(6))
    with pytest.raises(ConfigError, match=r"tower\.1 takes the statistics of a batch"):
        built(model).embed(model, views())
    model.tower[1].eval()
    whole, parts = (step(model, built(model), pieces(views(), cut))[0] for cut in ((), (5,)))
    for name, gradient in whole.items():
        torch.testing.assert_close(parts[name], gradient, rtol=1e-10, atol=1e-13)


def test_a_weight_that_begins_to_learn_later_is_refused() -> None:
    model = Tower()
    model.tower[0].requires_grad_(False)
    objective = built(model)
    model.requires_grad_(True)
    with pytest.raises(ConfigError, match=r"tower.0.weight learns, and did not when the copy was made"):
        objective.embed(model, views())


def test_vectors_of_another_width_are_refused() -> None:
    model = Tower()
    with pytest.raises(ConfigError, match=f"vectors are {WIDTH} wide, the queue 7"):
        built(model, width=7)(model, views())


def test_a_row_without_two_views_is_named() -> None:
    model = Tower()
    with pytest.raises(DataError, match="1 view where 2 must be") as caught:
        built(model)(model, views([0, 1], each=1))
    assert caught.value.place == "sample s0"


def test_a_batch_of_one_has_the_queue_to_be_told_from() -> None:
    model = Tower()
    gradient, sums = step(model, built(model), [views([IGNORE])])
    assert sums.loss > 0
    assert any(g.any() for g in gradient.values())


@pytest.mark.parametrize(
    ("how", "match"),
    [
        ({"momentum": 1.0}, "momentum"),
        ({"momentum": -0.1}, "momentum"),
        ({"queue": 0}, "queue"),
        ({"temperature": 0.0}, "temperature"),
    ],
)
def test_what_is_out_of_range_is_refused(how: dict[str, Any], match: str) -> None:
    with pytest.raises(ConfigError, match=match):
        built(Tower(), **how)
    with pytest.raises(ConfigError, match="nothing in the model learns"):
        built(Tower().requires_grad_(False))


def test_the_loop_knows_what_it_is() -> None:
    objective = built(Tower())
    assert isinstance(objective, Pairwise)
    assert isinstance(objective, Paced)
    assert momentum_run(lambda whole: [whole])["losses"][0] > 0
