"""What hardware is here and how to use it: device, dtype, threads, memory, disk, seeds. The only file that asks.

torch is imported inside the functions that need it, so that looking at the disk stays fast. Nothing here crashes where
``/proc`` and ``/sys`` are missing (macOS): it falls back to what POSIX offers.
"""

# torch's annotations are partial: its members count as partially unknown.
# pyright: reportUnknownMemberType=false

from __future__ import annotations

import math
import os
import platform
import random
import shutil
import subprocess
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from plait.core.errors import ConfigError, ResourceError
from plait.core.estimate import Machine
from plait.core.files import existing_parent
from plait.core.speed import gemm_rate, guess_rates, probe_threads

ROOT = Path("/")
"""Where ``/proc`` and ``/sys`` are looked for; tests pass a folder of their own."""

CPU_FLAGS = ("avx2", "avx512f", "avx512_bf16", "avx512_vnni", "amx_tile", "amx_bf16", "amx_int8")
"""CPU capabilities that change which kernels run, and so speed and the last bits of a result."""

_ISA_VARIABLES = (
    "ONEDNN_MAX_CPU_ISA",
    "DNNL_MAX_CPU_ISA",
    "ATEN_CPU_CAPABILITY",
    "MKL_ENABLE_INSTRUCTIONS",
    "MKL_CBWR",
)
_ISA_WITHOUT_BF16 = ("SSE41", "AVX", "AVX2", "AVX2_VNNI", "AVX2_VNNI_2", "AVX512_CORE", "AVX512_CORE_VNNI")


# --- processor -----------------------------------------------------------------------------------------------------


def usable_cores(root: Path = ROOT) -> int:
    """Cores this process may use: its affinity mask, and the container's CPU quota rounded up."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    for folder in _cgroup_folders("cpu", root):
        quota = _read(folder / "cpu.max").split() or [
            _read(folder / "cpu.cfs_quota_us"),
            _read(folder / "cpu.cfs_period_us"),
        ]
        if len(quota) == 2 and quota[0].isdigit() and quota[1].isdigit():
            cores = min(cores, math.ceil(int(quota[0]) / int(quota[1])))
    return max(cores, 1)


def cpu_flags(root: Path = ROOT) -> frozenset[str]:
    """Which of :data:`CPU_FLAGS` the processor has; empty on other architectures than x86-64."""
    text = _read(root / "proc/cpuinfo")
    words = next((line.split(":", 1)[1] for line in text.splitlines() if line.startswith("flags")), "")
    if not words and sys.platform == "darwin":
        words = _command("sysctl", "-n", "machdep.cpu.features", "machdep.cpu.leaf7_features").lower()
    return frozenset(words.split()) & frozenset(CPU_FLAGS)


def cpu_name(root: Path = ROOT) -> str:
    """The processor's model name, or the architecture where nothing tells it."""
    text = _read(root / "proc/cpuinfo")
    name = next((line.split(":", 1)[1].strip() for line in text.splitlines() if line.startswith("model name")), "")
    if not name and sys.platform == "darwin":
        name = _command("sysctl", "-n", "machdep.cpu.brand_string").strip()
    return name or platform.machine()


# --- memory and disk -----------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True, kw_only=True)
class Memory:
    """RAM in bytes, after the container's limit.

    Attributes:
        total: What this process could ever have.
        free: What it can take now without pushing anything out; reclaimable file cache counts as free.
    """

    total: int
    free: int


def memory(root: Path = ROOT) -> Memory:
    """RAM of the machine or of the container (cgroup v1 or v2), whichever is less."""
    info = {line.split(":")[0]: line.split()[1] for line in _read(root / "proc/meminfo").splitlines() if ":" in line}
    if "MemTotal" in info:
        total = int(info["MemTotal"]) * 1024
        free = int(info.get("MemAvailable", info["MemTotal"])) * 1024
    else:
        total = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
        free = _free_macos() or total // 2
    for folder in _cgroup_folders("memory", root):
        limit = _read(folder / "memory.max") or _read(folder / "memory.limit_in_bytes")
        if not limit.isdigit() or int(limit) >= total:
            continue
        used = _read(folder / "memory.current") or _read(folder / "memory.usage_in_bytes") or "0"
        stat = dict(line.split()[:2] for line in _read(folder / "memory.stat").splitlines() if " " in line)
        reclaimable = int(stat.get("total_inactive_file", stat.get("inactive_file", "0")))
        total = int(limit)
        free = min(free, max(total - int(used) + reclaimable, 0))
    return Memory(total=total, free=free)


