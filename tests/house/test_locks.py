"""The locks install what pyproject.toml asks for, by hash, and leave torch to its owner."""

from __future__ import annotations

import re
import tomllib
from pathlib import Path

import pytest
from packaging.markers import Marker
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

pytestmark = pytest.mark.light

ROOT = Path(__file__).parents[2]
BY_OTHERS = re.compile(r"torch|torchvision|torchaudio|triton|nvidia-.*|cuda-.*")
"""What TORCH in the Makefile brings, and what must never come."""


def locked(name: str) -> dict[str, list[tuple[Requirement, int]]]:
    """Pins of a lock by package, each with how many hashes it has; a package may be pinned apart for older Pythons."""
    found: dict[str, list[tuple[Requirement, int]]] = {}
    text = (ROOT / "requirements" / f"{name}.lock").read_text(encoding="utf-8")
    for entry in re.split(r"\n(?=\S)", text):
        if not entry.startswith("#"):
            line, *hashes = (part.strip() for part in entry.replace("\\\n", "\n").splitlines())
            pin = Requirement(line)
            found.setdefault(canonicalize_name(pin.name), []).append((pin, len(hashes)))
    return found


def wanted(extra: str) -> list[Requirement]:
    """What pyproject.toml asks for: the core, and an extra with the extras it names."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    found = [Requirement(line) for line in project["dependencies"]]
    todo = [extra]
    while todo:
        for line in project["optional-dependencies"][todo.pop()]:
            requirement = Requirement(line)
            if requirement.name == project["name"]:
                todo += requirement.extras
            else:
                found.append(requirement)
    return found


@pytest.mark.parametrize("name", ["quickstart", "dev"])
def test_lock_is_hashed_exact_and_without_torch(name: str) -> None:
    pins = locked(name)
    assert not [p for p in pins if BY_OTHERS.fullmatch(p)]
    for package, entries in pins.items():
        for pin, hashes in entries:
            assert str(pin.specifier).startswith("=="), package
            assert hashes >= 1, package


@pytest.mark.parametrize("name", ["quickstart", "dev"])
def test_lock_has_what_the_project_asks_for(name: str) -> None:
    pins = locked(name)
    for requirement in wanted(name):
        package = canonicalize_name(requirement.name)
        if not BY_OTHERS.fullmatch(package):
            assert package in pins, f"{package} is not locked: run `make lock`"
            for pin, _ in pins[package]:
                version = str(pin.specifier).removeprefix("==")
                assert requirement.specifier.contains(version), f"{pin} against {requirement}: run `make lock`"


def test_setuptools_is_locked_for_the_editable_install() -> None:
    build = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["build-system"]["requires"]
    (requirement,) = (Requirement(line) for line in build)
    for name in ("quickstart", "dev"):
        assert all(requirement.specifier.contains(str(p.specifier)[2:]) for p, _ in locked(name)["setuptools"])


def test_users_and_developers_get_the_same_versions() -> None:
    users, developers = locked("quickstart"), locked("dev")
    assert {p: [str(r) for r, _ in users[p]] for p in users} == {p: [str(r) for r, _ in developers[p]] for p in users}


def test_pins_that_differ_by_python_cover_every_python() -> None:
    for package, entries in locked("dev").items():
        markers = [pin.marker for pin, _ in entries]
        if len(entries) > 1:
            for python in ("3.11", "3.12", "3.13"):
                environment = {"python_full_version": f"{python}.0", "python_version": python}
                chosen = [m for m in markers if isinstance(m, Marker) and m.evaluate(environment)]
                assert len(chosen) == 1, f"{package} on Python {python}"
