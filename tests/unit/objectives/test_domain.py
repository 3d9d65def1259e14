"""CORAL, MMD and DANN against numpy and derivatives by hand; batches in pieces; the pace of the reversed gradient."""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tests.rank_script import cases_of
from tests.tiny_run import files, train
from tests.unit.objectives.domain_ranks import (
    KINDS,
    LABELS,
    Reader,
    batch,
    gradients,
    judge,
    objective,
    pieces,
    weights,
)
from torch import Tensor, nn

from plait.core.errors import DataError
from plait.core.protocols import Paced, Pairwise
from plait.core.tensors import IGNORE, Batch
from plait.objectives.domain import SCALES, Adversarial, Aligned, Distance, coral, mmd, reverse_gradient

DISTANCES: tuple[Distance, ...] = (coral, mmd)
sizes = st.tuples(st.integers(2, 9), st.integers(2, 9), st.integers(1, 6), st.integers(0, 999))


def two(n: int, m: int, d: int, seed: int) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    one, other = (torch.randn(k, d, dtype=torch.float64, generator=generator) for k in (n, m))
    return one.requires_grad_(), (1.5 * other + 0.5).requires_grad_()


# --- CORAL and MMD ---------------------------------------------------------------------------------------------------


@pytest.mark.row("S0-53")
@settings(deadline=None, max_examples=40)
@given(sizes)
def test_coral_is_its_closed_form_and_so_is_its_gradient(of: tuple[int, int, int, int]) -> None:
    source, target = two(*of)
    found = coral(source, target)
    found.backward()
    s, t = source.detach().numpy(), target.detach().numpy()
    d = s.shape[1]
    apart = np.cov(s.T).reshape(d, d) - np.cov(t.T).reshape(d, d)
    assert found.item() == pytest.approx(np.linalg.norm(apart) ** 2 / (4 * d * d), rel=1e-10, abs=1e-14)
    # Sun and Saenko, equations 4 and 5: centered rows times the difference, over d^2 (n - 1).
    for rows, gradient, sign in ((s, source.grad, 1), (t, target.grad, -1)):
        expected = sign * (rows - rows.mean(0)) @ apart / (d * d * (len(rows) - 1))
        np.testing.assert_allclose(gradient, expected, rtol=1e-9, atol=1e-12)


def brute_mmd(s: np.ndarray, t: np.ndarray, *, bandwidth: float, scales: Sequence[float]) -> tuple[float, np.ndarray]:
    """Pair by pair; and the gradient by every row of both."""
    rows = np.concatenate([s, t])
    weight = np.concatenate([np.full(len(s), 1 / len(s)), np.full(len(t), -1 / len(t))])
    value, gradient = 0.0, np.zeros_like(rows)
    for i, x in enumerate(rows):
        for j, y in enumerate(rows):
            for u in scales:
                k = math.exp(-float((x - y) @ (x - y)) / (u * bandwidth)) / len(scales)
                value += weight[i] * weight[j] * k
                slope = weight[i] * weight[j] * k * -2 / (u * bandwidth) * (x - y)
                gradient[i] += slope
                gradient[j] -= slope
    return value, gradient


@pytest.mark.row("S0-53")
@settings(deadline=None, max_examples=30)
@given(sizes, st.sampled_from([None, 0.7, 3.0]), st.sampled_from([(1.0,), SCALES]))
def test_mmd_is_the_sum_over_pairs_and_so_is_its_gradient(
    of: tuple[int, int, int, int], bandwidth: float | None, scales: tuple[float, ...]
) -> None:
    source, target = two(*of)
    found = mmd(source, target, bandwidth=bandwidth, scales=scales)
    found.backward()
    s, t = source.detach().numpy(), target.detach().numpy()
    both = np.concatenate([s, t])
    squared = [float((x - y) @ (x - y)) for i, x in enumerate(both) for j, y in enumerate(both) if i != j]
    width = float(np.mean(squared)) if bandwidth is None else bandwidth
    value, gradient = brute_mmd(s, t, bandwidth=width, scales=scales)
    assert found.item() == pytest.approx(value, rel=1e-9, abs=1e-12)
    assert source.grad is not None
    assert target.grad is not None
    np.testing.assert_allclose(torch.cat([source.grad, target.grad]), gradient, rtol=1e-8, atol=1e-11)


@pytest.mark.row("S0-53")
@pytest.mark.parametrize("distance", DISTANCES)
@settings(deadline=None, max_examples=30)
@given(of=sizes)
def test_what_every_distance_keeps(distance: Distance, of: tuple[int, int, int, int]) -> None:
    source, target = (x.detach() for x in two(*of))
    found = distance(source, target).item()
    close = partial(pytest.approx, rel=1e-9, abs=1e-12)
    assert found >= -1e-12
    assert distance(source, source.clone()).item() == close(0)
    assert distance(target, source).item() == close(found)
    order = torch.randperm(len(source), generator=torch.Generator().manual_seed(of[3]))
    assert distance(source[order], source).item() == close(0)
    assert distance(source[order], target).item() == close(found)
    assert distance(source + 7, target + 7).item() == close(found)
    turn = torch.linalg.qr(torch.randn(of[2], of[2], dtype=torch.float64))[0]
    assert distance(source @ turn, target @ turn).item() == close(found)


