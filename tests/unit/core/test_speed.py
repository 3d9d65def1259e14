"""Thread counts are chosen from the mix of small and large operations; rates are measured within a budget."""

from __future__ import annotations

import time
from collections.abc import Callable

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from plait.core.speed import choose_threads, gemm_peak, gemm_rate, guess_rates, interleaved, probe_threads

QUIET = {1: (28e-6, 7.0e-3), 2: (20e-6, 3.6e-3)}
"""Measured on 2 quiet cores."""
BUSY = {1: (28e-6, 21e-3), 2: (8e-3, 15e-3)}
"""The same with one foreign busy process: the product alone would gain, the small operations lose 285-fold."""


def test_two_quiet_cores_use_both() -> None:
    probe = choose_threads(QUIET)
    assert probe.threads == 2
    assert not probe.disturbed
    assert "2 of 2 threads" in probe.why


def test_a_busy_neighbor_leaves_one() -> None:
    probe = choose_threads(BUSY)
    assert probe.threads == 1
    assert probe.disturbed
    assert "another process keeps a core busy" in probe.why


def test_a_gain_within_the_noise_is_not_taken() -> None:
    assert choose_threads({1: (1e-5, 10e-3), 2: (1e-5, 9.7e-3)}).threads == 1


times = st.floats(1e-6, 1.0)


@given(st.dictionaries(st.sampled_from([1, 2, 4, 8, 16, 32]), st.tuples(times, times), min_size=1))
def test_the_choice_is_within_five_percent_of_the_best(seconds: dict[int, tuple[float, float]]) -> None:
    step = {count: 10 * small + large for count, (small, large) in seconds.items()}
    chosen = choose_threads(seconds).threads
    assert step[chosen] * 0.95 <= min(step.values())
    assert all(step[chosen] < step[fewer] for fewer in step if fewer < chosen)  # more threads only for less time


def test_the_probe_leaves_threads_and_generator_alone() -> None:
    before = torch.get_num_threads()
    state = torch.get_rng_state()
    probe = probe_threads("float32", 2)
    assert probe.threads in (1, 2)
    assert set(probe.seconds) == {1, 2}
    assert torch.get_num_threads() == before
    assert torch.equal(torch.get_rng_state(), state)


def test_one_core_needs_no_probe() -> None:
    assert probe_threads("float32", 1).threads == 1


def test_every_count_up_to_an_odd_number_of_cores_is_tried(monkeypatch: pytest.MonkeyPatch) -> None:
    tried: list[int] = []
    monkeypatch.setattr(torch, "set_num_threads", tried.append)
    probe_threads("float32", 6)
    assert set(tried) - {torch.get_num_threads()} <= {1, 2, 4, 6}
    assert {1, 2, 4, 6} <= set(tried)


@pytest.mark.parametrize("rate_of", [gemm_rate, gemm_peak])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_the_rate_is_measured_within_its_budget(dtype: str, rate_of: Callable[..., float]) -> None:
    state = torch.get_rng_state()
    begun = time.perf_counter()
    rate = rate_of(dtype, budget_s=0.1)
    assert 1e8 < rate < 1e14
    assert time.perf_counter() - begun < 5.0  # far above 0.1 s: neighbors may hold the cores
    assert torch.equal(torch.get_rng_state(), state)


def test_guesses_rank_machines() -> None:
    plain, wide, amx = (
        guess_rates(frozenset(flags.split()), 2)
        for flags in ("avx2", "avx2 avx512f", "avx2 avx512f avx512_bf16 amx_bf16")
    )
    assert plain[0] < wide[0] == amx[0]
    assert plain[1] < plain[0]  # emulated
    assert amx[1] > 3 * amx[0]


class Watch:
    """A clock that calls move: each takes as many seconds as it says."""

    def __init__(self) -> None:
        self.now = 0.0
        self.called: list[str] = []

    def __call__(self) -> float:
        return self.now

    def takes(self, name: str, seconds: float) -> Callable[[], None]:
        def call() -> None:
            self.called.append(name)
            self.now += seconds

        return call


def test_calls_take_turns_to_and_fro_after_one_that_does_not_count() -> None:
    watch = Watch()
    found = interleaved({name: watch.takes(name, 1.0) for name in "abc"}, seconds=100.0, rounds=2, clock=watch)
    assert "".join(watch.called) == "abc" + "abc" + "cba"
    assert {times.rounds for times in found.values()} == {2}
    assert {times.median for times in found.values()} == {1.0}


def test_the_time_is_kept() -> None:
    watch = Watch()
    found = interleaved({"a": watch.takes("a", 1.0), "b": watch.takes("b", 2.0)}, seconds=13.0, clock=watch)
    assert found["a"].rounds == found["b"].rounds == 3  # 3 s before, 3 s a round, a fourth would end at 15
    assert watch.now <= 13


def test_what_comes_after_half_of_the_time_is_left_out() -> None:
    watch = Watch()
    found = interleaved({name: watch.takes(name, 4.0) for name in "abcd"}, seconds=10.0, clock=watch)
    assert list(found) == ["a", "b"]
    assert interleaved({}, seconds=1.0) == {}
    assert list(interleaved({"a": watch.takes("a", 1.0)}, seconds=0.0, clock=watch)) == ["a"]
