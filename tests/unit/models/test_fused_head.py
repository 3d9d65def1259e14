"""Head and loss in one: values and gradients are those of all scores at once, and never are there so many numbers."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn import functional
from torch.utils._python_dispatch import TorchDispatchMode

from plait.models import fused_head
from plait.models.fused_head import fuses, token_logprobs
from plait.models.head_room import ACCELERATED, SCORES
from plait.models.output_head import float32_scores
from plait.models.recompute import WIDE
from plait.training import cost
from plait.training.precision import autocast


def drawn(
    n: int, d: int, v: int, *, dtype: torch.dtype = torch.float64, bias: bool = True, seed: int = 0
) -> tuple[nn.Linear, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    head = nn.Linear(d, v, bias=bias)
    for weight in head.parameters():
        weight.data = torch.randn(weight.shape, generator=generator)
    hidden = torch.randn(n, d, generator=generator).to(dtype).requires_grad_(True)
    return head.to(dtype), hidden, torch.randint(0, v, (n,), generator=generator)


def gradients(loss: Tensor, head: nn.Linear, hidden: Tensor) -> list[Tensor]:
    wanted = [hidden, *(w for w in head.parameters() if w.requires_grad)]
    return list(torch.autograd.grad(loss, wanted))


@settings(deadline=None, max_examples=60)
@given(
    n=st.integers(0, 9),
    v=st.integers(1, 40),
    room=st.integers(1, 200),
    bias=st.booleans(),
    learns=st.booleans(),
    summed=st.booleans(),
    seed=st.integers(0, 10**6),
)
def test_values_and_gradients_are_those_of_cross_entropy(
    n: int, v: int, room: int, bias: bool, learns: bool, summed: bool, seed: int
) -> None:
    head, hidden, targets = drawn(n, 5, v, bias=bias, seed=seed)
    head.requires_grad_(learns)
    shares = torch.ones(n, dtype=torch.float64) if summed else torch.randn(n, dtype=torch.float64)
    found = token_logprobs(head, hidden, targets, scores=room)
    wanted = -functional.cross_entropy(head(hidden), targets, reduction="none")
    torch.testing.assert_close(found, wanted, rtol=1e-12, atol=1e-12)
    ours = gradients(found @ shares * 0.3, head, hidden)
    theirs = gradients(wanted @ shares * 0.3, head, hidden)
    for one, other in zip(ours, theirs, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("learns", [False, True])
@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
def test_every_format_gives_what_float32_scores_give(dtype: torch.dtype, learns: bool, precision: str) -> None:
    head, hidden, targets = drawn(50, 24, 5_000, dtype=dtype)
    head.requires_grad_(learns)
    with autocast("cpu", precision):
        found = token_logprobs(head, hidden, targets, scores=5_000 * 7)
        wanted = -functional.cross_entropy(float32_scores(head, hidden), targets, reduction="none")
    assert found.dtype == torch.float32
    torch.testing.assert_close(found, wanted, rtol=1e-6, atol=1e-5)
    with autocast("cpu", precision):  # a backward inside must not round either
        ours = gradients(found.sum(), head, hidden)
    theirs = gradients(wanted.sum(), head, hidden)
    step = {torch.float32: 1e-5, torch.bfloat16: 2**-7, torch.float16: 2**-10}[dtype]
    for one, other in zip(ours, theirs, strict=True):
        assert one.dtype == dtype
        torch.testing.assert_close(one, other, rtol=step, atol=1e-4)


def test_shares_that_differ_give_the_head_its_gradient_too() -> None:
    head, hidden, targets = drawn(30, 8, 100, dtype=torch.float32)
    shares = torch.linspace(-1, 1, 30)
    ours = gradients(token_logprobs(head, hidden, targets, scores=700) @ shares, head, hidden)
    wanted = -functional.cross_entropy(head(hidden), targets, reduction="none")
    for one, other in zip(ours, gradients(wanted @ shares, head, hidden), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-5)


def test_a_second_backward_gives_the_same() -> None:
    head, hidden, targets = drawn(6, 8, 20)
    loss = token_logprobs(head, hidden, targets).sum() / 3
    first = torch.autograd.grad(loss, [hidden, head.weight], retain_graph=True)
    again = torch.autograd.grad(loss, [hidden, head.weight])
    assert all(torch.equal(one, other) for one, other in zip(first, again, strict=True))


def test_a_tied_table_gets_both_gradients() -> None:
    head, _, targets = drawn(6, 8, 20, bias=False)
    ids = torch.arange(6)
    token_logprobs(head, head.weight[ids], targets).sum().backward()
    found, head.weight.grad = head.weight.grad, None
    functional.cross_entropy(head(head.weight[ids]), targets, reduction="sum").neg().backward()
    torch.testing.assert_close(found, head.weight.grad, rtol=1e-12, atol=1e-12)


def test_hidden_states_that_are_not_finite_give_a_loss_that_is_not() -> None:
    head, hidden, targets = drawn(4, 8, 20)
    broken = hidden.detach().clone()
    broken[2, 3] = float("inf")
    found = token_logprobs(head, broken, targets)
    assert found.isfinite().tolist() == [True, True, False, True]


def test_another_head_is_refused() -> None:
    _, hidden, targets = drawn(4, 8, 20)
    wrapped = nn.Sequential(nn.Linear(8, 20))
    assert not fuses(wrapped)
    with pytest.raises(TypeError, match="Sequential"):
        token_logprobs(wrapped, hidden, targets)


class Largest(TorchDispatchMode):
    """The most numbers of a tensor that any operation returns."""

    def __init__(self) -> None:
        super().__init__()
        self.numbers = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        if isinstance(out, Tensor):
            self.numbers = max(self.numbers, out.numel())
        return out


def peak_bytes(work: Callable[[], object]) -> int:
    """The most bytes that torch's allocator has given out and not got back, at any time of the work."""
    work()  # libraries keep what they need once
    with torch.profiler.profile(profile_memory=True) as profile:
        work()
    events = profile.profiler.kineto_results.events()  # pyright: ignore[reportOptionalMemberAccess]
    changes = sorted((e.start_ns(), e.nbytes()) for e in events if e.name() == "[memory]")
    return max(itertools.accumulate(amount for _, amount in changes))


