"""A whole recipe in stages of divided matrices, under torchrun: tune and align learn what one process learns."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path

import pytest
from safetensors.torch import load_file
from tests.tiny_recipe import write_recipe

from plait.core.files import read_json, read_jsonl

SRC = Path(__file__).parents[4] / "src"
COMMON = ("stages.tune.trainer.async_save=false", "stages.tune.trainer.micro_batch=4")
STAGES = tuple(f"stages.{s}.trainer.parallel.{d}=2" for s in ("tune", "align") for d in ("pipeline", "tensor"))
STAGES += ("stages.align.trainer.parallel.sequence=true",)
PHASES = ("02-tune/words", "02-tune/connector", "02-tune/decoder", "03-align")


def ran(root: Path, home: Path, launcher: tuple[str, ...], *settings: str) -> Path:
    result = subprocess.run(
        [sys.executable, *launcher, "-m", "plait", "run", "tiny.yaml", *COMMON, *settings],
        cwd=root,
        env=os.environ | {"OMP_NUM_THREADS": "1", "PLAIT_HOME": str(home), "PYTHONPATH": str(SRC)},
        capture_output=True,
        text=True,
        check=False,
        timeout=200,
    )
    assert result.returncode == 0, result.stderr
    return root / "runs" / "tiny-0001"


@pytest.mark.row("S2-30")
@pytest.mark.row("S4-65")
def test_a_recipe_in_two_stages_of_two_processes_learns_what_one_process_learns(
    tmp_path: Path, tiny_folders: Mapping[str, Path]
) -> None:
    alone, several = tmp_path / "alone", tmp_path / "several"
    alone.mkdir()
    write_recipe(alone, tiny_folders, steps=6, pretrain=False)
    shutil.copytree(alone, several)
    one = ran(alone, tmp_path, ())
    four = ran(several, tmp_path, ("-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "4"), *STAGES)
    for phase in PHASES:
        losses = [[line["loss"] for line in read_jsonl(run / phase / "metrics.jsonl")] for run in (one, four)]
        assert losses[1] == pytest.approx(losses[0], rel=1e-5), phase
        files = [
            {
                path.relative_to(run / phase): load_file(path)
                for path in max((run / phase / "checkpoints").glob("[0-9]*")).rglob("*.safetensors")
                if not {"resume", "shards"} & {*path.parts}
            }
            for run in (one, four)
        ]
        assert files[0].keys() == files[1].keys()
        for path, tensors in files[0].items():
            for name, tensor in tensors.items():
                assert tensor.float().allclose(files[1][path][name].float(), atol=2e-5), (phase, path, name)
        if phase != PHASES[0]:  # of which no decoder is a part
            assert read_json(four / phase / "timeline.json")["stages"] == 2
    page = (four / "report.html").read_text()
    assert "02-tune/decoder/timeline.json" in page
    assert "through 2 stages, idle for " in page