def _free_macos() -> int:
    pages = {
        key.strip(): value.strip(" .") for key, _, value in (s.partition(":") for s in _command("vm_stat").splitlines())
    }
    wanted = ("Pages free", "Pages inactive", "Pages speculative")
    return sum(int(pages[key]) for key in wanted if pages.get(key, "").isdigit()) * os.sysconf("SC_PAGE_SIZE")


def free_disk(path: Path) -> int:
    """Bytes free on the disk that holds ``path``, which need not exist yet."""
    return shutil.disk_usage(existing_parent(path)).free


def rss(root: Path = ROOT) -> int:
    """Bytes of RAM this process holds now."""
    return _status("VmRSS", root) or _max_rss()


def peak_rss(root: Path = ROOT) -> int:
    """Most bytes of RAM this process ever held.

    ``VmHWM`` first: unlike ``getrusage`` it starts anew at ``exec``, so a child does not show the peak of the parent it
    was forked from.
    """
    return _status("VmHWM", root) or _max_rss()


def reset_peak(root: Path = ROOT) -> bool:
    """Let :func:`peak_rss` begin anew at what is held now; whether the system can."""
    try:
        (root / "proc/self/clear_refs").write_text("5")
    except OSError:
        return False
    return True


def _status(key: str, root: Path) -> int:
    line = next((s for s in _read(root / "proc/self/status").splitlines() if s.startswith(key + ":")), "")
    return int(line.split()[1]) * 1024 if line else 0


def _max_rss() -> int:
    import resource

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


# --- device and dtype ----------------------------------------------------------------------------------------------


