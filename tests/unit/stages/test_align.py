"""Align: the reference is the model it starts from, it goes on where it was stopped, and says what it cannot do."""

from __future__ import annotations

import json
import math
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from plait.core.errors import ConfigError, DataError
from plait.core.estimate import Machine
from plait.core.events import Event, Events
from plait.core.files import find_model, read_done, read_json, read_jsonl
from plait.stages.align import REFERENCE, Align
from plait.training.trainer import Trainer, Validate

MACHINE = Machine(
    cores=2, memory_bytes=8 * 2**30, disk_bytes=50 * 2**30, gemm_fp32=2.8e11, gemm_bf16=1.3e12, measured=True
)
SETTINGS: dict[str, Any] = {"steps": 4, "batch_size": 4, "lr": 0.02, "test_pairs": 8, "save_every": 2} | {
    "trainer": Trainer()
}


def align(previous: Path, name: str = "03-align", *, stop: str = "", **settings: Any) -> tuple[Path, list[str]]:
    said: list[str] = []

    def listener(event: Event) -> None:
        said.append(event.text)
        if stop and event.text.startswith(stop):
            raise KeyboardInterrupt

    folder = previous.parent / name
    folder.mkdir(exist_ok=True)
    Align(**{**SETTINGS, **settings}).run(previous, folder, events=Events(listeners=(listener,)))
    return folder, said


def weights(folder: Path) -> dict[str, Any]:
    from safetensors.torch import load_file

    done = read_done(folder)
    assert done is not None
    return load_file(folder / done["summary"]["model"] / "adapter" / "adapter_model.safetensors")


@pytest.mark.row("S2-34")
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_the_first_margin_is_zero_and_then_grows(
    tuned_stage: Path, dtype: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Under autocast, too, and in a bfloat16 decoder: reference and first step are the same operations on the same
    # tensors.
    path = tuned_stage / "checkpoints" / "000001" / "plait.json"
    record = read_json(path)
    record["composition"]["decoder"]["dtype"] = dtype
    path.write_text(json.dumps(record))
    monkeypatch.setattr("plait.core.device.choose_dtype", lambda *_: (dtype, "for the test"))
    folder, _ = align(tuned_stage, max_pairs=4)
    steps = read_jsonl(folder / "metrics.jsonl")
    assert steps[0]["loss/margin"] == 0.0
    assert steps[0]["loss/margin"] < steps[1]["loss/margin"] < steps[3]["loss/margin"]
    assert steps[0]["loss"] == pytest.approx(math.log(2), rel=1e-6)
    assert steps[0]["loss/dpo"] == steps[0]["loss"], "what is only reported must not be in the loss"
    assert [step["units/dpo"] for step in steps] == [4, 4, 4, 4]
    scores = {score["name"]: score for score in read_json(folder / "scores.json")}
    assert scores["test-concept/preference/accuracy"]["n"] == 8
    assert scores["test-concept/preference/reward-margin"]["value"] != 0
    assert find_model(folder) == folder / "checkpoints" / "000004"


def test_a_stopped_stage_ends_as_one_that_ran_through_and_keeps_its_reference(tuned_stage: Path) -> None:
    whole, _ = align(tuned_stage, "whole")
    with pytest.raises(KeyboardInterrupt):
        align(tuned_stage, "halves", stop="checkpoint 000002 saved")
    kept = tuned_stage.parent / "halves" / REFERENCE
    before = kept.stat().st_mtime_ns
    halves, said = align(tuned_stage, "halves", trainer=Trainer(workers=1))
    assert kept.stat().st_mtime_ns == before, "the reference was computed again"
    assert any(text.startswith("resumed at step 2") for text in said)
    one, other = weights(whole), weights(halves)
    assert one.keys() == other.keys()
    assert all(bool((one[name] == other[name]).all()) for name in one)
    assert read_json(whole / "scores.json") == read_json(halves / "scores.json")


def test_another_reference_is_not_taken_for_this_model(tuned_stage: Path) -> None:
    whole, _ = align(tuned_stage, "whole")
    other = tuned_stage.parent / "other"
    other.mkdir()
    record = read_json(whole / REFERENCE)
    record["key"]["model"] = "0" * 64
    record["logprobs"] = dict.fromkeys(record["logprobs"], -1.0)
    (other / REFERENCE).write_text(json.dumps(record))
    align(tuned_stage, "other")
    assert read_json(other / REFERENCE) == read_json(whole / REFERENCE)


def test_the_answers_before_are_those_of_the_tuned_model_and_four_later_steps_have_some_too(tuned_stage: Path) -> None:
    folder, _ = align(tuned_stage)
    shown = [read_json(path) for path in sorted((folder / "samples").iterdir())]
    assert [(record["step"], record["phase"]) for record in shown] == [(step, "align") for step in range(5)]
    for record in shown:
        assert [sample["split"] for sample in record["samples"]] == ["test-concept"] * 6
        assert set(record["samples"][0]) == {"id", "split", "task", "uri", "question", "target", "answer"}


def test_a_compressed_model_cannot_be_aligned(tuned_stage: Path) -> None:
    from plait.stages.compress import Compress

    folder = tuned_stage.parent / "03-compress"
    folder.mkdir()
    Compress(questions=2, max_new_tokens=2).run(tuned_stage, folder, events=Events())
    with pytest.raises(DataError, match="no adapter to train"):
        align(folder, "04-align")


def test_tasks_without_wrong_answers_are_said(tuned_stage: Path) -> None:
    with pytest.raises(DataError, match="no question of 'train' is left"):
        align(tuned_stage, tasks=("count",))


def test_other_settings_do_not_continue_a_checkpoint(tuned_stage: Path) -> None:
    align(tuned_stage)
    with pytest.raises(ConfigError, match="beta"):
        align(tuned_stage, beta=0.3)


def test_importing_the_settings_loads_no_torch() -> None:
    code = "import sys, plait.stages.align, plait.stages.compress; print('torch' in sys.modules)"
    said = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert said.split() == ["False"]


def test_more_of_anything_costs_more() -> None:
    from plait.training.cost import SMOLLM2_135M, Lora

    base = Align().estimate(MACHINE, {})
    assert 0 < base.seconds[0] < base.seconds[1]
    assert base.params_trainable == Lora(rank=16, targets=tuple(SMOLLM2_135M.matrices())).params(SMOLLM2_135M)
    for larger in ({"steps": 24}, {"test_pairs": 256}, {"batch_size": 32}, {"trainer": Trainer(validation=Validate())}):
        assert Align(**larger).estimate(MACHINE, {}).flops > base.flops
    assert Align(max_pairs=16).estimate(MACHINE, {}).flops < base.flops
    assert sum(Align(batch_size=32).estimate(MACHINE, {}).memory.values()) > sum(base.memory.values())
