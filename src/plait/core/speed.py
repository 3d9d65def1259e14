"""How fast this machine is right now: which thread count wins, the rate of matrix products, calls beside each other.

Each probe takes about half a second. Nothing here draws from the seeded generators: a probe never changes what a run
computes.
"""

# torch's annotations are partial: its members count as partially unknown.
# pyright: reportUnknownMemberType=false

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

_SMALL_PER_LARGE = 10
_ROUNDS = 5
_BURST_S = 0.05
_GAIN = 0.95


@dataclass(frozen=True, slots=True, kw_only=True)
class ThreadProbe:
    """How fast each thread count was.

    Attributes:
        threads: The chosen count.
        seconds: Thread count → (one small operation, one matrix product): means of a burst, the median over rounds.
        why: One line for a person.
        disturbed: Whether another process holds a core, as far as the barriers tell.
    """

    threads: int
    seconds: Mapping[int, tuple[float, float]]
    why: str
    disturbed: bool = False


def probe_threads(dtype: str, cores: int) -> ThreadProbe:
    """Time small and large operations at 1, 2, 4 … ``cores`` threads and choose.

    OpenMP threads spin at a barrier. When another process holds one of the cores, the thread that should run there
    waits for a scheduler slice, and all others wait for it: here an addition of 147,456 numbers went from 0.03 ms to
    8 ms, so two threads lose badly although the matrix product alone may gain. A training step has about ten small
    operations a matrix product, here of the size of a thousand tokens; that mix is scored, and more threads must win by
    5 %. Takes 0.2 s when quiet, up to
    about 1.5 s when not. Leaves torch's thread count as it was.
    """
    import torch

    counts = sorted({min(2**power, cores) for power in range(cores.bit_length() + 1)})
    if counts == [1]:
        return ThreadProbe(threads=1, seconds={}, why="one usable core")
    kind: torch.dtype = getattr(torch, dtype)
    vector, total = torch.ones(1024, 576), torch.empty(1024, 576)
    left = right = torch.ones(1024, 1024, dtype=kind)
    before = torch.get_num_threads()
    rounds: dict[int, list[tuple[float, float]]] = {count: [] for count in counts}
    begun = time.perf_counter()
    try:
        for _ in range(_ROUNDS):  # interleaved, so that a passing disturbance hits all counts
            for count in counts:
                torch.set_num_threads(count)
                torch.mm(left, right)  # starts the threads; not counted
                small = _mean_time(lambda: torch.add(vector, vector, out=total), 20)
                large = _mean_time(lambda: torch.mm(left, right), 3)
                rounds[count].append((small, large))
            if time.perf_counter() - begun > 1.0:
                break
    finally:
        torch.set_num_threads(before)
    seconds = {
        count: (statistics.median(s for s, _ in found), statistics.median(g for _, g in found))
        for count, found in rounds.items()
    }
    return choose_threads(seconds)


def choose_threads(seconds: Mapping[int, tuple[float, float]]) -> ThreadProbe:
    """Choose from measured times (see :func:`probe_threads`); pure, so that it can be tested."""
    step = {count: _SMALL_PER_LARGE * small + large for count, (small, large) in sorted(seconds.items())}
    chosen = min(step)
    for count in step:
        if step[count] < _GAIN * step[chosen]:
            chosen = count
    most, one = max(step), min(step)
    other = most if chosen != most else one
    why = (
        f"{chosen} of {most} threads: ten small operations and a matrix product take {step[chosen] * 1e3:.1f} ms, "
        f"with {other} {step[other] * 1e3:.1f} ms"
    )
    disturbed = seconds[most][0] > 5 * seconds[one][0]
    if disturbed:
        why += f"; barriers wait {seconds[most][0] * 1e3:.1f} ms, so another process keeps a core busy"
    return ThreadProbe(threads=chosen, seconds=dict(seconds), why=why, disturbed=disturbed)


def _mean_time(work: Callable[[], Any], times: int) -> float:
    begun = time.perf_counter()
    done = 0
    while done < times and (done < 2 or time.perf_counter() - begun < _BURST_S):
        work()
        done += 1
    return (time.perf_counter() - begun) / done


def gemm_rate(dtype: str, *, device: str = "cpu", budget_s: float = 0.25) -> float:
    """Measured rate of matrix products in FLOP/s with torch's present thread count.

    The median of as many products as fit ``budget_s``. A CPU without bfloat16 units can be a hundred times slower in
    it, so small products first say how large a one fits.
    """
    size = _fitting(dtype, device=device, budget_s=budget_s)
    return 2.0 * size**3 / statistics.median(_products(dtype, size, device=device, budget_s=budget_s))


