"""Checkpoints of several processes: any number reads what any number wrote, and a fault of one is known to all."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file
from tests.rank_script import cases_of


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("ranks")


@pytest.fixture(scope="module")
def outcome(root: Path) -> dict[str, Any]:
    return cases_of(Path(__file__).with_name("ranks.py"), str(root))


def test_every_rank_writes_its_own_file_and_nothing_is_pickled(outcome: dict[str, Any], root: Path) -> None:
    assert outcome["saved"] == [str(root / "checkpoints/000003")] * 2, outcome["log"]
    shards = [f"shards/shard-0000{rank}-model-00001-of-00001.safetensors" for rank in (1, 2)]
    assert outcome["files"] == ["manifest.json", "note.json", *shards]
    pieces = [load_file(root / "checkpoints/000003" / shard) for shard in shards]
    assert [list(piece["rows"].shape) for piece in pieces] == [[3, 6], [2, 6]]
    assert [list(piece["columns"].shape) for piece in pieces] == [[3, 4], [3, 4]]
    assert sum("same" in piece for piece in pieces) == sum("plain" in piece for piece in pieces) == 1  # written once


@pytest.mark.parametrize("world", ["1", "2", "4"])
def test_any_number_of_processes_reads_every_bit(outcome: dict[str, Any], world: str) -> None:
    assert outcome["loaded"][world] == [[]] * int(world), outcome["log"]


def test_four_write_and_one_writes_what_two_read(outcome: dict[str, Any]) -> None:
    assert outcome["from four"][1] == [[], []], outcome["log"]
    assert outcome["from one"][1] == [[], []], outcome["log"]


def test_the_whole_is_put_together_in_one_process_for_an_export(outcome: dict[str, Any], root: Path) -> None:
    assert outcome["whole"] == [[]], outcome["log"]
    assert list(load_file(root / "model.safetensors")["rows"].shape) == [5, 6]


def test_tensors_that_do_not_fit_are_named_on_every_rank(outcome: dict[str, Any]) -> None:
    for answer in outcome["other shape"]:
        assert answer.startswith(
            "CheckpointError: 1 of 7 tensors do not fit: rows: saved float32 [5, 6], wanted float32 [6, 5]"
        )
    assert "plain: saved float32 [3, 3], wanted float64 [3, 3]" in outcome["other dtype"][0]


@pytest.mark.parametrize(
    ("damage", "said"),
    [
        ("flip", "damaged: sha256 of shards/shard-00002"),
        ("unlink", "damaged: shards/shard-00002"),
        ("unlisted", "columns: saved bfloat16 [3, 4], wanted bfloat16 [3, 8]"),
    ],
)
def test_a_damaged_or_missing_piece_is_named_on_every_rank(outcome: dict[str, Any], damage: str, said: str) -> None:
    for answer in outcome[damage]:
        assert answer.startswith("CheckpointError"), outcome["log"]
        assert said in answer


def test_a_fault_of_one_rank_is_raised_in_all_and_leaves_no_checkpoint(outcome: dict[str, Any]) -> None:
    first, second = outcome["rank 0 full"]
    assert first.startswith("ResourceError: cannot write: No space left"), first
    assert second.startswith("ResourceError: process 0 of 2: cannot write: No space left")
    first, second = outcome["rank 1 full"]
    assert first.startswith("ResourceError: process 1 of 2: cannot write: No space left")
    assert second.startswith("ResourceError: cannot write: No space left")
    first, second = outcome["rank 1 killed"]
    assert second == "killed"
    assert "Error" in first
    assert outcome["left"] == ["000003"]


def test_rotation_and_verification_are_those_of_any_checkpoint(outcome: dict[str, Any]) -> None:
    assert outcome["kept"] == ["000002", "000003"]