def choose_device(wanted: str = "auto") -> str:
    """``cuda``, ``mps`` or ``cpu``: the wanted one, or the best there is.

    Raises:
        ConfigError: No such device type.
        ResourceError: The wanted device is not here.
    """
    import torch

    here = {"cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available(), "cpu": True}
    if wanted == "auto":
        return next(name for name, found in here.items() if found)
    if wanted not in here:
        raise ConfigError(f"no device type {wanted!r}", place="device", remedy=f"choose from: auto, {', '.join(here)}")
    if not here[wanted]:
        raise ResourceError(
            f"device {wanted!r} was asked for, but torch {torch.__version__} finds none",
            place="device",
            remedy="set device=auto, or install the torch build and driver for it",
        )
    return wanted


def choose_dtype(device: str = "cpu", wanted: str = "auto", *, root: Path = ROOT) -> tuple[str, str]:
    """Number format of the heavy mathematics, and the reason.

    bfloat16 pays only where the hardware multiplies it: a GPU that has it, or a CPU with AMX or AVX-512 BF16. Elsewhere
    a CPU widens every operand first, which is slower than float32. The choice rests on capabilities, never on a timing,
    so it is the same at resume.

    Returns:
        ``("bfloat16" | "float16" | "float32", reason)``; float16 only where it is asked for, since its range asks for
        loss scaling in training.

    Raises:
        ConfigError: ``wanted`` is neither of them nor ``auto``.
    """
    if wanted in ("bfloat16", "float16", "float32"):
        return wanted, "asked for"
    if wanted != "auto":
        raise ConfigError(f"no dtype {wanted!r}", place="dtype", remedy="choose from: auto, bfloat16, float16, float32")
    if device == "cuda":
        import torch

        if torch.cuda.is_bf16_supported(including_emulation=False):
            return "bfloat16", "the GPU multiplies bfloat16"
        return "float32", "the GPU has no bfloat16 units: float32 is chosen"
    if device == "mps":
        return "float32", "bfloat16 on MPS is not relied on: float32 is chosen"
    flags = cpu_flags(root)
    capped = next(
        (
            f"{name}={os.environ[name]}"
            for name in _ISA_VARIABLES[:2]
            if os.environ.get(name, "").upper() in _ISA_WITHOUT_BF16
        ),
        "",
    )
    if capped:
        return "float32", f"{capped} switches bfloat16 units off: float32 is chosen"
    if "amx_bf16" in flags:
        return "bfloat16", "the CPU has AMX"
    if "avx512_bf16" in flags:
        return "bfloat16", "the CPU has AVX-512 BF16"
    return "float32", "the CPU has neither AMX nor AVX-512 BF16: float32 is chosen, and everything takes longer"


def device_name(device: str) -> str:
    """Model name of the device."""
    if device == "cuda":
        import torch

        return torch.cuda.get_device_name()
    return cpu_name()


# --- all of it together --------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True, kw_only=True)
class Compute:
    """Where and how tensors are worked on.

    Attributes:
        device: ``cpu``, ``cuda`` or ``mps``.
        dtype: ``float32``, ``bfloat16`` or ``float16``, a name of torch's.
        threads: OpenMP threads.
        why: Reasons, one line each.
    """

    device: str
    dtype: str
    threads: int
    why: tuple[str, ...]


def setup(*, device: str = "auto", dtype: str = "auto", threads: int = 0) -> Compute:
    """Choose device, dtype and threads, and set torch's thread count.

    Args:
        device: ``auto`` or a device type.
        dtype: ``auto`` or a dtype name.
        threads: A count, such as the one a checkpoint recorded; 0 takes ``OMP_NUM_THREADS`` if set, else probes.

    Raises:
        ConfigError: An unknown device or dtype.
        ResourceError: The wanted device is not here.
    """
    import torch

    chosen_device = choose_device(device)
    chosen_dtype, why_dtype = choose_dtype(chosen_device, dtype)
    wanted = os.environ.get("OMP_NUM_THREADS", "")
    if threads:
        count, why_threads = threads, f"{_threads(threads)}, as asked for"
    elif wanted.isdigit() and int(wanted) > 0:
        count = int(wanted)
        why_threads = f"{_threads(count)}, as OMP_NUM_THREADS says"
    else:
        probe = probe_threads(chosen_dtype if chosen_device == "cpu" else "float32", usable_cores())
        count, why_threads = probe.threads, probe.why
    torch.set_num_threads(count)
    return Compute(
        device=chosen_device, dtype=chosen_dtype, threads=count, why=(f"{chosen_dtype}: {why_dtype}", why_threads)
    )


def _threads(count: int) -> str:
    return f"{count} thread{'s' if count != 1 else ''}"


def machine(folder: Path, *, probe: bool = True) -> Machine:
    """What this machine can do for a run in ``folder``.

    Args:
        folder: Where the run will go; need not exist.
        probe: Measure rates and threads (about 1 s, imports torch); otherwise guess them from the CPU flags.
    """
    room, disk, cores = memory(), free_disk(folder), usable_cores()
    if not probe:
        fp32, bf16 = guess_rates(cpu_flags(), cores)
        compute = Compute(device="cpu", dtype=choose_dtype("cpu")[0], threads=cores, why=())
    else:
        compute = setup()
        fp32, bf16 = (gemm_rate(name, device=compute.device) for name in ("float32", "bfloat16"))
    return Machine(
        cores=cores,
        memory_bytes=room.free,
        disk_bytes=disk,
        gemm_fp32=fp32,
        gemm_bf16=bf16,
        measured=probe,
        device=compute.device,
        dtype=compute.dtype,
        threads=compute.threads,
    )


def seed_everything(seed: int) -> None:
    """Seed Python, NumPy and torch (all devices). NumPy takes 32 bits of it."""
    import numpy as np
    import torch

    random.seed(seed)
    np.random.seed(seed % 2**32)
    torch.manual_seed(seed)


def fingerprint(compute: Compute) -> dict[str, str | int]:
    """What bit-identical resume depends on: equal fingerprints promise equal bits on a CPU, others promise nothing."""
    import torch

    return {
        "torch": str(torch.__version__),
        "device": f"{compute.device}: {device_name(compute.device)}",
        "dtype": compute.dtype,
        "threads": compute.threads,
        "kernels": torch.backends.cpu.get_cpu_capability(),
        "cpu_flags": " ".join(sorted(cpu_flags())),
        "limits": " ".join(f"{name}={os.environ[name]}" for name in _ISA_VARIABLES if name in os.environ),
    }


def differences(saved: Mapping[str, str | int], now: Mapping[str, str | int]) -> tuple[str, ...]:
    """Where two fingerprints differ, one line each: ``threads: 2 then, 1 now``."""
    keys = sorted(saved.keys() | now.keys())
    return tuple(
        f"{k}: {saved.get(k, 'unknown')} then, {now.get(k, 'unknown')} now" for k in keys if saved.get(k) != now.get(k)
    )


# --- reading the system --------------------------------------------------------------------------------------------


def _read(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8", errors="replace").strip()
    except OSError:
        return ""


def _command(*words: str) -> str:
    try:
        return subprocess.run(words, capture_output=True, text=True, check=False, timeout=5).stdout
    except (OSError, subprocess.TimeoutExpired):
        return ""


def _cgroup_folders(controller: str, root: Path) -> list[Path]:
    """This process's cgroup folders from its own up to the root, for version 1 and 2; a limit at any level binds."""
    folders: list[Path] = []
    for line in _read(root / "proc/self/cgroup").splitlines():
        _, controllers, path = line.split(":", 2)
        if controllers and controller not in controllers.split(","):
            continue
        base = root / "sys/fs/cgroup" / (controller if controllers else "")
        own = base / path.lstrip("/")
        folders += [f for f in (own, *own.parents) if f.is_relative_to(base) and f.is_dir()]
    return folders