def gemm_peak(dtype: str, *, device: str = "cpu", budget_s: float = 0.5) -> float:
    """The best rate of matrix products seen in ``budget_s``, in FLOP/s with torch's present thread count.

    Among large products and, on a CPU, small ones, of which some get done between two slices of another process: a busy
    machine looks less slow so. What trains can hardly do better.
    """
    large = _fitting(dtype, device=device, budget_s=budget_s / 2)
    sizes = {large, min(large, 512)} if device == "cpu" else {large}
    share = budget_s / len(sizes)
    return max(2.0 * size**3 / min(_products(dtype, size, device=device, budget_s=share)) for size in sorted(sizes))


def _fitting(dtype: str, *, device: str, budget_s: float) -> int:
    """The largest size of which some products fit a time."""
    # The best of the small ones: a stall must not make the large one too small to mean anything.
    rate = 2.0 * 256**3 / min(_products(dtype, 256, device=device, budget_s=0.0))
    sizes = (8192, 4096, 1024, 512) if device != "cpu" else (1024, 512)
    return next((size for size in sizes if 8.0 * size**3 / rate < budget_s), 256)


def _products(dtype: str, size: int, *, device: str, budget_s: float) -> list[float]:
    """Seconds of products one after the other: three at least."""
    import torch

    left = right = torch.ones(size, size, device=device, dtype=getattr(torch, dtype))
    times: list[float] = []
    begun = time.perf_counter()
    while len(times) < 4 or time.perf_counter() - begun < budget_s:
        start = time.perf_counter()
        torch.mm(left, right)
        if device == "cuda":
            torch.cuda.synchronize()
        elif device == "mps":
            torch.mps.synchronize()
        times.append(time.perf_counter() - start)
    return times[1:]  # the first one plans the kernel


@dataclass(frozen=True, slots=True, kw_only=True)
class Times:
    """How long a call took.

    Attributes:
        median: Seconds.
        least: Seconds of the quickest round.
        most: Seconds of the slowest round.
        rounds: Rounds that count.
    """

    median: float
    least: float
    most: float
    rounds: int


def interleaved(
    calls: Mapping[str, Callable[[], Any]],
    *,
    seconds: float,
    rounds: int = 7,
    clock: Callable[[], float] = time.perf_counter,
) -> dict[str, Times]:
    """Time calls in turn, so that a busy moment hits all alike, in about ``seconds`` in all.

    Every call runs once uncounted: that makes what it needs and plans its kernels. Half of the time may go there; calls
    that come later than that are left out, so order them by what is worth knowing. Then rounds go over all of them,
    to and fro, while another one fits; there is one at least.

    Args:
        calls: By name.
        seconds: For everything; one call may overrun it.
        rounds: At most.
        clock: Seconds that only rise.

    Example:
        >>> sorted(interleaved({"sum": lambda: sum(range(100)), "none": lambda: None}, seconds=1.0))
        ['none', 'sum']
    """
    begun = clock()
    taken: dict[str, list[float]] = {}
    for name, call in calls.items():
        if taken and clock() - begun > seconds / 2:
            break
        call()
        taken[name] = []
    longest = 0.0
    for number in range(rounds):
        started = clock()
        if number and started - begun + longest > seconds:
            break
        for name in list(taken)[:: -1 if number % 2 else 1]:
            before = clock()
            calls[name]()
            taken[name].append(clock() - before)
        longest = max(longest, clock() - started)
    return {
        name: Times(median=statistics.median(found), least=min(found), most=max(found), rounds=len(found))
        for name, found in taken.items()
    }


def guess_rates(flags: frozenset[str], cores: int) -> tuple[float, float]:
    """float32 and bfloat16 FLOP/s without measuring: 60 % of the units' peak at 2 GHz, right within a factor of three.

    Args:
        flags: From :func:`plait.core.device.cpu_flags`.
        cores: Usable cores.
    """
    per_cycle = 64 if "avx512f" in flags else 32 if "avx2" in flags else 8
    fp32 = 0.6 * 2e9 * per_cycle * cores
    return fp32, fp32 * (6.0 if "amx_bf16" in flags else 2.0 if "avx512_bf16" in flags else 0.2)
