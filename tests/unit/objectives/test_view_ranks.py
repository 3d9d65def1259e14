"""Every loss over views: micro-batches, and real processes over gloo, give the gradient of the batch in one piece."""

from __future__ import annotations

import json
import math
import shutil
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tests.rank_script import cases_of
from tests.tiny_run import CPU
from tests.unit.objectives.view_ranks import (
    CLASSES,
    CUTS,
    KINDS,
    QUEUE,
    STEPS,
    WIDTH,
    Tower,
    momentum_fit,
    momentum_run,
    pieces,
    step,
    views,
)
from tests.unit.training.pairwise_model import distance, dual, pairs

from plait.core.protocols import Pairwise
from plait.core.tensors import Batch, Patches
from plait.objectives.hardness import HardContrastive
from plait.objectives.momentum import MomentumContrast
from plait.training import blame
from plait.training.gradient_check import check_gradients
from plait.training.settings import Settings
from plait.training.state import TrainState

BOUND = 1e-10


def cuts() -> Any:
    return st.lists(st.integers(1, len(CLASSES) - 1), unique=True, max_size=5).map(sorted)


# --- one process ---------------------------------------------------------------------------------------------------


@pytest.mark.row("S2-26")
@pytest.mark.parametrize("kind", KINDS)
@settings(max_examples=5)
@given(cuts=cuts(), seed=st.integers(0, 100))
def test_micro_batches_give_the_gradient_of_the_whole_batch(kind: str, cuts: list[int], seed: int) -> None:
    model, loss, whole = Tower(), KINDS[kind](), views(seed=seed)
    expected, at_once = step(model, loss, [whole])
    found, in_parts = step(model, loss, pieces(whole, cuts))
    assert isinstance(loss, Pairwise)
    assert distance(found, expected) <= BOUND
    assert in_parts.counts == at_once.counts
    assert in_parts.loss == pytest.approx(at_once.loss, rel=BOUND)


@pytest.mark.parametrize("kind", KINDS)
def test_losses_of_the_parts_would_fail_the_same_bound(kind: str) -> None:
    whole = views([0, 0, 1, 1, 1, 2, 0, 0, 2, 2, 1, 1])
    expected, _ = step(Tower(), KINDS[kind](), [whole])
    parts = [step(Tower(), KINDS[kind](), [piece])[0] for piece in pieces(whole, [6])]
    assert distance({name: (parts[0][name] + parts[1][name]) / 2 for name in expected}, expected) > 1e-3


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("cells", [1, 50])
def test_blocks_of_rows_give_the_same_value_and_gradient(kind: str, cells: int) -> None:
    whole = views()
    expected, at_once = step(Tower(), KINDS[kind](), [whole])
    found, in_blocks = step(Tower(), KINDS[kind](cells=cells), pieces(whole, [5]))
    assert distance(found, expected) <= BOUND
    assert in_blocks.loss == pytest.approx(at_once.loss, rel=BOUND)


def as_in(result: dict[str, Any], expected: dict[str, Any], *, bound: float = BOUND) -> None:
    assert result.keys() == expected.keys()
    for name, value in expected.items():
        found, right = (torch.tensor(v, dtype=torch.float64) for v in (result[name], value))
        assert float((found - right).norm()) <= bound * float(right.norm()), name


@pytest.mark.row("S2-23")
@settings(max_examples=5)
@given(cuts=cuts())
def test_micro_batches_fill_the_queue_as_the_whole_batch_does(cuts: list[int]) -> None:
    as_in(momentum_run(lambda whole: pieces(whole, cuts)), momentum_run(lambda whole: [whole]))


@pytest.mark.parametrize("kind", KINDS)
@given(first=st.integers(0, len(CLASSES)), seed=st.integers(0, 100))
@settings(max_examples=5)
def test_sums_over_rows_add_up(kind: str, first: int, seed: int) -> None:
    loss = KINDS[kind]()
    with torch.no_grad():
        found = loss.embed(Tower(), views(seed=seed))
        parts = [loss.loss(found, rows=rows) for rows in (range(first), range(first, len(CLASSES)))]
        for name, value in loss.loss(found).items():
            assert sum(part[name].item() for part in parts) == pytest.approx(value.item(), rel=1e-12)


class Same:
    """One batch, at every step."""

    def step_batches(self, step: int) -> list[Batch]:
        return [views()]


