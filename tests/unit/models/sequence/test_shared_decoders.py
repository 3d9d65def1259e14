"""Decoders of Hugging Face over shared rows: hidden states and gradients of whole rows; what is refused, and why."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from tests.rank_script import cases_of

IN_FLOAT32 = ("gemma3_text",)
"""Families whose norms compute in float32, whatever the weights' format."""


@pytest.fixture(scope="module")
def said() -> dict[str, list[dict[str, Any]]]:
    """What each of 2 and of 3 processes found."""
    found = cases_of(Path(__file__).with_name("shared_decoders.py"))
    log = found.pop("log")
    assert all(isinstance(one, dict) for ranks in found.values() for one in ranks), (found, log)
    return found


@pytest.mark.row("S4-65")
@pytest.mark.parametrize("world", [2, 3])
def test_decoders_read_shared_rows_as_whole_ones(said: dict[str, list[dict[str, Any]]], world: int) -> None:
    for one in said[str(world)]:
        assert len(one["read"]) == 26
        for name, apart in one["read"].items():
            assert apart <= (1e-6 if name.startswith(IN_FLOAT32) else 1e-12), name


def test_what_goes_across_positions_otherwise_is_refused(said: dict[str, list[dict[str, Any]]]) -> None:
    why = {
        "gemma2": "caps the scores",
        "doge": "makes a mask of its own",
        "lfm2": r"has layers (conv) that hand on a state",
        "mamba": "has no attention that can be replaced",
        "bloom": "has no attention that can be replaced",
        "gpt_oss": "wants 's_aux' of its attention",
        "llama": "has attention_dropout 0.1",
    }
    for one in said["2"]:
        assert one["refused"].keys() == why.keys()
        for family, text in one["refused"].items():
            assert text.startswith("rows cannot be shared among processes: "), family
            assert why[family] in text
