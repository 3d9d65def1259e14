"""Compress: what it leaves loads and answers, and its figures are those of the files."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from plait.core.errors import CheckpointError
from plait.core.estimate import Machine
from plait.core.events import Event, Events
from plait.core.files import find_model, read_done, read_json, read_jsonl
from plait.stages.compress import Compress
from plait.training.trainer import Trainer

MACHINE = Machine(
    cores=2, memory_bytes=8 * 2**30, disk_bytes=50 * 2**30, gemm_fp32=2.8e11, gemm_bf16=1.3e12, measured=True
)


def compress(previous: Path, name: str = "03-compress", **settings: Any) -> tuple[Path, list[str]]:
    said: list[str] = []

    def listener(event: Event) -> None:
        said.append(event.text)

    folder = previous.parent / name
    folder.mkdir(exist_ok=True)
    stage = Compress(**{"questions": 6, "max_new_tokens": 5, **settings})
    stage.run(previous, folder, events=Events(listeners=(listener,)))
    return folder, said


@pytest.mark.row("S4-97")
def test_the_model_is_smaller_and_both_answer_the_same_questions(tuned_stage: Path) -> None:
    folder, said = compress(tuned_stage)
    done = read_done(folder)
    assert done is not None
    assert find_model(folder) == folder / "model"
    record = read_json(folder / "compress.json")
    for when in ("before", "after"):
        assert record[when]["bytes"] == sum(record[when]["parts"].values())
    assert record["after"]["bytes"] < record["before"]["bytes"]
    assert record["tensors"] == 14
    files = {path.name: path.stat().st_size for path in (folder / "model").glob("*.safetensors")}
    assert record["files"] == files
    # Beyond the tensors there are only headers.
    assert 0 <= sum(files.values()) - record["after"]["bytes"] < 16_384
    rows = read_jsonl(folder / "predictions.jsonl")
    assert {row["task"] for row in rows} == {"name.en", "yesno"}
    assert {row["split"] for row in rows} == {"test-concept"}, "own data have no other style"
    assert all({"answer", "uncompressed", "target", "question", "uri"} <= row.keys() for row in rows)
    assert sum(row["task"] == "yesno" and row["target"] == "yes" for row in rows) == 3
    scores = {score["name"]: score for score in read_json(folder / "scores.json")}
    for task, metric in (("name.en", "f1"), ("yesno", "accuracy")):
        part = f"test-concept/{task}"
        same = [row["answer"] == row["uncompressed"] for row in rows if row["task"] == task]
        assert scores[f"{part}/agreement"]["value"] == pytest.approx(sum(same) / len(same))
        gain = scores[f"{part}/{metric}/gain-over-uncompressed"]
        assert gain["value"] == pytest.approx(
            scores[f"{part}/{metric}"]["value"] - scores[f"{part}/{metric}/uncompressed"]["value"]
        )
    assert said[-3:] == done["summary"]["lines"]


def test_running_again_gives_the_same_bytes(tuned_stage: Path) -> None:
    one, _ = compress(tuned_stage, "one")
    other, _ = compress(tuned_stage, "other")
    (other / "done.json").unlink()  # a run that was killed before its seal
    compress(tuned_stage, "other")
    for name in ("compress.json", "scores.json", "predictions.jsonl", "model/decoder.safetensors", "model/plait.json"):
        assert (one / name).read_bytes() == (other / name).read_bytes()


def test_the_aligned_model_is_the_one_that_is_compressed(tuned_stage: Path) -> None:
    from safetensors.torch import load_file

    from plait.stages.align import Align

    aligned = tuned_stage.parent / "03-align"
    aligned.mkdir()
    Align(steps=2, batch_size=2, lr=0.05, trainer=Trainer(), test_pairs=2).run(tuned_stage, aligned, events=Events())
    tuned, after = (
        compress(stage, name)[0] for stage, name in ((tuned_stage, "tuned-int8"), (aligned, "aligned-int8"))
    )
    one, other = (load_file(folder / "model" / "decoder.safetensors") for folder in (tuned, after))
    changed = [name for name in one if name.endswith(".weight") and not bool((one[name] == other[name]).all())]
    assert len(changed) == 6, "the adapted layers, and no other"
    assert all(name.endswith(("q_proj.weight", "v_proj.weight", "down_proj.weight")) for name in changed)


def test_a_compressed_model_is_not_compressed_again(tuned_stage: Path) -> None:
    folder, _ = compress(tuned_stage)
    with pytest.raises(CheckpointError, match="already"):
        compress(folder, "04-compress")


def test_more_questions_cost_more() -> None:
    base = Compress().estimate(MACHINE, {})
    assert 0 < base.seconds[0] < base.seconds[1]
    larger = Compress(questions=128).estimate(MACHINE, {})
    assert larger.flops == pytest.approx(2 * base.flops)
    # 106 million 8-bit weights, and 28 million in the format that this machine computes in.
    assert 160e6 < Compress().estimate(replace(MACHINE, dtype="bfloat16"), {}).disk_bytes - 4 * 9.7e6 < 175e6
    assert 216e6 < Compress().estimate(replace(MACHINE, dtype="float32"), {}).disk_bytes - 4 * 9.7e6 < 232e6
