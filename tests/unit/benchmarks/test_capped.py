"""A limit of the operating system that one process does not train in, and two that divide the matrices do."""

import sys

import pytest
from benchmarks.scaling import LIVE, SIZES, Way, run

CAP = 400 * 2**20
"""Bytes above what a process has before the model; weights, gradients and moments are 376 MiB, a step takes 467."""


@pytest.mark.row("S2-C13")
@pytest.mark.skipif(sys.platform != "linux", reason="the limit is Linux's")
def test_tensor_parallel_trains_what_does_not_fit_one_process() -> None:
    with pytest.raises(SystemExit, match=r"alloc|memory"):
        run(SIZES["25 M"], Way(), steps=1, warm=1, more=LIVE, cap=CAP)
    ranks = run(SIZES["25 M"], Way(processes=2, grid={"tensor": 2}), steps=1, warm=1, more=LIVE, cap=CAP)
    assert len(ranks) == 2
    assert sum(rank["held"] for rank in ranks) >= ranks[0]["weights"]
