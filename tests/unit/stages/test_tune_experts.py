"""A tune stage whose decoder has experts: several processes that divide them make the model of one."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from tests.rank_script import cases_of

from plait.core.files import find_model, read_jsonl

Folders = dict[str, Path]


@pytest.mark.row("S4-68")
def test_processes_that_divide_experts_make_the_model_that_one_makes(data_stage: Path, tiny_folders: Folders) -> None:
    script = Path(__file__).with_name("tune_experts_ranks.py")
    found = cases_of(script, str(data_stage), str(tiny_folders["image"]), str(tiny_folders["decoder"]))
    assert (found["1"], found["2"]) == (["done"], ["done", "done"]), found["log"]
    folders = {
        world: find_model(data_stage.parent / f"experts-{world}") / "decoder" / "model.safetensors" for world in (1, 2)
    }
    one, two = (load_file(folders[world]) for world in (1, 2))
    assert one.keys() == two.keys()
    for name, weight in one.items():
        torch.testing.assert_close(two[name], weight, atol=1e-6, rtol=1e-5)
    records = read_jsonl(data_stage.parent / "experts-2" / "decoder" / "metrics.jsonl")
    assert all(0 < record["loss/dropped"] < 1 and record["loss/balance"] > 2 for record in records)
