"""What is read from the system, on real and on made-up machines; and what is chosen from it."""

from __future__ import annotations

import os
import random
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch

from plait.core import device
from plait.core.errors import ConfigError, ResourceError

GIB = 2**30
MEMINFO = "MemTotal: 16777216 kB\nMemFree: 1000000 kB\nMemAvailable: 8388608 kB\n"


@pytest.fixture
def threads() -> Iterator[None]:
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


def fake(root: Path, files: dict[str, str]) -> Path:
    for name, text in files.items():
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    return root


def cpu(root: Path, flags: str) -> Path:
    return fake(
        root, {"proc/cpuinfo": f"processor : 0\nmodel name\t: Chip 9\nflags\t\t: fpu {flags}\n\nprocessor : 1\n"}
    )


# --- memory --------------------------------------------------------------------------------------------------------


def test_without_a_container_memory_is_the_machines(tmp_path: Path) -> None:
    assert device.memory(fake(tmp_path, {"proc/meminfo": MEMINFO})) == device.Memory(total=16 * GIB, free=8 * GIB)


@pytest.mark.parametrize(
    ("files", "total", "free"),
    [
        pytest.param(
            {
                "proc/self/cgroup": "0::/pod/app\n",
                "sys/fs/cgroup/pod/app/memory.max": f"{4 * GIB}\n",
                "sys/fs/cgroup/pod/app/memory.current": f"{3 * GIB}\n",
                "sys/fs/cgroup/pod/app/memory.stat": f"anon 1\ninactive_file {GIB}\n",
            },
            4 * GIB,
            2 * GIB,
            id="v2, file cache counts as free",
        ),
        pytest.param(
            {
                "proc/self/cgroup": "0::/pod/app\n",
                "sys/fs/cgroup/pod/app/memory.max": "max\n",
                "sys/fs/cgroup/pod/memory.max": f"{2 * GIB}\n",
                "sys/fs/cgroup/pod/memory.current": f"{GIB}\n",
            },
            2 * GIB,
            GIB,
            id="v2, the limit is on the parent",
        ),
        pytest.param(
            {
                "proc/self/cgroup": "0::/not/mounted/here\n",
                "sys/fs/cgroup/memory.max": f"{3 * GIB}\n",
                "sys/fs/cgroup/memory.current": f"{GIB}\n",
            },
            3 * GIB,
            2 * GIB,
            id="v2, only the container's own root is visible",
        ),
        pytest.param(
            {
                "proc/self/cgroup": "8:pids:/x\n4:memory:/box\n0::/\n",
                "sys/fs/cgroup/memory/box/memory.limit_in_bytes": f"{GIB}\n",
                "sys/fs/cgroup/memory/box/memory.usage_in_bytes": f"{2 * GIB}\n",
            },
            GIB,
            0,
            id="v1, already over the limit",
        ),
        pytest.param(
            {
                "proc/self/cgroup": "4:memory:/box\n",
                "sys/fs/cgroup/memory/box/memory.limit_in_bytes": "9223372036854771712\n",
                "sys/fs/cgroup/memory/box/memory.usage_in_bytes": f"{2 * GIB}\n",
            },
            16 * GIB,
            8 * GIB,
            id="v1, no limit",
        ),
    ],
)
def test_the_containers_limit_counts(tmp_path: Path, files: dict[str, str], total: int, free: int) -> None:
    root = fake(tmp_path, {"proc/meminfo": MEMINFO, **files})
    assert device.memory(root) == device.Memory(total=total, free=free)


def test_this_machine_is_plausible() -> None:
    room = device.memory()
    assert 0 < room.free <= room.total
    assert 1 <= device.usable_cores() <= (os.cpu_count() or 1)


def test_nothing_crashes_without_proc_and_sys(tmp_path: Path) -> None:
    assert device.memory(tmp_path).total > 0
    assert device.memory(tmp_path).free > 0
    assert device.usable_cores(tmp_path) >= 1
    assert device.cpu_name(tmp_path)
    assert device.rss(tmp_path) > 0
    assert device.peak_rss(tmp_path) > 0
    assert device.choose_dtype(root=tmp_path)[0] == (
        "float32" if sys.platform != "darwin" else device.choose_dtype()[0]
    )


