"""What a whole recipe will need on this machine, and where its limits stand; formulas in :mod:`plait.training.cost`."""

from __future__ import annotations

import dataclasses
import json
import subprocess
import sys
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple, Protocol, runtime_checkable

from plait.core import device, launch
from plait.core.errors import ResourceError
from plait.core.estimate import Estimate, Machine
from plait.core.files import existing_parent
from plait.core.packages import home
from plait.training.peak import RUNTIME_BYTES

DISK_LIMIT = 0.9
"""Share of the free disk that a run may ask for."""


@runtime_checkable
class Plannable(Protocol):
    """What is asked of a stage: :class:`plait.stages.stage.Stage` has it."""

    @property
    def kind(self) -> str:
        """Which stage it is."""
        ...

    def estimate(self, machine: Machine, before: Mapping[str, Estimate]) -> Estimate:
        """What it will need."""
        ...


@dataclass(frozen=True, slots=True, kw_only=True)
class Total:
    """A recipe's needs. Stages run one after another: memory is the highest stage's, the rest adds up.

    Attributes:
        stages: The estimates, in order.
        peak_stage: Name of the stage with the highest memory.
        peak_bytes: Its memory; of several processes, of the one that has most.
        processes: That train together.
        together_stage: Name of the stage in which all processes on this machine have most together.
        together_bytes: What they have.
        disk_bytes: What the run leaves in its folder.
        spare_bytes: What it needs there besides for a moment.
        home_bytes: What it leaves under ``PLAIT_HOME``, as far as that is not there yet.
        flops: Operations in all.
        seconds: Shortest and longest expected time.
        warnings: What a person should know before starting, one line each.
    """

    stages: tuple[Estimate, ...]
    peak_stage: str
    peak_bytes: int
    processes: int = 1
    together_stage: str = ""
    together_bytes: int = 0
    disk_bytes: int
    spare_bytes: int
    home_bytes: int
    flops: float
    seconds: tuple[float, float]
    warnings: tuple[str, ...]


# --- the machine ---------------------------------------------------------------------------------------------------


_SURVEY = """
import dataclasses, json, sys
from pathlib import Path
import torch, peft, transformers.models.llama.modeling_llama
import plait.recipes.run, plait.stages.tuning.phases, plait.assembly.pairs
from plait.core.device import machine, rss
torch.set_num_threads(1)
for kind in (torch.float32, torch.bfloat16):
    layer = torch.nn.Linear(64, 64, dtype=kind)
    layer(torch.ones(64, 64, dtype=kind)).sum().backward()
runtime = rss()
print(json.dumps(dataclasses.asdict(machine(Path(sys.argv[1]))) | {"runtime_bytes": runtime}))
"""


def survey(folder: Path, *, probe: bool = True, processes: int = 1) -> Machine:
    """The machine as :func:`plait.core.device.machine` sees it, with the runtime baseline.

    Measured in a fresh process, about 5 s: its RSS with all that a training stage imports, kernels once used, is the
    baseline, and this process stays as it was.

    Args:
        folder: Where runs go; need not exist.
        probe: Measure; otherwise guess rates and baseline, at once and without torch.
        processes: That are to train together; on this machine, but for what torchrun starts elsewhere.

    Raises:
        ResourceError: The libraries cannot be imported; says what they said last.
    """
    guessed = dataclasses.replace(
        device.machine(folder, probe=False),
        home_disk_bytes=_free_home(folder),
        processes=processes,
        local=launch.local() if processes == launch.processes() else processes,
    )
    if not probe:
        return dataclasses.replace(guessed, runtime_bytes=RUNTIME_BYTES)
    command = [sys.executable, "-c", _SURVEY, str(folder)]
    result = subprocess.run(command, capture_output=True, text=True, check=False)
    if result.returncode:
        said = (result.stderr.strip().splitlines() or [f"exit code {result.returncode}"])[-1]
        raise ResourceError(
            f"torch, transformers and peft cannot be imported: {said}",
            place=sys.executable,
            remedy="see `plait doctor`, or plan with --no-probe",
        )
    measured = Machine(**json.loads(result.stdout.splitlines()[-1]))
    # What is free is asked from here: the other process took some itself.
    return dataclasses.replace(
        measured,
        memory_bytes=guessed.memory_bytes,
        disk_bytes=guessed.disk_bytes,
        home_disk_bytes=guessed.home_disk_bytes,
        processes=guessed.processes,
        local=guessed.local,
    )


def _free_home(folder: Path) -> int | None:
    same = existing_parent(folder).stat().st_dev == existing_parent(home()).stat().st_dev
    return None if same else device.free_disk(home())


# --- the recipe ----------------------------------------------------------------------------------------------------


def estimate_all(stages: Iterable[tuple[str, Plannable]], machine: Machine) -> tuple[Estimate, ...]:
    """Ask every stage in order, giving each the estimates of those before it by kind.

    Args:
        stages: Name and spec of each stage.
        machine: What the machine can do.
    """
    before: dict[str, Estimate] = {}
    estimates: list[Estimate] = []
    for name, stage in stages:
        estimate = dataclasses.replace(stage.estimate(machine, before), stage=name)
        before[stage.kind] = estimate
        estimates.append(estimate)
    return tuple(estimates)


def together(estimate: Estimate, machine: Machine) -> int:
    """Bytes that all processes on this machine hold at a stage's highest moments.

    Where one works alone, the others wait with what a process has before any weight. Libraries that processes share
    count in each, as they do in what the system says of each.
    """
    local = machine.local or machine.processes
    if not estimate.shares:
        waiting = machine.runtime_bytes or RUNTIME_BYTES
        return sum(estimate.memory.values()) + (local - 1) * waiting
    return sum(sum(s.memory.values()) * sum(rank < local for rank in s.ranks) for s in estimate.shares)


