from __future__ import annotations

import dataclasses
import subprocess
import sys
from typing import get_args

import pytest
from pydantic import ValidationError

from plait.core.errors import ResourceError
from plait.core.estimate import Estimate, Machine
from plait.core.spec import catalogue
from plait.stages import evaluate
from plait.stages.evaluate import Evaluate

pytestmark = pytest.mark.light

MACHINE = Machine(
    cores=2,
    memory_bytes=8 * 2**30,
    disk_bytes=50 * 2**30,
    gemm_fp32=2.8e11,
    gemm_bf16=1.3e12,
    measured=True,
    dtype="bfloat16",
)
DATA = Estimate(stage="data", samples={"train": 1127, "test-concept": 200, "test-style": 200, "test-both": 200})


def test_importing_and_checking_loads_no_torch():
    code = (
        "import sys; from plait.core.estimate import Machine; from plait.stages.evaluate import Evaluate;"
        "rates = {'gemm_fp32': 1.0, 'gemm_bf16': 1.0};"
        "Evaluate().check(Machine(cores=1, memory_bytes=1, disk_bytes=1, measured=False, **rates));"
        "print('torch' in sys.modules, 'transformers' in sys.modules)"
    )
    said = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert said.split() == ["False", "False"]


def test_the_tasks_are_those_of_the_data_stage():
    from plait.data.instructions import TASKS

    assert set(get_args(evaluate.Task)) == set(Evaluate().tasks) == set(TASKS) == set(evaluate._QUESTION_TOKENS)


@pytest.mark.parametrize(
    "bad",
    [{"tasks": []}, {"tasks": ["name.fr"]}, {"baselines": ["chance"]}, {"max_names": 0}, {"max_new_tokens": 0}],
)
def test_settings_out_of_range_or_unknown_are_refused(bad: dict[str, object]):
    with pytest.raises(ValidationError):
        Evaluate.model_validate(bad)


def test_every_setting_is_described_for_a_person():
    assert {"tasks", "baselines", "baseline_tasks", "max_names"} <= set(catalogue(Evaluate).schema["properties"])
    assert all(p.get("description") for p in catalogue(Evaluate).schema["properties"].values())


def test_questions_are_counted_as_on_the_card():
    found = Evaluate(baselines=()).estimate(MACHINE, {"data": DATA})
    # Three splits of 200 names in two languages, 400 yes/no, 200 groups, 3 × 16 places, 24 counts.
    assert found.image_tokens == evaluate._PICTURE_TOKENS * 3 * (200 + 200 + 400 + 200 + 48 + 24)
    assert found.samples == dict.fromkeys(evaluate.TESTS, 200)
    few = Evaluate(tasks=("yesno",), max_yes_no=100, baselines=()).estimate(MACHINE, {"data": DATA})
    assert few.image_tokens == evaluate._PICTURE_TOKENS * 300


def test_more_of_anything_costs_more_and_two_decoders_are_never_held():
    base = Evaluate().estimate(MACHINE, {"data": DATA})
    assert 0 < base.seconds[0] < base.seconds[1]
    alone = Evaluate(baselines=()).estimate(MACHINE, {"data": DATA})
    assert alone.flops < base.flops
    assert alone.memory["weights"] == base.memory["weights"]
    assert Evaluate(max_new_tokens=24).estimate(MACHINE, {"data": DATA}).flops > base.flops
    wide = Evaluate(rows=64).estimate(MACHINE, {"data": DATA})
    assert sum(wide.memory.values()) > sum(base.memory.values())
    assert wide.flops == base.flops
    assert Evaluate().estimate(MACHINE, {}).tokens == 0


def test_a_device_that_is_not_here_is_said():
    Evaluate(device="mps").check(dataclasses.replace(MACHINE, device="mps"))
    if sys.platform != "darwin":
        with pytest.raises(ResourceError) as caught:
            Evaluate(device="mps").check(MACHINE)
        assert caught.value.place == "stages.evaluate.device"
