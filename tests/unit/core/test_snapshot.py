"""Copies that keep their values while what they were copied from goes on."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from plait.core.snapshot import Snapshot, held, later, save_tensors


def test_without_a_snapshot_it_writes_at_once_from_any_layout(tmp_path: Path) -> None:
    filters = torch.arange(24.0).reshape(1, 2, 3, 4).to(memory_format=torch.channels_last)
    save_tensors({"a": filters, "b": filters.transpose(2, 3)[0]}, tmp_path / "x", metadata={"format": "pt"})
    found = load_file(tmp_path / "x")
    assert torch.equal(found["a"], filters)
    assert torch.equal(found["b"], filters.transpose(2, 3)[0])


def test_files_are_those_of_the_moment_of_the_copy_byte_for_byte(tmp_path: Path) -> None:
    layouts = {"plain": torch.randn(4, 6), "turned": torch.randn(6, 4).t(), "half": torch.randn(5).bfloat16()}
    layouts |= {
        "scalar": torch.tensor(3.0),
        "empty": torch.empty(0, 3),
        "too": torch.empty(0, 3),
        "whole": torch.arange(7),
    }
    save_tensors(layouts, tmp_path / "now", metadata={"format": "pt"})
    snapshot, said = Snapshot(), []
    with snapshot.taking():
        save_tensors(layouts, tmp_path / "later", metadata={"format": "pt"})
        later(lambda: said.append((tmp_path / "later").exists()))
    assert not (tmp_path / "later").exists()
    assert said == []
    for tensor in layouts.values():
        tensor.zero_()
    snapshot.write()
    assert (tmp_path / "later").read_bytes() == (tmp_path / "now").read_bytes()
    assert said == [True]  # in their order
    snapshot.write()
    assert said == [True]  # once


def test_a_tensor_saved_twice_is_copied_once_and_buffers_are_used_again(tmp_path: Path) -> None:
    weight, snapshot = torch.zeros(1000), Snapshot()
    pointers = set()
    for value in range(3):
        weight.fill_(value)
        with snapshot.taking():
            save_tensors({"model": weight}, tmp_path / "a")
            save_tensors({"weight": weight.detach()}, tmp_path / "b")
            pointers |= {held({"x": weight})["x"].data_ptr()}
        assert snapshot.n_bytes == 4000
        weight.fill_(-1)
        snapshot.write()
        assert load_file(tmp_path / "a")["model"].unique().tolist() == [value]
        assert load_file(tmp_path / "b")["weight"].unique().tolist() == [value]
    assert len(pointers) == 1
    assert weight.data_ptr() not in pointers


def test_what_is_made_on_the_way_keeps_its_own_copy(tmp_path: Path) -> None:
    """A temporary tensor's memory may be given to the next one; their copies must not be mixed up."""
    snapshot = Snapshot()
    with snapshot.taking():
        for number in range(50):
            save_tensors({"x": torch.full((100,), float(number))}, tmp_path / str(number))
    snapshot.write()
    assert [float(load_file(tmp_path / str(n))["x"][0]) for n in range(50)] == [float(n) for n in range(50)]


def test_buffers_that_are_no_longer_needed_are_given_back() -> None:
    snapshot = Snapshot()
    with snapshot.taking():
        held({"a": torch.zeros(100), "b": torch.zeros(50), "c": torch.ones(50)})
    assert snapshot.n_bytes == 800
    with snapshot.taking():
        held({"b": torch.zeros(50)})
    assert snapshot.n_bytes == 200


def test_weights_with_one_memory_stay_so_and_a_file_refuses_them_either_way(tmp_path: Path) -> None:
    weight = torch.zeros(3)
    tied = {"one": weight, "other": weight}
    with pytest.raises(RuntimeError, match="share memory"):
        save_file(tied, tmp_path / "x")
    snapshot = Snapshot()
    with snapshot.taking():
        copies = held(tied)
        save_tensors(tied, tmp_path / "x")
    assert copies["one"] is copies["other"]
    with pytest.raises(RuntimeError, match="share memory"):
        snapshot.write()
    assert held(tied)["one"] is weight


def test_a_fault_inside_leaves_the_next_save_to_write_at_once(tmp_path: Path) -> None:
    snapshot = Snapshot()
    with pytest.raises(ZeroDivisionError), snapshot.taking():
        raise ZeroDivisionError
    save_tensors({"x": torch.ones(2)}, tmp_path / "x")
    assert (tmp_path / "x").exists()


@pytest.mark.gpu
def test_from_a_gpu(tmp_path: Path) -> None:
    weight, snapshot = torch.arange(1e6, device="cuda"), Snapshot()
    with snapshot.taking():
        save_tensors({"x": weight}, tmp_path / "x")
    weight.zero_()
    snapshot.write()
    assert torch.equal(load_file(tmp_path / "x")["x"], torch.arange(1e6))