def total(estimates: Iterable[Estimate], machine: Machine) -> Total:
    """Add up, and say where the machine's limits are near."""
    stages = tuple(estimates)
    peaks = {e.stage: sum(e.memory.values()) for e in stages}
    peak_stage = max(peaks, key=lambda name: peaks[name], default="")
    all_of = {e.stage: together(e, machine) for e in stages}
    most = max(all_of, key=lambda name: all_of[name], default="")
    sums = Total(
        stages=stages,
        peak_stage=peak_stage,
        peak_bytes=peaks.get(peak_stage, 0),
        processes=machine.processes,
        together_stage=most,
        together_bytes=all_of.get(most, 0),
        disk_bytes=sum(e.disk_bytes for e in stages),
        spare_bytes=max((e.spare_bytes for e in stages), default=0),
        home_bytes=sum(e.home_bytes for e in stages),
        flops=float(sum(e.flops for e in stages)),
        seconds=(float(sum(e.seconds[0] for e in stages)), float(sum(e.seconds[1] for e in stages))),
        warnings=(),
    )
    return dataclasses.replace(sums, warnings=tuple(_warnings(sums, machine)))


def _warnings(sums: Total, machine: Machine) -> Iterable[str]:
    for disk in disks(sums, machine):
        line = f"{disk.name}: {size(disk.needed)} needed, {size(disk.free)} free"
        if disk.needed > DISK_LIMIT * disk.free:
            yield f"{line}: the run is refused"
        elif disk.needed > 0.5 * disk.free:
            yield line
    memory = f"memory: {sums.peak_stage} peaks at {size(sums.peak_bytes)}, {size(machine.memory_bytes)} free"
    remedy = "lower its micro-batch, or close other programs"
    if machine.processes > 1:
        count = machine.local or machine.processes
        memory = f"memory: {count} processes on this machine have {size(sums.together_bytes)} together in "
        memory += f"{sums.together_stage}, {size(machine.memory_bytes)} free{_most(sums)}"
        remedy = "divide more (trainer.parallel), lower its micro-batch, or start fewer here"
    if sums.together_bytes > machine.memory_bytes:
        yield f"{memory}: {remedy}"
    elif sums.together_bytes > 0.8 * machine.memory_bytes:
        yield memory
    if machine.device == "cpu" and machine.dtype == "float32":
        yield "no AMX or AVX-512 BF16: float32 is used, at about a third of the speed and twice the activation memory"
    if not machine.measured:
        yield "the machine's speed is guessed from its CPU flags: the range of time is three times wider either way"


def _most(sums: Total) -> str:
    """Which process has most in the stage where all have most together, when, and of what."""
    shares = next(e.shares for e in sums.stages if e.stage == sums.together_stage)
    if not shares:
        return ""
    most = max(shares, key=lambda share: sum(share.memory.values()))
    part = max(most.memory, key=most.memory.__getitem__)
    held = f"{size(sum(most.memory.values()))} in {most.moment}, {size(most.memory[part])} of it {part}"
    return f"; process {most.ranks[0]} has {held}"


class Disk(NamedTuple):
    """One file system that a run writes to: bytes needed and free."""

    name: str
    needed: int
    free: int


def disks(sums: Total, machine: Machine) -> tuple[Disk, ...]:
    """The run folder's disk, and that of ``PLAIT_HOME`` if it is another one."""
    needed = sums.disk_bytes + sums.spare_bytes
    if machine.home_disk_bytes is None:
        return (Disk("disk", needed + sums.home_bytes, machine.disk_bytes),)
    return (
        Disk("disk", needed, machine.disk_bytes),
        Disk("disk of PLAIT_HOME", sums.home_bytes, machine.home_disk_bytes),
    )


def require(sums: Total, machine: Machine, *, place: Path) -> None:
    """Refuse a run that would fill its disk, or that of ``PLAIT_HOME``.

    Args:
        sums: The recipe's needs.
        machine: What is free.
        place: Where the run would go, for the message.

    Raises:
        ResourceError: More than :data:`DISK_LIMIT` of the free disk is needed; says the numbers and the largest stage.
    """
    run, *others = disks(sums, machine)
    if run.needed > DISK_LIMIT * run.free:
        shared = 0 if others else 1

        def share(e: Estimate) -> int:
            return e.disk_bytes + e.spare_bytes + shared * e.home_bytes

        most = max(sums.stages, key=share)
        raise ResourceError(
            f"the run needs {size(run.needed)} of disk ({most.stage} alone {size(share(most))}), but "
            f"{size(run.free)} is free and only {DISK_LIMIT:.0%} of that may be used",
            place=str(place),
            remedy="free some disk space, run in another folder, or use fewer samples",
        )
    for disk in others:
        if disk.needed > DISK_LIMIT * disk.free:
            raise ResourceError(
                f"the caches need {size(disk.needed)} of disk, but {size(disk.free)} is free where PLAIT_HOME is and "
                f"only {DISK_LIMIT:.0%} of that may be used",
                place=str(home()),
                remedy="free some disk space, set PLAIT_HOME to a folder on another disk, or use fewer samples",
            )


def size(amount: int) -> str:
    """Bytes for a person: ``1.4 GiB``."""
    value = float(amount)
    for unit in ("B", "KiB", "MiB"):
        if value < 1024:
            return f"{value:.0f} {unit}"
        value /= 1024
    return f"{value:.1f} GiB"
