"""Damaged, partial, full: what is found is named and put aside, what was good stays, and training goes on from it."""

from __future__ import annotations

import json
import os
import random
import resource
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

from plait.core.device import Compute
from plait.core.errors import CheckpointError, ConfigError, ResourceError
from plait.core.events import Events
from plait.core.tensors import IGNORE, Batch
from plait.training.checkpoint import verify
from plait.training.loop import fit
from plait.training.optim import Rates
from plait.training.settings import FitResult, Hooks, Settings

CPU = Compute(device="cpu", dtype="float32", threads=torch.get_num_threads(), why=())


class Counted:
    needs_global_batch = False

    def count(self, batch: Batch) -> dict[str, torch.Tensor]:
        return {"text": (batch.labels != IGNORE).sum()}

    def __call__(self, model: nn.Module, batch: Batch) -> dict[str, torch.Tensor]:
        logits = model(nn.functional.one_hot(batch.token_ids, 5).float())
        return {"text": nn.functional.cross_entropy(logits.flatten(0, 1), batch.labels.flatten(), reduction="sum")}


class Stream:
    def step_batches(self, step: int) -> list[Batch]:
        token_ids = torch.randint(5, (2, 3), generator=torch.Generator().manual_seed(step))
        ones = torch.ones_like(token_ids)
        ids = (f"{step}-0", f"{step}-1")
        return [
            Batch(
                token_ids=token_ids, labels=token_ids.flip(1), segment_ids=ones, media={}, item_row={}, sample_ids=ids
            )
        ]


def train(
    folder: Path,
    *,
    steps: int = 6,
    seen: list | None = None,
    save_model: Callable[[Path], None] | None = None,
    beside: bool = False,
) -> FitResult:
    """Six steps with a checkpoint every second one; the newest two stay."""
    torch.manual_seed(1)
    model = nn.Sequential(nn.Linear(5, 8), nn.Dropout(0.2), nn.Linear(8, 5))
    return fit(
        model,
        Counted(),
        Stream(),
        settings=Settings(
            steps=steps,
            compute=CPU,
            rates=Rates(lr=0.05),
            save_every=2,
            keep_last=2,
            async_save=beside,
            context={"steps": steps},
        ),
        folder=folder,
        events=Events(listeners=(seen.append,) if seen is not None else ()),
        hooks=Hooks(save_model=save_model or (lambda temp: save_file(model.state_dict(), temp / "model.safetensors"))),
    )


def tensors(folder: Path) -> dict[str, torch.Tensor]:
    last = max((folder / "checkpoints").glob("[0-9]*"))
    found = {f"{p.name}/{k}": v for p in sorted(last.rglob("*.safetensors")) for k, v in load_file(p).items()}
    found.pop(
        "rng.safetensors/python"
    )  # beartype, which checks types here, draws from it; test_kill.py compares it too
    return found