def test_macos_free_memory_is_what_vm_stat_calls_free(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    said = (
        "Mach Virtual Memory Statistics: (page size of 16384 bytes)\n"
        "Pages free:                               1000.\n"
        "Pages active:                            70000.\n"
        "Pages inactive:                           2000.\n"
        "Pages speculative:                         500.\n"
    )
    monkeypatch.setattr(device, "_command", lambda *words: said if words == ("vm_stat",) else "")
    assert device.memory(tmp_path).free == 3500 * os.sysconf("SC_PAGE_SIZE")


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_the_peak_stays_after_memory_is_given_back() -> None:
    before = device.rss()
    block = bytearray(96 * 2**20)
    block[::4096] = b"x" * len(range(0, len(block), 4096))  # touch every page
    held = device.rss()
    del block
    assert held - before > 90 * 2**20
    assert device.rss() < held
    assert device.peak_rss() >= held - 2**20  # the kernel's counters are exact to a few pages a thread


def test_free_disk_of_a_folder_that_does_not_exist_yet(tmp_path: Path) -> None:
    assert device.free_disk(tmp_path / "a" / "b") == pytest.approx(device.free_disk(tmp_path), rel=0.05)


# --- processor -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("files", "cores"),
    [
        ({"proc/self/cgroup": "0::/\n", "sys/fs/cgroup/cpu.max": "50000 100000\n"}, 1),
        ({"proc/self/cgroup": "0::/\n", "sys/fs/cgroup/cpu.max": "max 100000\n"}, 4),
        ({"proc/self/cgroup": "0::/\n", "sys/fs/cgroup/cpu.max": "250000 100000\n"}, 3),
        (
            {
                "proc/self/cgroup": "1:cpu,cpuacct:/\n",
                "sys/fs/cgroup/cpu/cpu.cfs_quota_us": "200000",
                "sys/fs/cgroup/cpu/cpu.cfs_period_us": "100000",
            },
            2,
        ),
        (
            {
                "proc/self/cgroup": "1:cpu:/\n",
                "sys/fs/cgroup/cpu/cpu.cfs_quota_us": "-1",
                "sys/fs/cgroup/cpu/cpu.cfs_period_us": "100000",
            },
            4,
        ),
    ],
    ids=["half a core", "no quota", "rounded up", "v1", "v1 no quota"],
)
def test_the_containers_cpu_quota_counts(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, files: dict[str, str], cores: int
) -> None:
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: {0, 1, 2, 3}, raising=False)
    assert device.usable_cores(fake(tmp_path, files)) == cores


@pytest.mark.parametrize(
    ("flags", "dtype", "reason"),
    [
        ("avx2 avx512f avx512_bf16 amx_tile amx_bf16", "bfloat16", "AMX"),
        ("avx2 avx512f avx512_bf16", "bfloat16", "AVX-512 BF16"),
        (
            "avx2 avx512f amx_tile amx_int8",
            "float32",
            "neither AMX nor",
        ),  # AMX for int8 alone does not multiply bfloat16
        ("avx2", "float32", "neither AMX nor"),
    ],
)
def test_bfloat16_only_where_the_cpu_multiplies_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, flags: str, dtype: str, reason: str
) -> None:
    for name in ("ONEDNN_MAX_CPU_ISA", "DNNL_MAX_CPU_ISA"):
        monkeypatch.delenv(name, raising=False)
    root = cpu(tmp_path, flags)
    chosen, why = device.choose_dtype("cpu", root=root)
    assert chosen == dtype
    assert reason in why
    assert device.cpu_flags(root) == frozenset(flags.split())
    assert device.cpu_name(root) == "Chip 9"