@pytest.mark.row("S0-53")
def test_coral_does_not_see_a_shift_of_one_domain_and_mmd_does() -> None:
    source, _ = two(20, 20, 4, 0)
    moved = source + torch.tensor([3.0, 0, 0, 0], dtype=torch.float64)
    assert coral(source, moved).item() == pytest.approx(0, abs=1e-12)
    assert mmd(source, moved).item() > 0.1


@pytest.mark.parametrize("distance", DISTANCES)
@settings(deadline=None, max_examples=20)
@given(of=sizes, seed=st.integers(0, 99))
def test_shares_of_rows_add_up_to_the_distance_and_its_gradient(
    distance: Distance, of: tuple[int, int, int, int], seed: int
) -> None:
    source, target = two(*of)
    whole = distance(source, target)
    expected = torch.autograd.grad(whole, (source, target))
    generator = torch.Generator().manual_seed(seed)
    owner = [torch.randint(3, (len(x),), generator=generator) for x in (source, target)]
    parts = [
        distance(source, target, of=((owner[0] == k).nonzero()[:, 0], (owner[1] == k).nonzero()[:, 0]))
        for k in range(3)
    ]
    total = torch.stack(parts).sum()
    torch.testing.assert_close(total, whole, rtol=1e-10, atol=1e-13)
    torch.testing.assert_close(torch.autograd.grad(total, (source, target)), expected, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("at", [0.0, 3.0])
def test_equal_features_have_no_distance_and_a_gradient_that_is_finite(at: float) -> None:
    one, other = (torch.full((4, 3), at).requires_grad_() for _ in range(2))
    for distance in DISTANCES:
        found = distance(one, other)
        assert found.item() == pytest.approx(0, abs=1e-6)
        assert all(bool(g.isfinite().all()) for g in torch.autograd.grad(found, (one, other)))


def test_autocast_does_not_make_them_coarse() -> None:
    source, target = (x.detach().float() + 50 for x in two(9, 8, 4, 1))
    for distance in DISTANCES:
        with torch.autocast("cpu", dtype=torch.bfloat16):
            found = distance(source, target)
        assert found.dtype == torch.float32
        assert found.item() == pytest.approx(distance(source.double(), target.double()).item(), rel=1e-3)
        assert distance(source.bfloat16(), target.bfloat16()).dtype == torch.float32


# --- objectives ------------------------------------------------------------------------------------------------------


@pytest.mark.row("S0-53")
@pytest.mark.parametrize("kind", ["coral", "mmd", "dann"])
@pytest.mark.parametrize("cuts", [(5,), (7,), (1, 2, 9), tuple(range(1, 13))])
def test_a_batch_in_pieces_has_the_loss_and_the_gradient_of_the_whole(kind: str, cuts: tuple[int, ...]) -> None:
    """Pieces of one domain alone, and of one row, too."""
    whole = batch(LABELS)
    expected, at_once = gradients(objective(kind), [whole], **weights(kind))
    found, sums = gradients(objective(kind), pieces(whole, cuts), **weights(kind))
    assert sums.terms == pytest.approx(dict(at_once.terms), rel=1e-10)
    for name, gradient in expected.items():
        torch.testing.assert_close(found[name], gradient, rtol=1e-8, atol=1e-12, msg=name)


@pytest.mark.row("S0-53")
def test_processes_have_the_loss_and_the_gradient_of_one() -> None:
    """Two, with a domain each; and three, one of which has rows of one domain alone."""
    found = cases_of(Path(__file__).with_name("domain_ranks.py"))
    for kind in KINDS:
        expected, at_once = gradients(objective(kind), [batch(LABELS)], **weights(kind))
        for world in ("2", "3"):
            assert len(found[world]) == int(world)
            for rank in found[world]:
                assert rank[kind]["terms"] == pytest.approx(dict(at_once.terms), rel=1e-10)
                for name, gradient in expected.items():
                    here = torch.tensor(rank[kind]["gradient"][name], dtype=torch.float64)
                    torch.testing.assert_close(here, gradient, rtol=1e-8, atol=1e-12, msg=f"{kind} {name}")


@pytest.mark.row("S0-53")
@pytest.mark.parametrize("distance", DISTANCES)
def test_the_terms_are_the_mean_cross_entropy_and_the_distance(distance: Distance) -> None:
    whole, model = batch(LABELS), Reader()
    features, scores = model(whole)
    _, sums = gradients(Aligned(distance), [whole])
    assert sums.terms["align"] == pytest.approx(distance(features[:7], features[7:]).item(), rel=1e-10)
    expected = nn.functional.cross_entropy(scores[:7], torch.tensor(LABELS[:7]))
    assert sums.terms["class"] == pytest.approx(expected.item(), rel=1e-10)
    assert sums.counts == {"class": 7, "align": 13}
    assert isinstance(Aligned(distance), Pairwise)


@pytest.mark.parametrize("labels", [[0, 1, 2], [IGNORE] * 3 + [1]])
def test_a_batch_of_one_domain_is_refused(labels: list[int]) -> None:
    labeled = sum(label != IGNORE for label in labels)
    with pytest.raises(DataError, match=f"a batch has {labeled} labeled rows .* and {len(labels) - labeled} without"):
        gradients(Aligned(coral), [batch(labels)])


# --- the reversed gradient -------------------------------------------------------------------------------------------


@pytest.mark.row("S0-53")
@settings(deadline=None, max_examples=30)
@given(st.integers(0, 999), st.floats(0, 3))
def test_the_reversed_gradient_is_the_derivative_by_hand(seed: int, factor: float) -> None:
    """Features f = x w, judged z = f v: d/dv = sum (sigma(z) - y) f, d/dw = -factor sum (sigma(z) - y) x v."""
    generator = torch.Generator().manual_seed(seed)
    x, w, v = (torch.randn(n, m, dtype=torch.float64, generator=generator) for n, m in ((6, 4), (4, 3), (3, 1)))
    y = torch.randint(2, (6, 1), generator=generator).double()
    w.requires_grad_()
    v.requires_grad_()
    features = x @ w
    z = reverse_gradient(features, factor) @ v
    nn.functional.binary_cross_entropy_with_logits(z, y, reduction="sum").backward()
    with torch.no_grad():
        wrong = z.sigmoid() - y
        by_hand = {"v": features.T @ wrong, "w": -factor * x.T @ (wrong @ v.T)}
    torch.testing.assert_close(v.grad, by_hand["v"], rtol=1e-10, atol=1e-12)
    torch.testing.assert_close(w.grad, by_hand["w"], rtol=1e-10, atol=1e-12)
    assert torch.equal(reverse_gradient(features, factor), features)


@pytest.mark.row("S0-53")
def test_dann_is_two_losses_whose_second_is_reversed_for_the_features_alone() -> None:
    whole, model, by = batch(LABELS), Reader(), judge()
    found, sums = gradients(Adversarial(by, strength=0.4), [whole])
    features, scores = model(whole)
    of_class = nn.functional.cross_entropy(scores[:7], torch.tensor(LABELS[:7]))
    is_source = (torch.arange(13) < 7).double()
    of_domain = nn.functional.binary_cross_entropy_with_logits(by(features)[:, 0], is_source)
    assert sums.terms == pytest.approx({"class": of_class.item(), "domain": of_domain.item()})
    weights = dict(model.tower.named_parameters(prefix="tower"))
    one = torch.autograd.grad(of_class, list(weights.values()), retain_graph=True)
    other = torch.autograd.grad(of_domain, list(weights.values()), retain_graph=True)
    for name, a, b in zip(weights, one, other, strict=True):
        torch.testing.assert_close(found[name], a - 0.4 * b, rtol=1e-9, atol=1e-12)
    weight, bias = torch.autograd.grad(of_domain, list(by.parameters()))
    torch.testing.assert_close(found["judge.weight"], weight)
    torch.testing.assert_close(found["judge.bias"], bias)


@given(st.integers(0, 100), st.floats(0.1, 2), st.floats(0.5, 20))
def test_the_pace_is_the_papers(step: int, strength: float, steepness: float) -> None:
    one = Adversarial(nn.Linear(2, 1), strength=strength, steepness=steepness)
    assert one.factor == strength
    one.pace(step, 100)
    assert one.factor == pytest.approx(strength * (2 / (1 + math.exp(-steepness * step / 100)) - 1), abs=1e-12)


class Told(Adversarial):
    """Writes down every factor that a loss was taken with."""

    def __init__(self) -> None:
        super().__init__(judge(), strength=0.5)
        self.factors: list[float] = []

    def forward(self, model: nn.Module, batch: Batch) -> Any:
        self.factors.append(self.factor)
        return super().forward(model, batch)


class Stream:
    def step_batches(self, step: int) -> list[Batch]:
        return pieces(batch(LABELS, seed=step), (6,))


@pytest.mark.row("S0-53")
def test_the_loop_tells_the_pace_and_a_stopped_run_ends_with_the_same_bits(tmp_path: Path) -> None:
    through, stopped = Told(), Told()
    assert isinstance(through, Paced)
    train(tmp_path / "through", model=Reader(), batches=Stream(), objective=through, steps=6)
    expected = [0.5 * (2 / (1 + math.exp(-10 * step / 6)) - 1) for step in range(6) for _ in range(2)]
    assert through.factors == pytest.approx(expected)

    def stop(step: int, _: Any) -> None:
        if step == 3:
            raise RuntimeError("pulled")

    with pytest.raises(RuntimeError, match="pulled"):
        train(tmp_path / "two", model=Reader(), batches=Stream(), objective=stopped, steps=6, on_step=stop)
    again = Told()
    result = train(tmp_path / "two", model=Reader(), batches=Stream(), objective=again, steps=6)
    assert result.resumed_from == 2
    assert again.factors == pytest.approx(expected[4:])
    assert files(tmp_path / "two") == files(tmp_path / "through")