@pytest.mark.parametrize("kind", ["nt-xent", "triplet semi-hard, all", "triplet all, active", "moco"])
def test_a_users_own_check_of_gradients_finds_nothing(kind: str) -> None:
    """`plait doctor gradients` as Python: orders, cuts, and all put back."""
    model = Tower()
    loss = KINDS[kind]() if kind in KINDS else MomentumContrast(model, width=WIDTH, queue=QUEUE)
    before = TrainState(model, loss).digest()
    found = list(check_gradients(model, loss, Same(), settings=Settings(steps=1, compute=CPU)))
    assert [f for f in found if f.status == "fail"] == []
    assert any(f.name.startswith("split") for f in found)
    assert TrainState(model, loss).digest() == before


# --- several processes ---------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("ranks")


@pytest.fixture(scope="module")
def ranks(folder: Path) -> dict[str, list[dict[str, Any]]]:
    """What 2 and 3 real processes find, over gloo."""
    return cases_of(Path(__file__).with_name("view_ranks.py"), str(folder))


@pytest.mark.row("S2-26")
@pytest.mark.parametrize("world", [2, 3])
@pytest.mark.parametrize("kind", KINDS)
def test_ranks_give_the_gradient_of_one_process(kind: str, world: int, ranks: dict[str, list[dict[str, Any]]]) -> None:
    expected, sums = step(Tower(), KINDS[kind](), [views()])
    for rank in ranks[str(world)]:
        gradient = {name: torch.tensor(g, dtype=torch.float64) for name, g in rank[kind]["gradient"].items()}
        assert distance(gradient, expected) <= BOUND
        assert rank[kind]["terms"] == pytest.approx(dict(sums.terms), rel=BOUND)


@pytest.mark.row("S4-51")
@pytest.mark.parametrize("world", [2, 3])
def test_ranks_weigh_hard_pairs_as_one_process(world: int, ranks: dict[str, list[dict[str, Any]]]) -> None:
    expected, sums = step(dual(), HardContrastive(), pairs(batch_size=13).step_batches(0))
    for rank in ranks[str(world)]:
        found = {name: torch.tensor(g, dtype=torch.float64) for name, g in rank["hard pairs"]["gradient"].items()}
        assert distance(found, expected) <= BOUND
        assert rank["hard pairs"]["terms"] == pytest.approx(dict(sums.terms), rel=BOUND)


def in_order_of_ranks(world: int, whole: Batch) -> list[Batch]:
    every = pieces(whole, CUTS[world])
    return [part for rank in range(world) for part in every[rank::world]]


@pytest.mark.row("S2-23")
@pytest.mark.parametrize("world", [2, 3])
def test_ranks_fill_the_queue_as_one_process(world: int, ranks: dict[str, list[dict[str, Any]]]) -> None:
    """Weights, their copy and the queue after some steps; 12 keys a step in a queue of 17, so it wraps around."""

    expected = momentum_run(partial(in_order_of_ranks, world))
    assert expected["objective.head"] == STEPS * len(CLASSES) % QUEUE
    for rank in ranks[str(world)]:
        as_in(rank["moco"], expected)
    assert len({json.dumps(rank["moco"]["objective.queue"]) for rank in ranks[str(world)]}) == 1  # to the bit


@pytest.mark.row("S2-23")
@pytest.mark.parametrize("world", [2, 3])
def test_a_run_in_ranks_goes_on_in_one_process(
    world: int, ranks: dict[str, list[dict[str, Any]]], folder: Path, tmp_path: Path
) -> None:
    """The loop itself; then its second half again, from a checkpoint of several processes, in one."""
    micro_of = partial(in_order_of_ranks, world)
    expected = momentum_fit(tmp_path / "one", micro_of)
    for rank in ranks[str(world)]:
        as_in(rank["moco, fitted"], expected)
    shutil.copytree(folder / str(world) / "0", tmp_path / "several")
    shutil.rmtree(tmp_path / "several/checkpoints/000004")
    as_in(momentum_fit(tmp_path / "several", micro_of), expected)


# --- a number that is not one --------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", [*KINDS, "moco"])
@pytest.mark.parametrize("cut", [(), (5,)])
def test_one_row_that_is_not_a_number_is_named(kind: str, cut: tuple[int, ...]) -> None:
    whole, model = views(), Tower()
    values = whole.media["image"].values.clone()
    values[2 * 7] = math.nan
    whole = replace(whole, media={"image": Patches(values=values, grid=whole.media["image"].grid)})
    loss = KINDS[kind]() if kind in KINDS else MomentumContrast(model, width=WIDTH, queue=QUEUE)
    found, sums = step(model, loss, pieces(whole, cut))
    assert not math.isfinite(sums.loss)
    assert not sums.complete
    assert "s7" in sums.not_finite
    assert all(not g.any() for g in found.values())
    assert blame.not_finite(model, loss, pieces(whole, cut), around=torch.no_grad).samples == ("s7",)
