"""Files that survive: atomic writes, run folders, stage seals, locks."""

from __future__ import annotations

import errno
import os
import subprocess
import sys
from pathlib import Path

import pytest

from plait.core import files
from plait.core.errors import DataError, ResourceError, UsageError

pytestmark = pytest.mark.light


def no_space(*_: object, **__: object) -> None:
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def test_a_full_disk_leaves_the_old_file_and_no_litter(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "a.json"
    files.write_atomic(path, "old")
    monkeypatch.setattr(os, "fsync", no_space)
    with pytest.raises(ResourceError, match=r"No space left.*MiB free"):
        files.write_atomic(path, "new")
    assert path.read_text() == "old"
    assert [p.name for p in tmp_path.iterdir()] == ["a.json"]


def test_a_folder_appears_whole_or_not_at_all(tmp_path: Path) -> None:
    target = tmp_path / "step-1"

    def fail_half_way() -> None:
        with files.folder_atomic(target) as folder:
            (folder / "half").write_text("x")
            raise RuntimeError("boom")

    with pytest.raises(RuntimeError, match="boom"):
        fail_half_way()
    assert list(tmp_path.iterdir()) == []
    for content in ("first", "second"):
        with files.folder_atomic(target) as folder:
            (folder / "sub").mkdir()
            (folder / "sub" / "file").write_text(content)
        assert (target / "sub" / "file").read_text() == content
    assert [p.name for p in tmp_path.iterdir()] == ["step-1"]


def test_json_lines_name_the_broken_line(tmp_path: Path) -> None:
    path = tmp_path / "x.jsonl"
    files.write_jsonl(path, [{"a": 1}, {"a": "图"}])
    assert files.read_jsonl(path) == [{"a": 1}, {"a": "图"}]
    path.write_text('{"a": 1}\n{"a": \n')
    with pytest.raises(DataError, match="not valid JSON") as caught:
        files.read_jsonl(path)
    assert caught.value.place == f"{path}:2"


def test_missing_and_broken_json_are_data_errors(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="file not found"):
        files.read_json(tmp_path / "none.json")
    (tmp_path / "bad.json").write_text("{")
    with pytest.raises(DataError, match="not valid JSON"):
        files.read_json(tmp_path / "bad.json")


def test_runs_are_numbered_and_the_latest_is_linked(tmp_path: Path) -> None:
    contents = {"recipe.yaml": "name: quick"}
    first, second = (files.new_run("quick", tmp_path, contents=contents) for _ in range(2))
    other = files.new_run("quick-ci", tmp_path, contents=contents)
    assert [p.name for p in (first, second, other)] == ["quick-0001", "quick-0002", "quick-ci-0001"]
    assert (tmp_path / "latest").resolve() == other.resolve()
    assert (second / "recipe.yaml").read_text() == "name: quick"
    for name in ("latest", "quick-ci-0001", str(other)):
        assert files.find_run(name, tmp_path) == other.resolve()
    with pytest.raises(UsageError, match="no run called 'quick-0009'") as caught:
        files.find_run("quick-0009", tmp_path)
    assert "quick-ci-0001" in caught.value.remedy


def test_stages_are_found_backwards_through_their_seals(tmp_path: Path) -> None:
    data, pretrain, tune = (files.stage_folder(tmp_path, n, k) for n, k in enumerate(("data", "pretrain", "tune"), 1))
    for folder in (data, pretrain, tune):
        folder.mkdir()
    files.mark_done(data, kind="data", previous=None, summary={"rows": 3})
    files.mark_done(pretrain, kind="pretrain", previous=data, summary={})
    assert files.read_done(tune) is None
    assert files.find_stage(pretrain, "data") == data.resolve()
    moved = tmp_path.parent / f"{tmp_path.name}-moved"
    tmp_path.rename(moved)
    assert files.find_stage(moved / pretrain.name, "data") == (moved / data.name).resolve()
    with pytest.raises(DataError, match="no finished 'tune' stage"):
        files.find_stage(moved / pretrain.name, "tune")
    moved.rename(tmp_path)


def test_the_newest_model_is_found_backwards_and_an_unfinished_stage_ends_the_walk(tmp_path: Path) -> None:
    kinds = ("data", "tune", "evaluate", "align")
    data, tune, evaluate, align = (files.stage_folder(tmp_path, n, k) for n, k in enumerate(kinds, 1))
    for folder in (data, tune, evaluate, align):
        folder.mkdir()
    files.mark_done(data, kind="data", previous=None, summary={})
    for nothing in (None, data, align):
        with pytest.raises(DataError, match="no finished stage before this one made a multimodal model") as caught:
            files.find_model(nothing)
        assert caught.value.place == str(nothing)
    files.mark_done(tune, kind="tune", previous=data, summary={"model": "decoder/checkpoints/000003"})
    files.mark_done(evaluate, kind="evaluate", previous=tune, summary={"model": None})
    expected = (tune / "decoder" / "checkpoints" / "000003").resolve()
    assert files.find_model(evaluate).resolve() == expected
    files.mark_done(align, kind="align", previous=evaluate, summary={"model": "checkpoints/000002"})
    assert files.find_model(align).resolve() == (align / "checkpoints" / "000002").resolve()
    assert files.find_model(tune).resolve() == expected


def test_a_run_is_held_by_one_living_process_only(tmp_path: Path) -> None:
    code = "import sys, pathlib; from plait.core.files import lock\nwith lock(pathlib.Path(sys.argv[1])): pass"
    with files.lock(tmp_path):
        command = [sys.executable, "-c", code, str(tmp_path)]
        second = subprocess.run(command, capture_output=True, text=True, check=False)
    assert "UsageError" in second.stderr
    assert f"process {os.getpid()}" in second.stderr
    with files.lock(tmp_path):  # a lock left behind by a dead process does not bar the way
        pass


def test_a_root_that_is_a_file_or_read_only_is_a_resource_error(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("x")
    with pytest.raises(ResourceError, match="cannot write"):
        files.new_run("quick", tmp_path / "file", contents={"recipe.yaml": ""})


def test_a_fault_of_reading_inside_a_folder_is_not_called_a_full_disk(tmp_path: Path) -> None:
    def read_missing() -> None:
        with files.folder_atomic(tmp_path / "x"):
            (tmp_path / "missing").read_text()

    with pytest.raises(FileNotFoundError):
        read_missing()


def test_a_seal_changes_when_what_was_made_changes(tmp_path: Path) -> None:
    first, second = tmp_path / "01-data", tmp_path / "02-pretrain"
    for folder in (first, second):
        folder.mkdir()
    files.mark_done(first, kind="data", previous=None, summary={"digest": "a"})
    files.mark_done(second, kind="pretrain", previous=first, summary={})
    done = files.read_done(second)
    assert done is not None
    assert done["made_from"] == files.seal(first)
    files.mark_done(first, kind="data", previous=None, summary={"digest": "b"})
    assert done["made_from"] != files.seal(first)