def assert_same(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> None:
    assert one.keys() == other.keys()
    assert [name for name in one if not torch.equal(one[name], other[name])] == []


@pytest.fixture(scope="module")
def whole(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("whole")
    train(folder)
    return folder


@pytest.fixture
def copy(whole, tmp_path) -> Path:
    return shutil.copytree(whole, tmp_path / "copy")


def flip_a_bit(path: Path) -> None:
    data = bytearray(path.read_bytes())
    chance = random.Random(path.name)
    data[chance.randrange(len(data))] ^= 1 << chance.randrange(8)
    path.write_bytes(data)


def cut_the_end(path: Path) -> None:
    os.truncate(path, path.stat().st_size - 1)


def add_zeros(path: Path) -> None:
    with path.open("ab") as file:
        file.write(b"\0" * 8)


def fill_with_zeros(path: Path) -> None:
    path.write_bytes(b"\0" * path.stat().st_size)  # what a rename without fsync leaves after a power cut


FILES = [
    "model.safetensors",
    "resume/state.json",
    "resume/weights.safetensors",
    "resume/optimizer.safetensors",
    "resume/rng.safetensors",
]
DAMAGES = [flip_a_bit, cut_the_end, add_zeros, fill_with_zeros, Path.unlink]
MANIFEST = [("manifest.json", fill_with_zeros), ("manifest.json", Path.unlink)]


@pytest.mark.parametrize(("name", "damage"), [*MANIFEST, *((name, damage) for name in FILES for damage in DAMAGES)])
def test_any_damage_to_any_file_is_found_put_aside_and_survived(whole, copy, name, damage):
    damage(copy / "checkpoints/000006" / name)
    seen: list = []
    result = train(copy, seen=seen)
    assert result.resumed_from == 4
    assert_same(tensors(copy), tensors(whole))
    (warning,) = [e for e in seen if e.kind == "warning"]
    assert "checkpoint 000006 is damaged" in warning.text
    assert name in warning.text
    moved = copy / "checkpoints/quarantine/000006"
    assert warning.fields["moved_to"] == str(moved)
    assert (moved / "resume").is_dir()  # nothing was deleted


def test_a_flipped_bit_in_the_manifest_is_found_or_changes_nothing(copy):
    path = copy / "checkpoints/000006/manifest.json"
    good = path.read_bytes()
    chance = random.Random(0)
    found = 0
    for _ in range(150):
        data = bytearray(good)
        data[chance.randrange(len(data))] ^= 1 << chance.randrange(8)
        path.write_bytes(data)
        try:
            verify(path.parent)
        except CheckpointError:
            found += 1
        else:
            assert json.loads(data) == json.loads(good)  # a blank became another blank
    assert found > 100


def test_a_manifest_of_another_step_does_not_pass(copy):
    shutil.rmtree(copy / "checkpoints/000006")
    shutil.copytree(copy / "checkpoints/000004", copy / "checkpoints/000006")
    with pytest.raises(CheckpointError, match="its manifest is that of step 4"):
        verify(copy / "checkpoints/000006")
    assert train(copy).resumed_from == 4


def test_quarantine_takes_the_same_name_twice(whole, copy):
    for _ in range(2):
        cut_the_end(copy / "checkpoints/000006/model.safetensors")
        train(copy)
    assert {p.name for p in (copy / "checkpoints/quarantine").iterdir()} == {"000006", "000006-2"}
    assert_same(tensors(copy), tensors(whole))


def test_with_no_whole_checkpoint_it_stops_and_starts_over_only_when_asked_again(whole, copy):
    for step in ("000004", "000006"):
        fill_with_zeros(copy / "checkpoints" / step / "resume/weights.safetensors")
    with pytest.raises(CheckpointError, match="none of 2 checkpoints is whole") as error:
        train(copy)
    assert error.value.exit_code == 7
    assert "000006 (damaged: sha256 of resume/weights.safetensors" in error.value.cause
    assert train(copy).resumed_from == 0  # resuming again is the consent
    assert_same(tensors(copy), tensors(whole))


def test_a_copy_without_its_manifest_is_not_trusted(copy):
    """A folder that merely has a number for a name may be half a copy."""
    shutil.copytree(copy / "checkpoints/000006", copy / "checkpoints/000008")
    (copy / "checkpoints/000008/manifest.json").unlink()
    seen: list = []
    train(copy, seen=seen)
    assert "checkpoint 000008 is damaged: manifest.json is missing" in seen[0].text


def test_a_checkpoint_beyond_the_end_is_refused(copy):
    with pytest.raises(ConfigError, match="steps is 5, but 6 are done"):
        train(copy, steps=5)


# --- a full disk ---------------------------------------------------------------------------------------------------


def fill_up_at(step: int, write: Callable[[Path], None]) -> Callable[[Path], None]:
    """A model writer that lets ``write`` hit the end of the disk at the checkpoint of ``step``."""
    return lambda temp: write(temp) if temp.name.startswith(f".{step:06d}") else None


def no_space(temp: Path) -> None:
    with open("/dev/full", "wb") as file:  # really refuses to take a byte
        file.write(b"weights")


def test_a_full_disk_stops_the_run_and_leaves_the_last_checkpoint(tmp_path):
    with pytest.raises(ResourceError, match="No space left on device") as error:
        train(tmp_path, save_model=fill_up_at(4, no_space))
    assert error.value.exit_code == 5
    assert "MiB free" in error.value.cause
    assert "plait resume" in error.value.remedy
    assert sorted(p.name for p in (tmp_path / "checkpoints").iterdir()) == ["000002"]  # no debris either
    verify(tmp_path / "checkpoints/000002")
    assert train(tmp_path, save_model=lambda temp: None).resumed_from == 2


@pytest.mark.parametrize("room", [100, 3000])
def test_the_tensor_writer_running_out_of_room_is_the_same_error(tmp_path, room):
    """safetensors writes in Rust and reports in its own way; a limit on file size makes the kernel refuse for real."""
    train(tmp_path, steps=2)
    (tmp_path / "metrics.jsonl").chmod(0o644)
    before = resource.getrlimit(resource.RLIMIT_FSIZE)

    def squeeze(temp: Path) -> None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (room, before[1]))
        save_file({"weights": torch.zeros(10_000)}, temp / "model.safetensors")

    try:
        with pytest.raises(ResourceError, match="File too large"):
            train(tmp_path, save_model=squeeze, steps=4)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert sorted(p.name for p in (tmp_path / "checkpoints").iterdir()) == ["000002"]
    assert train(tmp_path, steps=4, save_model=lambda temp: None).resumed_from == 2


def test_a_folder_that_cannot_be_made_is_said(tmp_path):
    (tmp_path / "checkpoints").write_text("in the way")
    with pytest.raises(ResourceError, match="cannot write"):
        train(tmp_path)


# --- a power cut ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("beside", [False, True])
def test_content_is_on_disk_before_its_name_and_that_before_a_deletion(tmp_path, monkeypatch, beside):
    """A power cut may undo what was not synced, in any order; so the order of syncs and renames protects."""
    log: list[tuple[str, str]] = []
    fsync, rename, rmtree = os.fsync, Path.rename, shutil.rmtree

    def logged_fsync(fd: int) -> None:
        log.append(("sync", Path(f"/proc/self/fd/{fd}").readlink().name))
        fsync(fd)

    def logged_rename(self: Path, target: Path) -> Path:
        log.append(("rename", f"{self.name} -> {target.name}"))
        return rename(self, target)

    def logged_rmtree(path: Path, *args, **named) -> None:
        if Path(path).exists():
            log.append(("delete", Path(path).name))
        rmtree(path, *args, **named)

    train(tmp_path, steps=4)
    monkeypatch.setattr(os, "fsync", logged_fsync)
    monkeypatch.setattr(Path, "rename", logged_rename)
    monkeypatch.setattr(shutil, "rmtree", logged_rmtree)
    train(tmp_path, steps=6, beside=beside)
    temp = f".000006.{os.getpid()}.tmp"
    renamed = log.index(("rename", f"{temp} -> 000006"))
    synced = [name for kind, name in log[:renamed] if kind == "sync"]
    for name in (*(Path(f).name for f in FILES), "manifest.json", "resume", temp, "metrics.jsonl"):
        assert name in synced, name
    after = log[renamed + 1 :]
    assert after[0] == ("sync", "checkpoints")
    hidden = after.index(("rename", "000002 -> .000002.deleted"))
    assert after.index(("delete", ".000002.deleted")) > hidden
    assert ("sync", "checkpoints") in after[hidden:]