@pytest.mark.parametrize("learns", [False, True])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_never_are_there_scores_of_all_positions(learns: bool, dtype: str) -> None:
    n, d, v, room = 600, 16, 3_000, 60_000
    head, hidden, targets = drawn(n, d, v, dtype=getattr(torch, dtype), bias=False)
    head.requires_grad_(learns)
    if learns:
        head.float()  # masters

    def fused() -> None:
        gradients(token_logprobs(head, hidden, targets, scores=room).sum(), head, hidden)

    def full() -> None:
        gradients(functional.cross_entropy(float32_scores(head, hidden), targets, reduction="sum"), head, hidden)

    with Largest() as largest:
        fused()
    assert largest.numbers == room, "n v would be thirty times as many"
    shape = cost.DecoderShape(layers=1, d_model=d, d_ff=1, heads=1, kv_heads=1, vocab=v)
    through = "full" if learns else "through"
    found = peak_bytes(fused)
    assert found == pytest.approx(cost.head_bytes(shape, n, dtype=dtype, gradients=through, scores=room), rel=0.05)
    whole = peak_bytes(full)
    assert whole == pytest.approx(cost.logits_bytes(shape, n), rel=0.35)
    assert whole > 25 * found


def test_without_gradients_nothing_is_kept() -> None:
    head, hidden, targets = drawn(600, 16, 3_000, dtype=torch.float32)
    saved: list[Tensor] = []
    with torch.no_grad(), torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        found = token_logprobs(head, hidden, targets, scores=60_000)
    assert not saved
    assert not found.requires_grad
    with torch.inference_mode():
        assert torch.equal(token_logprobs(head, hidden, targets, scores=60_000), found)


def test_what_is_kept_has_the_width_of_the_hidden_states() -> None:
    head, hidden, targets = drawn(600, 16, 3_000, dtype=torch.float32, bias=False)
    head.requires_grad_(False)
    saved: list[Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        token_logprobs(head, hidden, targets, scores=60_000)
    assert sum(t.numel() for t in saved) == 600 * 16


def test_the_plan_knows_how_many_scores_are_held() -> None:
    """Of a head that learns nothing, in float32: hidden states, and the scores that the device is given room for."""
    shape = cost.DecoderShape(layers=1, d_model=1, d_ff=1, heads=1, kv_heads=1, vocab=1_000)
    many = 10**6
    held = {device: cost.head_bytes(shape, many, dtype="float32", device=device) for device in ("cpu", "cuda", "mps")}
    assert held["cpu"] // 4 - many == SCORES // 1_000 * 1_000
    assert held["cuda"] == held["mps"]
    assert held["cuda"] - held["cpu"] == pytest.approx(4 * (ACCELERATED - 1) * SCORES, rel=1e-3)
    assert cost._WIDE == WIDE


def test_how_many_scores_are_held_is_asked_of_the_device(monkeypatch: pytest.MonkeyPatch) -> None:
    head, hidden, targets = drawn(600, 16, 3_000, dtype=torch.float32)
    asked: list[str] = []
    monkeypatch.setattr(fused_head, "scores_held", lambda device: asked.append(device) or 60_000)
    with torch.no_grad(), Largest() as largest:
        token_logprobs(head, hidden, targets)
    assert (asked, largest.numbers) == (["cpu"], 60_000)