def test_a_switched_off_unit_does_not_count(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    root = cpu(tmp_path, "avx512_bf16 amx_bf16")
    monkeypatch.setenv("ONEDNN_MAX_CPU_ISA", "avx512_core")
    assert device.choose_dtype("cpu", root=root)[0] == "float32"
    assert "ONEDNN_MAX_CPU_ISA=avx512_core" in device.choose_dtype("cpu", root=root)[1]
    assert device.choose_dtype("cpu", "bfloat16", root=root)[0] == "bfloat16"  # asked for is asked for
    monkeypatch.setenv("ONEDNN_MAX_CPU_ISA", "AVX512_CORE_AMX")
    assert device.choose_dtype("cpu", root=root)[0] == "bfloat16"


def test_wrong_wishes_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(ResourceError, match="'cuda' was asked for"):
        device.choose_device("cuda")
    with pytest.raises(ConfigError, match="no device type 'gpu'"):
        device.choose_device("gpu")
    with pytest.raises(ConfigError, match="no dtype 'float8'"):
        device.choose_dtype("cpu", "float8")
    assert device.choose_dtype("cpu", "float16") == ("float16", "asked for")


# --- setup, seeds, fingerprint -------------------------------------------------------------------------------------


@pytest.mark.usefixtures("threads")
def test_setup_takes_the_recorded_count_before_the_variable_before_the_probe(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OMP_NUM_THREADS", "2")
    assert device.setup(device="cpu", threads=1).threads == 1
    assert torch.get_num_threads() == 1
    assert device.setup(device="cpu").threads == 2
    assert torch.get_num_threads() == 2
    monkeypatch.delenv("OMP_NUM_THREADS")
    found = device.setup(device="cpu", dtype="float32")
    assert 1 <= found.threads <= device.usable_cores()
    assert torch.get_num_threads() == found.threads
    assert found.dtype == "float32"


@pytest.mark.usefixtures("threads")
def test_setup_draws_nothing_from_the_seeded_generators(monkeypatch: pytest.MonkeyPatch) -> None:
    """A resumed run does not probe; it must see the same numbers as one that did."""
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)

    def numbers() -> tuple[float, list[float]]:  # not Python's: beartype, which checks types while testing, draws there
        return float(np.random.random()), torch.rand(3).tolist()

    device.seed_everything(7)
    expected = numbers()
    device.seed_everything(7)
    device.setup(device="cpu")
    assert numbers() == expected


@pytest.mark.parametrize("seed", [0, 1, 2**32, 2**40 + 3])
def test_one_seed_seeds_all_generators(seed: int) -> None:
    def draw() -> list[object]:
        return [random.random(), np.random.random(3).tolist(), torch.randn(3).tolist()]

    device.seed_everything(seed)
    first = draw()
    assert draw() != first
    device.seed_everything(seed)
    assert draw() == first


def test_the_fingerprint_names_what_changed(monkeypatch: pytest.MonkeyPatch) -> None:
    compute = device.Compute(device="cpu", dtype="bfloat16", threads=2, why=())
    then = device.fingerprint(compute)
    assert device.differences(then, device.fingerprint(compute)) == ()
    assert {"torch", "threads", "cpu_flags", "device", "dtype"} <= then.keys()
    monkeypatch.setenv("MKL_CBWR", "COMPATIBLE")
    now = device.fingerprint(device.Compute(device="cpu", dtype="bfloat16", threads=1, why=("other reasons",)))
    assert device.differences(then, now) == (
        f"limits: {then['limits']} then, {now['limits']} now",
        "threads: 2 then, 1 now",
    )


@pytest.mark.usefixtures("threads")
def test_machine_measures_or_guesses(tmp_path: Path) -> None:
    guessed = device.machine(tmp_path / "runs", probe=False)
    measured = device.machine(tmp_path / "runs")
    assert not (tmp_path / "runs").exists()
    assert (guessed.measured, measured.measured) == (False, True)
    assert guessed.dtype == measured.dtype == device.choose_dtype(device.choose_device())[0]
    for rate in (guessed.gemm_fp32, guessed.gemm_bf16, measured.gemm_fp32, measured.gemm_bf16):
        assert 1e8 < rate < 1e16
