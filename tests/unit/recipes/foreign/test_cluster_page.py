"""What docs/cluster.md says: names lead where it says they do, and its script is one."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from plait.recipes.foreign.fragment import import_config

pytestmark = pytest.mark.light

PAGE = (Path(__file__).parents[4] / "docs" / "cluster.md").read_text(encoding="utf-8")
TABLE = PAGE.partition("| DeepSpeed | Megatron-LM | Plait |")[2]
ROWS = [
    [re.findall(r"`([^`]+)`", cell) for cell in line.split("|")[1:4]] for line in TABLE.splitlines()[2:] if "|" in line
]

VALUES: dict[str, Any] = {
    "zero_optimization.stage": 1,
    "zero_optimization.offload_optimizer.device": "cpu",
    "optimizer.type": "SGD",
    "optimizer.params.betas": [0.8, 0.9],
    "scheduler.params.cos_min_ratio": 0.1,
    "--adam-beta1": 0.8,
    "--adam-beta2": 0.9,
    "scheduler.type": "WarmupDecayLR",
    "bf16.enabled": True,
    "fp16.enabled": True,
    "compile.enabled": True,
    "--data-parallel-sharding-strategy": "optim",
    "--optimizer": "sgd",
    "--lr-decay-style": "cosine",
    "--lr-warmup-fraction": "0.1",
    "--recompute-granularity": "full",
}
FLAGS = ("--use-distributed-optimizer", "--optimizer-cpu-offload", "--bf16", "--fp16", "--recompute-activations")
FLAGS += ("--async-save", "--sequence-parallel")
WITH = {
    "zero_optimization.offload_optimizer.device": {"zero_optimization.stage": 1},
    "--optimizer-cpu-offload": {"--use-distributed-optimizer": None},
    "--micro-batch-size": {"--global-batch-size": 64},
    "--train-samples": {"--global-batch-size": 64},
    "--min-lr": {"--lr": "4"},
    "--sequence-parallel": {"--tensor-model-parallel-size": "2"},
}
REFUSED = {"expert": "the decoder has no experts"}
"""Settings of `trainer.parallel` that the standard recipe's decoder does not allow: then the row says so."""


@pytest.mark.parametrize(
    ("key", "settings"), [(key, settings) for *tools, settings in ROWS for keys in tools for key in keys]
)
def test_a_name_leads_where_the_table_says(key: str, settings: list[str], tmp_path: Path) -> None:
    values = {**WITH.get(key, {}), key: None if key in FLAGS else VALUES.get(key, 2)}
    if key.startswith("--"):
        path = tmp_path / "args.txt"
        path.write_text("\n".join(f"{name} {'' if value is None else value}" for name, value in values.items()))
    else:
        tree: dict[str, Any] = {}
        for name, value in values.items():
            below = tree
            *heads, last = name.split(".")
            for head in heads:
                below = below.setdefault(head, {})
            below[last] = value
        path = tmp_path / "ds.json"
        path.write_text(json.dumps(tree))
    found = import_config(path, processes=32)
    (row,) = [row for row in found.rows if row.leaf.key == key and not row.implied]
    if row.outcome != "mapped":
        assert REFUSED[settings[0].rpartition(".")[2]] in row.why
    else:
        assert set(row.settings) & set(settings)


def test_the_table_is_there() -> None:
    assert len(ROWS) > 20


def test_the_job_script_is_one() -> None:
    (script,) = re.findall(r"```bash\n(#!/bin/bash\n.*?)```", PAGE, re.DOTALL)
    result = subprocess.run(["bash", "-n"], input=script, capture_output=True, text=True, check=False, timeout=30)
    assert (result.returncode, result.stderr) == (0, "")
    options = re.findall(r"--[a-z-]+", script[script.index("srun torchrun") : script.index("-m plait")])
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--help"]  # of this environment, wherever it is
    known = subprocess.run(torchrun, capture_output=True, text=True, check=True, timeout=60).stdout
    assert [option for option in options if option not in known] == []
