"""Completion, asked as a shell asks: words up to the cursor in, candidates out; and through a real bash."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from plait.cli import completion
from plait.cli.main import VERBS, build_parser, main

pytestmark = pytest.mark.light


def words(*typed: str) -> list[str]:
    return [word for word, _ in completion.complete(typed)]


@pytest.fixture
def workplace(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A working directory with two runs, one of them the latest, and a folder that is no run."""
    for name in ("quickstart-0001", "quickstart-0002", "mine-0001"):
        (tmp_path / "runs" / name).mkdir(parents=True)
    for number, name in enumerate(("quickstart-0001", "quickstart-0002"), 1):
        (tmp_path / "runs" / name / "recipe.yaml").write_text("name: quickstart\n")
        os.utime(tmp_path / "runs" / name, (number, number))
    (tmp_path / "runs" / "latest").symlink_to("quickstart-0002")
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_verbs_with_their_help() -> None:
    found = dict(completion.complete([""]))
    assert list(found) == list(VERBS)
    assert found["rows"].startswith("show which rows")
    assert words("ro") == ["rows"]
    assert words() == list(VERBS)


def test_options_once_and_no_hidden_ones() -> None:
    assert "--missing" in words("rows", "--")
    assert "--missing" not in words("rows", "--missing", "--")
    assert "--words" not in words("completion", "--")
    assert words("rows", "--miss") == ["--missing"]


def test_shells() -> None:
    assert words("completion", "") == ["bash", "fish", "zsh"]
    assert words("completion", "z") == ["zsh"]


def test_shipped_recipes() -> None:
    folder = Path(completion.__file__).parents[1] / "recipes"
    assert words("run", "") == sorted(path.stem for path in folder.glob("*.yaml"))


def test_runs_newest_first_and_only_runs(workplace: Path) -> None:
    assert words("resume", "") == ["latest", "quickstart-0002", "quickstart-0001"]
    assert words("resume", "quickstart-0001", "") != ["latest", "quickstart-0002", "quickstart-0001"]
    (workplace / "other" / "x-0001").mkdir(parents=True)
    (workplace / "other" / "x-0001" / "recipe.yaml").write_text("name: x\n")
    assert words("resume", "--runs", "other", "") == ["x-0001"]
    assert words("resume", "--runs", "=", "other", "") == ["x-0001"]  # as bash cuts --runs=other


def test_value_of_an_option_is_not_taken_for_a_positional(workplace: Path) -> None:
    assert words("resume", "--runs", "") == []  # a folder: the shell completes it
    assert words("resume", "--runs", "runs", "l") == ["latest"]


def test_overrides_are_left_to_the_shell(workplace: Path) -> None:
    assert words("run", "quickstart", "data.source=./pa") == []
    assert words("run", "quickstart", "data.source", "=") == []


def test_every_verb_and_subcommand_can_be_completed() -> None:
    """No verb has an argument that breaks the walk; sub-commands are found to any depth."""

    def visit(*path: str) -> None:
        for name in words(*path, ""):
            if name in names_below(path):
                visit(*path, name)
        assert "--help" in words(*path, "--h")

    def names_below(path: tuple[str, ...]) -> set[str]:
        parser = completion._Cursor(build_parser(), path)
        action = parser._positional()
        return set(getattr(action, "_name_parser_map", {}))

    visit()


@pytest.fixture
def on_path(tmp_path: Path) -> dict[str, str]:
    """An environment in which ``plait`` is this source, whatever else is installed."""
    folder = tmp_path / "bin"
    folder.mkdir()
    script = folder / "plait"
    script.write_text(f'#!/bin/sh\nexec "{sys.executable}" -m plait "$@"\n')
    script.chmod(0o755)
    return os.environ | {"PATH": f"{folder}{os.pathsep}{os.environ['PATH']}"}


def in_bash(line: list[str], env: dict[str, str], cwd: Path) -> list[str]:
    array = " ".join(f"'{word}'" for word in line)
    script = f'eval "$(plait completion bash)"; COMP_WORDS=({array}); COMP_CWORD={len(line) - 1}; _plait; '
    script += 'printf "%s\\n" "${COMPREPLY[@]}"; complete -p plait >&2'
    result = subprocess.run(
        ["bash", "--norc", "-euc", script], env=env, cwd=cwd, check=True, capture_output=True, text=True, timeout=60
    )
    assert result.stderr.strip() == "complete -o default -F _plait plait"
    return result.stdout.split()


def test_in_bash(workplace: Path, on_path: dict[str, str]) -> None:
    assert in_bash(["plait", "com"], on_path, workplace) == ["completion"]
    assert in_bash(["plait", "resume", ""], on_path, workplace) == ["latest", "quickstart-0002", "quickstart-0001"]
    assert in_bash(["plait", "rows", "--mi"], on_path, workplace) == ["--missing"]
    assert in_bash(["plait", "run", "quickstart", "data.source", "=", "./x"], on_path, workplace) == []


@pytest.mark.parametrize("shell", ["bash", "fish", "zsh"])
def test_scripts_parse(shell: str, capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    """Every script is printed whole, with and without --json; the shells that are here accept it."""
    assert main(["completion", shell]) == 0
    script = capsys.readouterr().out
    assert main(["completion", shell, "--json"]) == 0
    assert json.loads(capsys.readouterr().out) == {"shell": shell, "script": script}
    path = tmp_path / "script"
    path.write_text(script)
    if shutil.which(shell):
        subprocess.run([shell, "-n", str(path)], check=True, timeout=30)


def test_no_shell_is_a_usage_error(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["completion"]) == 2
    assert "bash, zsh, fish" in capsys.readouterr().err
