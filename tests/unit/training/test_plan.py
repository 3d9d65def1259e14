"""The whole plan: what adds up, what does not, and where limits are said."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import pytest

from plait.core.errors import ResourceError
from plait.core.estimate import Estimate, Machine
from plait.training.peak import RUNTIME_BYTES
from plait.training.plan import estimate_all, require, size, survey, total

pytestmark = pytest.mark.light

GIB = 2**30


def machine(*, memory: int = 8 * GIB, disk: int = 100 * GIB, dtype: str = "bfloat16", measured: bool = True) -> Machine:
    return Machine(
        cores=2,
        memory_bytes=memory,
        disk_bytes=disk,
        gemm_fp32=2e11,
        gemm_bf16=1e12,
        measured=measured,
        dtype=dtype,
    )


class Step:
    """A stage that needs a fixed amount and remembers what it was told."""

    def __init__(self, kind: str, gib: int = 1) -> None:
        self.kind = kind
        self.told: dict[str, str] = {}
        self.gib = gib

    def estimate(self, machine: Machine, before: Mapping[str, Estimate]) -> Estimate:
        self.told = {kind: e.stage for kind, e in before.items()}
        return Estimate(
            stage=self.kind,
            flops=1e12,
            memory={"weights": self.gib * GIB, "runtime": GIB},
            disk_bytes=2 * GIB,
            seconds=(1.0, 3.0),
        )


def test_memory_is_the_highest_stage_and_the_rest_adds_up() -> None:
    steps = [
        ("data", Step("data")),
        ("first", Step("tune", 5)),
        ("second", Step("tune", 3)),
        ("score", Step("evaluate")),
    ]
    sums = total(estimate_all(steps, machine()), machine())
    assert (sums.peak_stage, sums.peak_bytes) == ("first", 6 * GIB)
    assert (sums.disk_bytes, sums.flops, sums.seconds) == (8 * GIB, 4e12, (4.0, 12.0))
    assert [e.stage for e in sums.stages] == ["data", "first", "second", "score"]
    # A stage sees the earlier ones by kind: the last of a kind, as it will find it in the run folder.
    assert steps[3][1].told == {"data": "data", "tune": "second"}
    assert steps[1][1].told == {"data": "data"}


def test_nothing_planned_is_nothing_needed() -> None:
    sums = total((), machine())
    assert (sums.peak_stage, sums.peak_bytes, sums.disk_bytes, sums.warnings) == ("", 0, 0, ())


@pytest.mark.parametrize(
    ("found", "said"),
    [
        (machine(), []),
        (machine(disk=3 * GIB), ["disk: 2.0 GiB needed, 3.0 GiB free"]),
        (machine(disk=2 * GIB), ["disk: 2.0 GiB needed, 2.0 GiB free: the run is refused"]),
        (machine(memory=4 * GIB), ["memory: tune peaks at 4.0 GiB, 4.0 GiB free"]),
        (machine(memory=3 * GIB), ["memory: tune peaks at 4.0 GiB, 3.0 GiB free: lower its micro-batch"]),
        (machine(dtype="float32"), ["no AMX or AVX-512 BF16: float32 is used"]),
        (machine(measured=False), ["the machine's speed is guessed"]),
    ],
    ids=["fits", "disk half full", "disk full", "memory tight", "memory short", "no AMX", "guessed"],
)
def test_limits_are_said(found: Machine, said: list[str]) -> None:
    sums = total(estimate_all([("tune", Step("tune", 3))], found), found)
    assert len(sums.warnings) == len(said)
    for line, start in zip(sums.warnings, said, strict=True):
        assert line.startswith(start)


def test_a_run_that_would_fill_the_disk_is_refused_with_numbers() -> None:
    found = machine(disk=4 * GIB)
    sums = total(estimate_all([("data", Step("data")), ("tune", Step("tune"))], found), found)
    with pytest.raises(ResourceError) as caught:
        require(sums, found, place=Path("runs"))
    assert "needs 4.0 GiB" in caught.value.cause
    assert "4.0 GiB is free" in caught.value.cause
    assert caught.value.exit_code == 5
    require(sums, machine(disk=5 * GIB), place=Path("runs"))  # 80 %: allowed


def test_caches_count_on_the_disk_they_lie_on() -> None:
    from dataclasses import replace

    from plait.training.plan import disks

    (estimate,) = estimate_all([("tune", Step("tune"))], machine())
    sums = total([replace(estimate, home_bytes=3 * GIB)], machine())
    assert (sums.disk_bytes, sums.home_bytes) == (2 * GIB, 3 * GIB)
    one, two = machine(disk=4 * GIB), replace(machine(disk=4 * GIB), home_disk_bytes=3 * GIB)
    assert [disk.needed for disk in disks(sums, one)] == [5 * GIB]
    assert [disk.needed for disk in disks(sums, two)] == [2 * GIB, 3 * GIB]
    with pytest.raises(ResourceError, match=r"needs 5\.0 GiB of disk \(tune alone 5\.0 GiB\)"):
        require(sums, one, place=Path("runs"))
    with pytest.raises(ResourceError, match=r"caches need 3\.0 GiB of disk, but 3\.0 GiB is free where PLAIT_HOME is"):
        require(sums, two, place=Path("runs"))
    assert "disk of PLAIT_HOME: 3.0 GiB needed, 3.0 GiB free: the run is refused" in total(sums.stages, two).warnings
    require(sums, replace(two, home_disk_bytes=4 * GIB), place=Path("runs"))


def test_a_survey_without_probe_is_at_once_and_writes_nothing(tmp_path: Path) -> None:
    found = survey(tmp_path / "runs", probe=False)
    assert not found.measured
    assert found.runtime_bytes == RUNTIME_BYTES
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("amount", "text"),
    [(0, "0 B"), (1023, "1023 B"), (1024, "1 KiB"), (812 * 2**20, "812 MiB"), (1536 * 2**20, "1.5 GiB")],
)
def test_sizes_for_people(amount: int, text: str) -> None:
    assert size(amount) == text
